"""Masks have exactly their number of cells, and statistics of windows are those of plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.ops import masking


@pytest.mark.parametrize("size, ratio, masked", [((6, 6), 0.6, 22), ((7, 7), 0.6, 30), ((2, 3), 0.0, 0)])
def test_every_mask_has_the_same_number_of_cells(size, ratio, masked):
  masks = np.asarray(masking.random_masks(jax.random.key(0), jnp.arange(5), size, ratio))
  assert masks.shape == (5, *size) and masks.dtype == bool
  assert masks.sum((1, 2)).tolist() == [masked] * 5
  if masked:
    assert len({mask.tobytes() for mask in masks}) == 5
    others = np.asarray(masking.random_masks(jax.random.key(0), jnp.array([9, 4, 2]), size, ratio))
    np.testing.assert_array_equal(others[1:], masks[[4, 2]])  # a mask does not depend on the batch around it


def test_all_cells_are_masked_equally_often():
  masks = np.asarray(masking.random_masks(jax.random.key(1), jnp.arange(2000), (3, 4), 0.5))
  # 0.5 within four standard errors
  assert np.abs(masks.mean(0) - 0.5).max() < 4 * 0.5 / np.sqrt(2000)


def test_masks_are_repeated_whole():
  mask = jnp.array([[[True, False], [False, True]]])
  np.testing.assert_array_equal(masking.enlarged(mask, (4, 6))[0], np.kron(mask[0], np.ones((2, 3))) > 0)
  with pytest.raises(ValueError, match="expected whole multiples"):
    masking.enlarged(mask, (4, 5))


def test_local_statistics_are_those_of_plain_loops():
  images = np.random.default_rng(0).standard_normal((1, 7, 9, 2)).astype(np.float32)
  mean, deviation = masking.local_statistics(jnp.asarray(images), 5)
  for row in range(7):
    for column in range(9):
      part = images[0, max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3].astype(np.float64)
      np.testing.assert_allclose(mean[0, row, column], part.mean((0, 1)), atol=1e-6)
      wanted = np.sqrt(part.var((0, 1), ddof=1) + 1e-6)
      np.testing.assert_allclose(deviation[0, row, column], wanted, rtol=1e-5)
  for window in (4, 1):
    with pytest.raises(ValueError, match=f"is {window}; expected an odd number of pixels from 3 on"):
      masking.local_statistics(jnp.asarray(images), window)
