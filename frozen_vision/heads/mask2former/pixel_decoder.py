"""Pixel decoder of Mask2Former (Cheng et al. 2022): deformable attention over coarse levels, then an FPN."""

from collections.abc import Sequence
import functools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float
import numpy as np

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.heads.mask2former import layers
from frozen_vision.heads.mask2former.config import Mask2FormerConfig
from frozen_vision.layers import deformable, norms
from frozen_vision.layers.convolution import MapConv
from frozen_vision.layers.deformable import DeformableAttention
from frozen_vision.ops.arrays import Array
from frozen_vision.ops.resize import resize_bilinear


class PixelFeatures(NamedTuple):
  """Inputs of the transformer decoder."""

  levels: tuple[Array, ...]  # [b, h, w, hidden_dim], coarse to fine
  masks: Array  # [b, h, w, mask_dim], of the finest backbone level's size


class _Projection(nnx.Module):
  """A convolution and a group norm."""

  def __init__(
    self,
    channels_in: int,
    channels: int,
    kernel: int,
    groups: int,
    *,
    bias: bool,
    init,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    # A 1x1 convolution is a matrix product over the channels.
    options = dict(use_bias=bias, dtype=dtype, kernel_init=init, rngs=rngs)
    self.conv = (
      nnx.Linear(channels_in, channels, **options)
      if kernel == 1
      else MapConv(channels_in, channels, (kernel, kernel), **options)
    )
    self.norm = norms.group_norm(channels, groups, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    return self.norm(self.conv(x))


class DeformableLayer(DeformableAttention):
  """Deformable self-attention over all levels, then a feed-forward network."""

  def __init__(self, config: Mask2FormerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
    super().__init__(
      config.hidden_dim,
      config.num_heads,
      num_levels=config.encoder_levels,
      num_points=config.encoder_points,
      dtype=dtype,
      rngs=rngs,
    )
    self.norm = layers.layer_norm(config.hidden_dim, dtype=dtype, rngs=rngs)
    self.ffn = layers.FeedForward(config.hidden_dim, config.encoder_ffn_dim, dtype=dtype, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, "b s c"],
    positions: Float[Array, "s c"],
    references: Float[np.ndarray, "s 2"],
    shapes: Sequence[tuple[int, int]],
  ) -> Float[Array, "b s c"]:
    """One layer.

    Args:
      x: cells of all levels, one level after the other.
      positions: added to what decides where to sample, not to what is sampled.
      references: (x, y) of every cell's centre as shares of its level's width and height.
      shapes: (height, width) of each level.
    """
    return self.ffn(self.norm(x + self.attend(x + positions, x, references, shapes)))


class PixelDecoder(nnx.Module):
  """Backbone levels -> refined levels and per-pixel mask features."""

  def __init__(
    self,
    feature_specs: Sequence[FeatureSpec],
    config: Mask2FormerConfig,
    *,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    self.config, self.dtype = config, dtype
    channels, groups = config.hidden_dim, config.norm_groups
    self.norms = norms.level_norms(
      [spec.channels for spec in feature_specs],
      functools.partial(layers.layer_norm, dtype=dtype, rngs=rngs),
      enabled=config.input_norm,
    )
    coarse, fine = feature_specs[-config.encoder_levels :], feature_specs[: -config.encoder_levels]
    # Coarse to fine, as the source has them.
    self.inputs = nnx.List(
      [
        _Projection(spec.channels, channels, 1, groups, bias=True, init=layers.XAVIER, dtype=dtype, rngs=rngs)
        for spec in coarse[::-1]
      ]
    )
    self.level_embed = nnx.Param(jax.random.normal(rngs.params(), (config.encoder_levels, channels)))
    self.layers = nnx.List(
      [DeformableLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.encoder_layers)]
    )

    def projection(features, kernel):
      return _Projection(
        features, channels, kernel, groups, bias=False, init=layers.XAVIER_FAN_IN, dtype=dtype, rngs=rngs
      )

    self.laterals = nnx.List([projection(spec.channels, 1) for spec in fine])
    self.outputs = nnx.List([projection(channels, 3) for _ in fine])
    self.mask_features = nnx.Linear(
      channels, config.mask_dim, dtype=dtype, kernel_init=layers.XAVIER_FAN_IN, rngs=rngs
    )

  def __call__(self, features: Sequence[Float[Array, "b _h _w _c"]]) -> PixelFeatures:
    """Backbone levels, fine to coarse, of any sizes -> see PixelFeatures."""
    features = [jnp.asarray(x, self.dtype) for x in features]
    features = norms.normed(self.norms, features)
    levels = [project(x) for project, x in zip(self.inputs, features[::-1])]
    levels = self._encode(levels)
    fine = levels[-1]
    for i in reversed(range(len(self.laterals))):
      # The largest maps of the head: the gradient computes them again instead of keeping each step's.
      fine = jax.checkpoint(lambda x, coarser, i=i: self._fuse(i, x, coarser))(features[i], fine)
    return PixelFeatures(tuple(levels), self.mask_features(fine))

  def _fuse(self, level: int, x: Float[Array, "b h w c"], coarser: Float[Array, "b y x d"]) -> jax.Array:
    """One FPN step; its resize is bilinear (the official code, whatever its comment says), not nearest."""
    lateral = self.laterals[level](x)
    return nnx.relu(self.outputs[level](lateral + resize_bilinear(coarser, lateral.shape[1:3])))

  def _encode(self, levels: list[jax.Array]) -> list[jax.Array]:
    shapes = tuple(x.shape[1:3] for x in levels)
    b, _, _, channels = levels[0].shape
    positions = jnp.concatenate(
      [layers.sine_positions(*shape, channels) + self.level_embed[i] for i, shape in enumerate(shapes)]
    )
    references = np.concatenate([deformable.cell_centres(*shape) for shape in shapes])
    x = jnp.concatenate([level.reshape(b, -1, channels) for level in levels], axis=1)
    for layer in self.layers:
      step = jax.checkpoint(
        lambda x, layer=layer: layer(x, positions, references, shapes), policy=deformable.SAVE_SAMPLED
      )
      x = step(x)
    ends = np.cumsum([height * width for height, width in shapes])[:-1]
    return [part.reshape(b, *shape, channels) for part, shape in zip(jnp.split(x, ends, axis=1), shapes)]
