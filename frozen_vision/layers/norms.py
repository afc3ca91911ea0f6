"""Normalisation in float32, and a norm for every level of a feature pyramid."""

from collections.abc import Callable, Sequence

from flax import nnx
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from frozen_vision.ops.arrays import Array

NORM_EPSILON = 1e-5  # PyTorch's default; flax's own is 1e-6.


class LayerNorm(nnx.LayerNorm):
  """LayerNorm in float32 whatever comes in, returned in the input's dtype."""

  def __init__(self, channels: int, *, epsilon: float = NORM_EPSILON, scale: float = 1.0, rngs: nnx.Rngs):
    super().__init__(
      channels,
      epsilon=epsilon,
      use_fast_variance=False,
      dtype=jnp.float32,
      scale_init=nnx.initializers.constant(scale),
      rngs=rngs,
    )

  def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
    return super().__call__(x).astype(x.dtype)


def group_norm(channels: int, groups: int = 32, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.GroupNorm:
  """A GroupNorm as PyTorch has it, with statistics in float32, returned in `dtype`."""
  return nnx.GroupNorm(
    channels, num_groups=groups, epsilon=NORM_EPSILON, use_fast_variance=False, dtype=dtype, rngs=rngs
  )


def level_norms(
  channels: Sequence[int], make: Callable[[int], nnx.Module], *, enabled: bool = True
) -> nnx.List:
  """One trainable norm per feature level, or none; `normed` applies them.

  Backbones end without a norm per level, as public checkpoints do: this is that norm.

  Args:
    channels: of each level.
    make: channels -> a norm.
  """
  return nnx.List([make(count) for count in channels] if enabled else [])


def normed(norms: nnx.List, features: Sequence[Float[Array, "..."]]) -> list[Float[Array, "..."]]:
  """Each level after its norm; the levels as they are where `norms` is empty."""
  return [norm(x) for norm, x in zip(norms, features, strict=True)] if norms else list(features)
