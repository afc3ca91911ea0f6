"""Vectors of length one."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from frozen_vision.ops.arrays import Array


def unit(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
  """x / max(|x|, 1e-12) in float32, as torch.nn.functional.normalize, with a finite gradient at zero."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
