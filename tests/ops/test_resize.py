"""Resizing against sums written out, cell by cell."""

import numpy as np
import pytest

from frozen_vision.ops import resize


def bilinear(x, at):
  """Value at a position in cells, cell i's centre being at i, the outer ones continued."""
  at = min(max(at, 0), len(x) - 1)
  low = int(at)
  return x[low] + (x[min(low + 1, len(x) - 1)] - x[low]) * (at - low)


def test_a_map_stays_where_its_stride_puts_it():
  x = np.random.default_rng(0).standard_normal((1, 3, 1, 1)).astype(np.float32)
  found = np.asarray(resize.upsample(x, 4, (10, 4)))[0, :, 0, 0]
  wanted = [bilinear(x[0, :, 0, 0], (i + 0.5) / 4 - 0.5) for i in range(10)]
  np.testing.assert_allclose(found, wanted, atol=1e-6)
  np.testing.assert_array_equal(resize.upsample(x, 1, (3, 1)), x)
  with pytest.raises(ValueError, match=r"\(3, 1\) cells, 4 pixels each, does not cover \(13, 4\)"):
    resize.upsample(x, 4, (13, 4))


@pytest.mark.parametrize("length, bins", [(6, 3), (5, 3), (2, 6), (7, 1)])
def test_adaptive_pooling(length, bins):
  x = np.random.default_rng(length).standard_normal((2, length, 4, 3)).astype(np.float32)
  found = np.asarray(resize.adaptive_average_pool(x, (bins, 2)))
  for i in range(bins):
    rows = range(i * length // bins, -(-(i + 1) * length // bins))
    for j in range(2):
      np.testing.assert_allclose(found[:, i, j], x[:, rows, 2 * j : 2 * j + 2].mean((1, 2)), atol=1e-6)
