"""Timing in interleaved rounds, so that a machine that slows down slows down everything that is compared."""

from collections.abc import Callable, Mapping, Sequence
import time
from typing import Any

import numpy as np

from experiments import intervals


def interleaved(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
  """Seconds of each run in each round; every round begins with another run."""

  def timed(run: Callable[[], Any]) -> Callable[[], float]:
    def seconds() -> float:
      started = time.perf_counter()
      run()
      return time.perf_counter() - started

    return seconds

  return reported({name: timed(run) for name, run in runs.items()}, rounds)


def reported(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
  """What each run returns in each round; every round begins with another run."""
  names = list(runs)
  found: dict[str, list[float]] = {name: [] for name in names}
  for turn in range(rounds):
    first = turn % len(names)
    for name in names[first:] + names[:first]:
      found[name].append(runs[name]())
  return found


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> str:
  """Median of the ratios within each round, with its 95% interval where there are rounds enough for one."""
  return median(np.asarray(numerator) / np.asarray(denominator), "{:.3g}")


def median(values: Sequence[float] | np.ndarray, form: str) -> str:
  """Median of the values, with its 95% interval where there are enough of them (6)."""
  middle, low, high = (form.format(value) for value in intervals.median_interval(values))
  return middle if "nan" in low else f"{middle} ({low} to {high})"
