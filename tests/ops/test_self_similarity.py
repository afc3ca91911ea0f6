"""Similarities to later frames, against loops over cells and on maps that move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.ops import self_similarity


@pytest.mark.parametrize(
  "radius, lags, shape",
  [
    (0, (1,), (1, 2, 3, 3, 4)),
    (1, (1,), (2, 3, 4, 5, 6)),
    (2, (1, 3), (1, 5, 3, 2, 5)),
    (1, (2, 9), (1, 4, 2, 3, 4)),
  ],
)
def test_equals_loops_over_cells(radius, lags, shape):
  features = np.random.default_rng(radius).normal(size=shape) + 3
  centred = features - features.mean((2, 3), keepdims=True)
  side = 2 * radius + 1
  expected = np.zeros((*shape[:4], len(lags), side, side))
  for b, t, i, j, lag, u, v in np.ndindex(*shape[:4], len(lags), side, side):
    later, row, column = t + lags[lag], i + u - radius, j + v - radius
    if later < shape[1] and 0 <= row < shape[2] and 0 <= column < shape[3]:
      one, other = centred[b, t, i, j], centred[b, later, row, column]
      expected[b, t, i, j, lag, u, v] = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
  found = self_similarity.to_later_frames(jnp.asarray(features, jnp.float32), radius, lags)
  np.testing.assert_allclose(found, expected.reshape(found.shape), atol=1e-5)


def test_says_where_a_map_went_and_leaves_the_gradient_of_an_even_map_finite():
  still = jax.random.normal(jax.random.key(0), (1, 1, 8, 8, 16))
  moved = jnp.roll(still, (1, -2), axis=(2, 3))  # one row down, two columns to the left
  found = self_similarity.to_later_frames(jnp.concatenate([still, moved], axis=1).astype(jnp.bfloat16), 2)
  assert found.dtype == jnp.float32
  inside = np.asarray(found[0, 0, 2:-2, 2:-2]).reshape(-1, 5, 5)
  np.testing.assert_allclose(inside[:, 2 + 1, 2 - 2], 1, atol=0.01)
  assert inside[:, np.arange(25).reshape(5, 5) != 3 * 5].max() < 0.95
  assert not found[:, -1].any()
  gradient = jax.grad(lambda x: self_similarity.to_later_frames(x, 1).sum())(jnp.ones((1, 2, 3, 3, 4)))
  assert np.isfinite(gradient).all()
