"""Element-wise losses of detectors, float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from frozen_vision.ops.arrays import Array


def smooth_l1(difference: Float[Array, "*s"], beta: float) -> Float[Array, "*s"]:
  """|d| - beta/2 beyond `beta`, d^2 / (2 beta) below; beta = 0 is L1 (Girshick 2015; mmdet)."""
  size = jnp.abs(difference.astype(jnp.float32))
  if beta == 0:
    return size
  return jnp.where(size < beta, 0.5 * size * size / beta, size - 0.5 * beta)


def masked_mean(
  values: Float[Array, "*s"] | Bool[Array, "*s"], mask: Bool[Array, "*s"], count: jax.Array | None = None
) -> Float[Array, ""]:
  """Sum of `values` where `mask`, over `count` (default: the size of `mask`); 0 without any."""
  total = jnp.where(mask, values, 0.0).sum()
  count = mask.sum() if count is None else count
  return total / jnp.maximum(count, 1).astype(jnp.float32)
