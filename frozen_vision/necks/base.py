"""The input stage of every neck."""

from collections.abc import Sequence
import functools
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.layers import norms
from frozen_vision.necks.extra_attention import ExtraAttention
from frozen_vision.ops.arrays import Array


class Neck(nnx.Module):
  """Levels of a backbone, fine to coarse, checked, normalised, with one more attention block on the last.

  A base class, so that its parameters keep the paths `neck/norms/...` and `neck/attention/...` in every neck.

  Attributes:
    in_specs: levels of the backbone.
    dtype: of the computation; parameters and norm statistics are float32.
    reads_images: the neck has a branch on the image itself and is called as
      `neck(features, images, rng=rng)`, with the images that the backbone saw and a key in training; all
      others as `neck(features)`.
  """

  reads_images: ClassVar[bool] = False

  def __init__(
    self,
    feature_specs: Sequence[FeatureSpec],
    *,
    input_norm: bool,
    attention_heads: int,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    """Builds the input stage.

    Args:
      feature_specs: levels of the backbone, fine to coarse.
      input_norm: a trainable LayerNorm over the channels of every backbone level first. Our frozen
        backbones end without a norm per level, as public checkpoints do; this is that norm. The
        reference necks have none.
      attention_heads: heads of an `ExtraAttention` on the last backbone level; 0 for none.
    """
    self.in_specs = tuple(feature_specs)
    self.dtype = dtype
    self.norms = norms.level_norms(
      [spec.channels for spec in self.in_specs],
      functools.partial(nnx.LayerNorm, dtype=dtype, rngs=rngs),
      enabled=input_norm,
    )
    last = self.in_specs[-1].channels
    self.attention = (
      ExtraAttention(last, attention_heads, dtype=dtype, rngs=rngs) if attention_heads else None
    )

  def inputs(self, features: Sequence[Float[Array, "b _h _w _c"]]) -> list[jax.Array]:
    """The levels in `dtype`, after norms and attention.

    Raises:
      ValueError: a number of levels or channels other than `in_specs` announced.
    """
    found = [x.shape[-1] for x in features]
    expected = [s.channels for s in self.in_specs]
    if found != expected:
      name = type(self).__name__
      raise ValueError(f"{name}: got levels with channels {found}, was built for {expected}.")
    maps = [jnp.asarray(x, self.dtype) for x in features]
    maps = norms.normed(self.norms, maps)
    if self.attention is not None:
      maps[-1] = self.attention(maps[-1])
    return maps
