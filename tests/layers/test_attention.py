"""Attention equals jax's, values and gradients, in the form that each platform has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.layers import attention


def _draw(*shape, dtype="float32"):
  return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), dtype)


@pytest.mark.parametrize("scale, has_bias", [(None, False), (0.7, True)])
def test_equals_jaxs_attention(scale, has_bias):
  arrays = _draw(2, 5, 3, 8), _draw(2, 7, 3, 8), _draw(2, 7, 3, 8) + 1
  bias = 3 * _draw(3, 5, 7) if has_bias else None
  weights = _draw(2, 5, 3, 8)

  def reference(query, key, value):
    return jax.nn.dot_product_attention(query, key, value, bias if bias is None else bias[None], scale=scale)

  def ours(query, key, value):
    return attention.attention(query, key, value, scale=scale, bias=bias)

  (found, pull_back), (wanted, reference_pull_back) = (jax.vjp(f, *arrays) for f in (ours, reference))
  np.testing.assert_allclose(found, wanted, atol=2e-6)
  for ours_of, wanted_of in zip(pull_back(weights), reference_pull_back(weights), strict=True):
    np.testing.assert_allclose(ours_of, wanted_of, atol=5e-6)


def test_large_scores_do_not_overflow_and_bfloat16_stays():
  query, key, value = (_draw(1, 4, 2, 8, dtype=jnp.bfloat16) for _ in range(3))
  found = attention.attention(100 * query, 100 * key, value)
  assert found.dtype == jnp.bfloat16 and np.isfinite(np.asarray(found, "float32")).all()
  wanted = jax.nn.dot_product_attention(100 * query, 100 * key, value)
  np.testing.assert_allclose(np.asarray(found, "float32"), np.asarray(wanted, "float32"), atol=0.02)
