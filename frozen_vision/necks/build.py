"""Necks by name, and their options."""

from collections.abc import Sequence
import dataclasses
from typing import Any, Literal

from flax import nnx
import jax.numpy as jnp
from jax.typing import DTypeLike

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.necks import bifpn, fpn, nas_fpn, simple_pyramid
from frozen_vision.options import Count, Natural


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


NECKS = {
  "fpn": FPNConfig,
  "bifpn": BiFPNConfig,
  "simple_pyramid": SimplePyramidConfig,
  "nas_fpn": NASFPNConfig,
}
Pyramid = fpn.FPN | bifpn.BiFPN | simple_pyramid.SimplePyramid | nas_fpn.NASFPN


_CLASSES: dict[str, type[Pyramid]] = {
  "fpn": fpn.FPN,
  "bifpn": bifpn.BiFPN,
  "simple_pyramid": simple_pyramid.SimplePyramid,
  "nas_fpn": nas_fpn.NASFPN,
}


def from_options(
  options: FPNConfig | BiFPNConfig | SimplePyramidConfig | NASFPNConfig,
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
    name: "fpn", "bifpn", "simple_pyramid" or "nas_fpn".
    feature_specs: levels of the backbone, fine to coarse.
    channels: channels of every output level.
    dtype: of the computation.
    rngs: for the weights.
    options: further arguments of the neck, such as `num_levels` (all but NAS-FPN), `repeats` (BiFPN and
      NAS-FPN), `input_norm` and `attention_heads` (all).

  Raises:
    ValueError: an unknown name, or what the neck itself refuses.
    TypeError: an option that the neck does not have.
  """
  if name not in _CLASSES:
    raise ValueError(f"Neck {name!r} is unknown; known: {', '.join(_CLASSES)}.")
  return _CLASSES[name](feature_specs, channels, dtype=dtype, rngs=rngs, **options)
