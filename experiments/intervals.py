"""Medians with intervals that assume nothing of a distribution."""

import math
from typing import Any

import numpy as np


def median_interval(values: Any, confidence: float = 0.95) -> tuple[float, float, float]:
  """(median, lower, upper): the narrowest pair of order statistics around the median with that coverage.

  Few values have no such pair: then the bounds are NaN (fewer than 6 at 95%).
  """
  values = np.sort(np.asarray(values, np.float64))
  n, best = len(values), (math.nan, math.nan)
  for rank in range(n // 2):
    outside = 2 * sum(math.comb(n, k) for k in range(rank + 1)) / 2**n
    if 1 - outside >= confidence:
      best = values[rank], values[n - 1 - rank]
  return float(np.median(values)), float(best[0]), float(best[1])
