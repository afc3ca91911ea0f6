"""Timing in interleaved rounds, so that a machine that slows down slows down everything that is compared."""

from collections.abc import Callable, Mapping, Sequence
import time
from typing import Any

import numpy as np

from experiments import intervals


def interleaved(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
  """Seconds of each run in each round; every round begins with another run."""
  names = list(runs)
  seconds: dict[str, list[float]] = {name: [] for name in names}
  for turn in range(rounds):
    first = turn % len(names)
    for name in names[first:] + names[:first]:
      started = time.perf_counter()
      runs[name]()
      seconds[name].append(time.perf_counter() - started)
  return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> str:
  """Median of the ratios within each round, with its 95% interval where there are rounds enough for one."""
  return median(np.asarray(numerator) / np.asarray(denominator), "{:.3g}")


def median(values: Sequence[float] | np.ndarray, form: str) -> str:
  """Median of the values, with its 95% interval where there are enough of them (6)."""
  middle, low, high = (form.format(value) for value in intervals.median_interval(values))
  return middle if "nan" in low else f"{middle} ({low} to {high})"
