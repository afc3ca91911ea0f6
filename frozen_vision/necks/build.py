"""Necks by name, and their options."""

from collections.abc import Sequence
import dataclasses
from typing import Any, Literal

from flax import nnx
import jax.numpy as jnp
from jax.typing import DTypeLike

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.necks import bifpn, fpn, nas_fpn, simple_pyramid, vit_adapter
from frozen_vision.options import Count, Fraction, Natural


@dataclasses.dataclass(frozen=True)
class FPNConfig:
  """Options of a feature pyramid network.

  Attributes:
    channels: channels of every output level.
    levels: output levels.
    input_norm: a trainable LayerNorm on every level of the backbone first; off to start from published heads
      of backbones without one.
    attention_heads: heads of one more global attention block on the backbone's last level (HTC++), or 0.
  """

  name: Literal["fpn"] = "fpn"
  channels: Count = 256
  levels: Count = 5
  input_norm: bool = True
  attention_heads: Natural = 0


@dataclasses.dataclass(frozen=True)
class BiFPNConfig:
  """Options of a bidirectional feature pyramid: those of `FPNConfig`, and its own.

  Attributes:
    repeats: how often features go up and down the pyramid.
    separable: depthwise separable convolutions.
    norm: group norms, or none.
  """

  name: Literal["bifpn"] = "bifpn"
  channels: Count = 256
  levels: Count = 5
  input_norm: bool = True
  attention_heads: Natural = 0
  repeats: Count = 1
  separable: bool = False
  norm: bifpn.Norm = "group"


@dataclasses.dataclass(frozen=True)
class SimplePyramidConfig:
  """Options of a simple feature pyramid on the last map of a plain ViT; see `FPNConfig`."""

  name: Literal["simple_pyramid"] = "simple_pyramid"
  channels: Count = 256
  levels: Count = 5
  input_norm: bool = False
  attention_heads: Natural = 0


@dataclasses.dataclass(frozen=True)
class NASFPNConfig:
  """Options of a NAS-FPN, whose levels have strides 8 to 128; see `FPNConfig`.

  Attributes:
    repeats: blocks in a row.
    norm: batch norms, or group norms.
    activation: `relu` or `swish`.
  """

  name: Literal["nas_fpn"] = "nas_fpn"
  channels: Count = 256
  input_norm: bool = False
  attention_heads: Natural = 0
  repeats: Count = 5
  norm: nas_fpn.Norm = "batch"
  activation: Literal["relu", "swish"] = "relu"


@dataclasses.dataclass(frozen=True)
class ViTAdapterConfig:
  """Options of an adapter on four maps of a plain ViT and the image (`vit_adapter.ViTAdapter`).

  Attributes:
    channels, levels: of an FPN behind the adapter; with 0 channels there is none, and 4 levels as wide as the
      ViT.
    prior_channels: width of the convolutions on the image at stride 4.
    num_heads, num_points: of the deformable attention.
    value_ratio, ffn_ratio: widths of what it samples and of the feed-forward networks, as fractions of the
      ViT's.
    drop_path: rate of stochastic depth.
  """

  name: Literal["vit_adapter"] = "vit_adapter"
  channels: Natural = 256
  levels: Count = 5
  prior_channels: Count = 64
  num_heads: Count = 16
  num_points: Count = 4
  value_ratio: Fraction = 0.5
  ffn_ratio: Fraction = 0.25
  drop_path: Fraction = 0.3


@dataclasses.dataclass(frozen=True)
class NoNeck:
  """No neck: the head reads the levels of the backbone."""

  name: Literal["none"] = "none"


NECKS = {
  "fpn": FPNConfig,
  "bifpn": BiFPNConfig,
  "simple_pyramid": SimplePyramidConfig,
  "nas_fpn": NASFPNConfig,
  "vit_adapter": ViTAdapterConfig,
}
NeckConfig = FPNConfig | BiFPNConfig | SimplePyramidConfig | NASFPNConfig | ViTAdapterConfig
Pyramid = fpn.FPN | bifpn.BiFPN | simple_pyramid.SimplePyramid | nas_fpn.NASFPN | vit_adapter.ViTAdapter


_CLASSES: dict[str, type[Pyramid]] = {
  "fpn": fpn.FPN,
  "bifpn": bifpn.BiFPN,
  "simple_pyramid": simple_pyramid.SimplePyramid,
  "nas_fpn": nas_fpn.NASFPN,
  "vit_adapter": vit_adapter.ViTAdapter,
}


def from_options(
  options: NeckConfig,
  feature_specs: Sequence[FeatureSpec],
  *,
  dtype: Any,
  rngs: nnx.Rngs,
) -> Pyramid:
  """The pyramid of a config's section; raises ValueError as `build_neck` does."""
  fields = dataclasses.asdict(options)
  if "levels" in fields:
    fields["num_levels"] = fields.pop("levels")
  return build_neck(fields.pop("name"), feature_specs, **fields, dtype=dtype, rngs=rngs)


def build_neck(
  name: str,
  feature_specs: Sequence[FeatureSpec],
  *,
  channels: int = 256,
  dtype: DTypeLike = jnp.float32,
  rngs: nnx.Rngs,
  **options: Any,
) -> Pyramid:
  """A pyramid on the levels of a backbone.

  Args:
    name: "fpn", "bifpn", "simple_pyramid", "nas_fpn" or "vit_adapter".
    feature_specs: levels of the backbone, fine to coarse.
    channels: channels of every output level.
    dtype: of the computation.
    rngs: for the weights.
    options: further arguments of the neck, such as `num_levels` (all but NAS-FPN), `repeats` (BiFPN and
      NAS-FPN), `input_norm` and `attention_heads` (all but the adapter).

  Raises:
    ValueError: an unknown name, or what the neck itself refuses.
    TypeError: an option that the neck does not have.
  """
  if name not in _CLASSES:
    raise ValueError(f"Neck {name!r} is unknown; known: {', '.join(_CLASSES)}.")
  return _CLASSES[name](feature_specs, channels, dtype=dtype, rngs=rngs, **options)
