"""Bidirectional feature pyramid (Tan et al. 2020), with the rules of Swin's detection code.

That code (SwinTransformer/Swin-Transformer-Object-Detection, mmdet/models/necks/bifpn.py) differs
from EfficientDet: swish comes before the convolution, nothing comes after it but the norm, and the
convolutions are plain. EfficientDet's depthwise-separable ones are an option here. That code's
switch `no_norm_on_lateral` takes the norms off the fusions too; here `norm` speaks for both.
"""

from collections.abc import Sequence
from typing import Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.layers import norms
from frozen_vision.layers.convolution import MapConv
from frozen_vision.necks.base import Neck
from frozen_vision.necks.fpn import resize_nearest
from frozen_vision.ops.arrays import Array

_XAVIER = nnx.initializers.xavier_uniform()
_FUSION_EPSILON = 1e-4  # keeps the weights finite where all are <= 0
_GROUPS = 32

Norm = Literal["group", "none"]
Map = Float[Array, "b _h _w _c"]


def _norm(channels: int, norm: Norm, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.GroupNorm | None:
  if norm == "none":
    return None
  return norms.group_norm(channels, _GROUPS, dtype=dtype, rngs=rngs)


def max_pool(x: Map) -> Float[Array, "b y x c"]:
  """3x3 maximum, stride 2, padding 1: sizes are halved, odd ones rounded up."""
  return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


class Lateral(nnx.Module):
  """1x1 convolution to the pyramid's channels, and a norm."""

  def __init__(self, channels_in: int, channels: int, norm: Norm, *, dtype: DTypeLike, rngs: nnx.Rngs):
    self.conv = nnx.Linear(
      channels_in,
      channels,
      use_bias=norm == "none",
      dtype=dtype,
      kernel_init=_XAVIER,
      rngs=rngs,
    )
    self.norm = _norm(channels, norm, dtype, rngs)

  def __call__(self, x: Map) -> Map:
    x = self.conv(x)
    return x if self.norm is None else self.norm(x)


class Fusion(nnx.Module):
  """Weighted mean of maps of one size, swish, 3x3 convolution, norm.

  Weights are relu(w_i) / (sum of relu(w) + 1e-4), one number per map.
  """

  def __init__(
    self,
    inputs: int,
    channels: int,
    *,
    separable: bool,
    norm: Norm,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    self.dtype = dtype
    self.weights = nnx.Param(jnp.ones((inputs,), jnp.float32))

    def conv(size, groups, bias):
      return MapConv(
        channels,
        channels,
        (size, size),
        feature_group_count=groups,
        use_bias=bias,
        dtype=dtype,
        kernel_init=_XAVIER,
        rngs=rngs,
      )

    bias = norm == "none"
    self.depthwise = conv(3, channels, False) if separable else None
    self.conv = conv(1 if separable else 3, 1, bias)
    self.norm = _norm(channels, norm, dtype, rngs)

  def __call__(self, *maps: Map) -> Map:
    weights = nnx.relu(self.weights[...])
    weights = (weights / (weights.sum() + _FUSION_EPSILON)).astype(self.dtype)
    x = nnx.swish(sum(weights[i] * x for i, x in enumerate(maps)))
    if self.depthwise is not None:
      x = self.depthwise(x)
    x = self.conv(x)
    return x if self.norm is None else self.norm(x)


class BiFPNBlock(nnx.Module):
  """One repeat: top-down, then bottom-up, over maps that all have `channels` channels."""

  def __init__(
    self,
    num_levels: int,
    channels: int,
    *,
    separable: bool,
    norm: Norm,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    def fusion(inputs):
      return Fusion(inputs, channels, separable=separable, norm=norm, dtype=dtype, rngs=rngs)

    # top_down[i] makes level i; bottom_up[i] makes level i + 1.
    self.top_down = nnx.List([fusion(2) for _ in range(num_levels - 1)])
    self.bottom_up = nnx.List([fusion(3 if i + 2 < num_levels else 2) for i in range(num_levels - 1)])

  def __call__(self, laterals: Sequence[Map]) -> list[jax.Array]:
    maps = list(laterals)
    last = len(maps) - 1
    for i in range(last, 0, -1):
      larger = resize_nearest(maps[i], maps[i - 1].shape[1:3])
      maps[i - 1] = self.top_down[i - 1](maps[i - 1], larger)
    for i in range(last):
      inputs = [max_pool(maps[i]), maps[i + 1]]
      # The last level has no top-down result: its map is its lateral, which counts once.
      inputs += [laterals[i + 1]] if i + 1 < last else []
      maps[i + 1] = self.bottom_up[i](*inputs)
    return maps


class BiFPN(Neck):
  """Stack of bidirectional blocks. Each repeat adds 2 * (num_levels - 1) convolutions.

  At 256 channels and 5 levels with norms a repeat has 4.7227 million parameters, or 0.5468 with
  depthwise-separable convolutions.

  Attributes:
    feature_specs: specs of the outputs; all have `channels` channels.
  """

  def __init__(
    self,
    feature_specs: Sequence[FeatureSpec],
    channels: int = 256,
    *,
    num_levels: int = 5,
    repeats: int = 1,
    separable: bool = False,
    norm: Norm = "group",
    input_norm: bool = True,
    attention_heads: int = 0,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Builds the neck.

    Args:
      feature_specs: levels of the backbone, fine to coarse, each half as large as the one before.
      channels: channels of every output level.
      num_levels: output levels; those beyond the backbone's begin as its last level, max-pooled,
        and have laterals of their own.
      repeats: blocks in a row.
      separable: 3x3 depthwise and 1x1 convolutions instead of plain 3x3 ones.
      norm: "group" (32 groups) after every lateral and fusion, or "none".
      input_norm, attention_heads: of the input stage, see `Neck`.
      dtype: dtype of the computation; parameters and norm statistics are float32.
      rngs: for the weights.

    Raises:
      ValueError: fewer than two levels or fewer outputs than inputs, no repeats, an unknown norm,
        or channels that 32 groups do not divide.
    """
    feature_specs = tuple(feature_specs)
    if not feature_specs or num_levels < max(len(feature_specs), 2):
      raise ValueError(
        f"BiFPN: num_levels={num_levels} outputs for {len(feature_specs)} backbone levels;"
        " expected at least one backbone level, and num_levels >= 2 and >= the number of levels."
      )
    if repeats < 1:
      raise ValueError(f"BiFPN: repeats={repeats}; expected at least 1.")
    if norm not in ("group", "none"):
      raise ValueError(f"BiFPN: norm is {norm!r}; known: group, none.")
    if norm == "group" and channels % _GROUPS:
      raise ValueError(
        f"BiFPN: {channels} channels do not divide into {_GROUPS} groups; give a multiple of"
        f" {_GROUPS}, or norm='none'."
      )
    super().__init__(
      feature_specs, input_norm=input_norm, attention_heads=attention_heads, dtype=dtype, rngs=rngs
    )
    specs = list(feature_specs)
    while len(specs) < num_levels:
      specs.append(FeatureSpec(2 * specs[-1].stride, specs[-1].channels))
    self.feature_specs = tuple(FeatureSpec(spec.stride, channels) for spec in specs)
    # None where a level has the right number of channels already, as in the reference.
    self.laterals = nnx.List(
      [
        None if s.channels == channels else Lateral(s.channels, channels, norm, dtype=dtype, rngs=rngs)
        for s in specs
      ]
    )
    self.blocks = nnx.List(
      [
        BiFPNBlock(num_levels, channels, separable=separable, norm=norm, dtype=dtype, rngs=rngs)
        for _ in range(repeats)
      ]
    )

  def __call__(self, features: Sequence[Map]) -> tuple[Float[Array, "b _h _w d"], ...]:
    """Backbone levels, fine to coarse -> `num_levels` pyramid levels in `dtype`.

    Raises:
      ValueError: a number of levels or channels other than `feature_specs` announced, or a level
        that is not half as large (odd sizes rounded up) as the one before.
    """
    sizes = [x.shape[1:3] for x in features]
    for finer, coarser in zip(sizes[:-1], sizes[1:]):
      if coarser != tuple(-(-side // 2) for side in finer):
        raise ValueError(
          f"BiFPN: got maps of sizes {sizes}; expected each to be half as large as the one"
          " before, odd sizes rounded up."
        )
    maps = self.inputs(features)
    while len(maps) < len(self.feature_specs):
      maps.append(max_pool(maps[-1]))
    maps = [x if lateral is None else lateral(x) for lateral, x in zip(self.laterals, maps)]
    for block in self.blocks:
      maps = block(maps)
    return tuple(maps)
