"""Adapter that makes a pyramid of a frozen plain ViT: a convolutional branch reads the image, then the taps.

The form is that of DINOv3's segmentation code (facebookresearch/dinov3, eval/segmentation): ViT-Adapter
(arXiv 2205.08534) without its injectors, so that nothing flows back into the ViT.
"""

from collections.abc import Sequence
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float
import numpy as np

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.layers import deformable
from frozen_vision.layers.convolution import BatchNorm, Conv, ConvSpec
from frozen_vision.layers.mlp import gelu, linear
from frozen_vision.layers.norms import LayerNorm
from frozen_vision.layers.residual import drop_path as drop_path_lib
from frozen_vision.layers.upsampling import Deconv2x
from frozen_vision.necks.base import Neck
from frozen_vision.necks.fpn import FPN
from frozen_vision.ops import convolution
from frozen_vision.ops.arrays import Array
from frozen_vision.ops.resize import upsample

_TAPS = 4
_STRIDE = 16  # of the taps
_STRIDES = (4, 8, 16, 32)  # of the pyramid; the last three are refined by attention
_EXTRA = 2  # more extractors on the last tap
_EPSILON = 1e-6  # of the extractors' LayerNorms
_BATCH_NORM = dict(epsilon=1e-5, momentum=0.1)  # PyTorch's defaults
_KAIMING = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")

Map = Float[Array, "b _h _w _c"]
Sizes = Sequence[tuple[int, int]]


