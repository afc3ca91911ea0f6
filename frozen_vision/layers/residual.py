"""The end of a residual branch: stochastic depth and LayerScale."""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float

from frozen_vision.ops.arrays import Array


def drop_path(x: Float[Array, "b ..."], rate: float, key: Array | None) -> Float[Array, "b ..."]:
  """Drops whole residual branches per example (arXiv 1603.09382), none without a key; the mean stays."""
  if key is None or not rate:
    return x
  keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
  return jnp.where(keep, x / (1 - rate), 0)


class LayerScale(nnx.Module):
  """A trainable factor per channel, small at first (CaiT, arXiv 2103.17239)."""

  def __init__(self, channels: int, initial: float):
    self.scale = nnx.Param(jnp.full((channels,), initial, jnp.float32))

  def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
    return x * self.scale[...].astype(x.dtype)