class SpatialPrior(nnx.Module):
  """Convolutions with BatchNorm on the image: maps of strides 4, 8, 16 and 32."""

  def __init__(self, width: int, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    """Builds the branch.

    Args:
      width: channels at stride 4; twice as many at stride 8, four times as many from 16 on.
      channels: of the maps that are returned.
    """

    def conv(inputs, outputs, strides):
      spec = ConvSpec(inputs, outputs, size=3, strides=strides)
      return Conv(spec, same=False, dtype=dtype, rngs=rngs, **_BATCH_NORM)

    widths = (width, 2 * width, 4 * width, 4 * width)
    self.stem = nnx.List([conv(3, width, 2), conv(width, width, 1), conv(width, width, 1)])
    self.stages = nnx.List([conv(i, o, 2) for i, o in zip(widths[:-1], widths[1:])])
    self.projections = nnx.List(
      [nnx.Linear(size, channels, dtype=dtype, kernel_init=_KAIMING, rngs=rngs) for size in widths]
    )

  def __call__(self, images: Float[Array, "b h w 3"], *, inference: bool) -> list[Map]:
    x = images
    for conv in self.stem:
      x = nnx.relu(conv(x, inference=inference))
    maps = [convolution.max_pool(x, size=3, strides=2, padding=1)]
    for conv in self.stages:
      maps.append(nnx.relu(conv(maps[-1], inference=inference)))
    return [project(x) for project, x in zip(self.projections, maps)]


class ConvFeedForward(nnx.Module):
  """Two linear layers with a depthwise 3x3 convolution between them, which all levels share."""

  def __init__(self, channels: int, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    self.fc1 = linear(channels, hidden, dtype=dtype, rngs=rngs)
    spec = ConvSpec(hidden, hidden, size=3, groups=hidden, norm=False)
    self.depthwise = Conv(spec, same=False, dtype=dtype, rngs=rngs)
    self.fc2 = linear(hidden, channels, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "b q c"], sizes: Sizes) -> Float[Array, "b q c"]:
    maps = [self.depthwise(level) for level in _to_maps(self.fc1(x), sizes)]
    return self.fc2(gelu(_to_cells(maps)))


class Extractor(nnx.Module):
  """The cells of the branch read one tap of the ViT, then go through a feed-forward network."""

  def __init__(
    self,
    channels: int,
    *,
    num_heads: int,
    num_points: int,
    value_ratio: float,
    ffn_ratio: float,
    drop_path: float,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    self.drop_path = drop_path
    self.query_norm, self.feature_norm, self.ffn_norm = (
      LayerNorm(channels, epsilon=_EPSILON, rngs=rngs) for _ in range(3)
    )
    self.attention = deformable.DeformableAttention(
      channels,
      num_heads,
      num_levels=1,
      num_points=num_points,
      value_channels=int(channels * value_ratio),
      dtype=dtype,
      rngs=rngs,
    )
    self.ffn = ConvFeedForward(channels, int(channels * ffn_ratio), dtype=dtype, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, "b q c"],
    tap: Float[Array, "b h w c"],
    references: Float[np.ndarray, "q 2"],
    sizes: Sizes,
    key: Array | None,
  ) -> Float[Array, "b q c"]:
    """One extractor.

    Args:
      x: cells of the branch, one level after the other.
      tap: a map of the ViT.
      references: (x, y) of the cells' centres as fractions of the tap's sides.
      sizes: (height, width) of the levels of `x`.
      key: of stochastic depth; None for none.
    """
    cells = self.feature_norm(_to_cells([tap]))
    x = x + self.attention.attend(self.query_norm(x), cells, references, [tap.shape[1:3]])
    return x + drop_path_lib(self.ffn(self.ffn_norm(x), sizes), self.drop_path, key)


class ViTAdapter(Neck):
  """Four levels of strides 4 to 32, as wide as the ViT, or an FPN on them.

  All of it trains, the branch on the image included. BatchNorm uses the statistics of the batch in training,
  of all devices together, and its running statistics without `rng`.

  Attributes:
    feature_specs: specs of the outputs.
  """

  reads_images: ClassVar[bool] = True

  def __init__(
    self,
    feature_specs: Sequence[FeatureSpec],
    channels: int = 256,
    *,
    num_levels: int = 5,
    prior_channels: int = 64,
    num_heads: int = 16,
    num_points: int = 4,
    value_ratio: float = 0.5,
    ffn_ratio: float = 0.25,
    drop_path: float = 0.3,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Builds the neck; the defaults beside `channels` and `num_levels` are DINOv3's.

    Args:
      feature_specs: of four taps of a ViT, all of stride 16 and equally wide, in the order of its blocks.
      channels: of the FPN behind the adapter; 0 for none: the adapter's own four levels, as wide as the ViT.
      num_levels: output levels; without an FPN 4.
      prior_channels: width of the branch on the image at stride 4.
      num_heads, num_points: of the deformable attention.
      value_ratio: channels of what it samples, as a fraction of the ViT's.
      ffn_ratio: hidden channels of the feed-forward networks, likewise.
      drop_path: rate of stochastic depth of each feed-forward network in training.
      dtype: of the computation; parameters, norms and places of samples are float32.
      rngs: for the weights.

    Raises:
      ValueError: other maps than four of stride 16, or a number of levels that does not fit.
    """
    specs = tuple(feature_specs)
    if len(specs) != _TAPS or len(set(specs)) != 1 or specs[0].stride != _STRIDE:
      raise ValueError(
        f"ViTAdapter: the backbone has maps {[(spec.stride, spec.channels) for spec in specs]} (stride, "
        f"channels); expected {_TAPS} of stride {_STRIDE}, as a plain ViT has. For patches of other sizes, "
        f"build the backbone with stride={_STRIDE}; its option taps chooses the blocks."
      )
    if not channels and num_levels != len(_STRIDES):
      raise ValueError(
        f"ViTAdapter: {num_levels} levels without an FPN (channels=0), which are {len(_STRIDES)}; set "
        f"levels={len(_STRIDES)}, or give channels."
      )
    super().__init__(specs, input_norm=False, attention_heads=0, dtype=dtype, rngs=rngs)
    width = specs[0].channels
    self.prior = SpatialPrior(prior_channels, width, dtype=dtype, rngs=rngs)
    self.level_embed = nnx.Param(jax.random.normal(rngs.params(), (len(_STRIDES) - 1, width)))
    options = dict(
      num_heads=num_heads,
      num_points=num_points,
      value_ratio=value_ratio,
      ffn_ratio=ffn_ratio,
      drop_path=drop_path,
    )
    self.extractors = nnx.List(
      [Extractor(width, **options, dtype=dtype, rngs=rngs) for _ in range(_TAPS + _EXTRA)]
    )
    self.up = Deconv2x(width, width, dtype=dtype, rngs=rngs)
    self.output_norms = nnx.List([BatchNorm(width, **_BATCH_NORM, rngs=rngs) for _ in _STRIDES])
    levels = tuple(FeatureSpec(stride, width) for stride in _STRIDES)
    self.fpn = (
      FPN(levels, channels, num_levels=num_levels, input_norm=False, dtype=dtype, rngs=rngs)
      if channels
      else None
    )
    self.feature_specs = levels if self.fpn is None else self.fpn.feature_specs

  def __call__(
    self, features: Sequence[Map], images: Float[Array, "b h w 3"], *, rng: Array | None = None
  ) -> tuple[Map, ...]:
    """The taps of a ViT and the images that it saw -> pyramid levels in `dtype`.

    Sides of images are free: a level of stride s has ceil(side / s) cells, the last of which may reach over
    the edge.

    Args:
      features: four maps [b, ceil(h / 16), ceil(w / 16), c].
      images: normalised as the ViT's are.
      rng: key of stochastic depth in training; None is deterministic, with BatchNorm by its running
        statistics.

    Raises:
      ValueError: a number of maps or channels other than `in_specs` announced.
    """
    taps = self.inputs(features)
    fine, *coarse = self.prior(jnp.asarray(images, self.dtype), inference=rng is None)
    sizes = [level.shape[1:3] for level in coarse]
    x = _to_cells([level + self.level_embed[i].astype(self.dtype) for i, level in enumerate(coarse)])
    references = _references(sizes, taps[0].shape[1:3])
    for index, extractor in enumerate(self.extractors):
      key = None if rng is None else jax.random.fold_in(rng, index)
      tap = taps[min(index, _TAPS - 1)]
      step = jax.checkpoint(
        lambda x, tap, extractor=extractor, key=key: extractor(x, tap, references, sizes, key),
        policy=deformable.SAVE_SAMPLED,
      )
      x = step(x, tap)
    coarse = _to_maps(x, sizes)
    fine = fine + self.up(coarse[0])[:, : fine.shape[1], : fine.shape[2]]
    added = [
      upsample(taps[0], 4, fine.shape[1:3]),
      upsample(taps[1], 2, sizes[0]),
      taps[2],
      convolution.average_pool(taps[3], size=2, strides=2),
    ]
    levels = tuple(
      norm(level + tap, inference=rng is None)
      for norm, level, tap in zip(self.output_norms, [fine, *coarse], added)
    )
    return levels if self.fpn is None else self.fpn(levels)


def _references(sizes: Sizes, tap: tuple[int, int]) -> Float[np.ndarray, "q 2"]:
  """(x, y) of the centres of the cells of strides 8, 16 and 32 as fractions of the sides of the taps."""
  extent = _STRIDE * np.asarray(tap[::-1], np.float32)  # (width, height) in pixels
  pixels = [
    deformable.cell_centres(*size) * np.asarray(size[::-1], np.float32) * stride
    for size, stride in zip(sizes, _STRIDES[1:])
  ]
  return (np.concatenate(pixels) / extent).astype(np.float32)


def _to_cells(maps: Sequence[Map]) -> Float[Array, "b q c"]:
  """The cells of all levels, row by row, one level after the other."""
  return jnp.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in maps], axis=1)


def _to_maps(x: Float[Array, "b q c"], sizes: Sizes) -> list[Map]:
  """Undoes `_to_cells`."""
  ends = np.cumsum([height * width for height, width in sizes])[:-1]
  return [
    part.reshape(x.shape[0], *size, x.shape[-1]) for part, size in zip(jnp.split(x, ends, axis=1), sizes)
  ]
