"""Necks by name, and their options."""

from collections.abc import Sequence
import dataclasses
from typing import Any, Literal

from flax import nnx
import jax.numpy as jnp
from jax.typing import DTypeLike

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.necks import bifpn, fpn, simple_pyramid
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


NECKS = {"fpn": FPNConfig, "bifpn": BiFPNConfig, "simple_pyramid": SimplePyramidConfig}
Pyramid = fpn.FPN | bifpn.BiFPN | simple_pyramid.SimplePyramid


def from_options(
  options: FPNConfig | BiFPNConfig | SimplePyramidConfig,
  feature_specs: Sequence[FeatureSpec],
  *,
  dtype: Any,
  rngs: nnx.Rngs,
) -> Pyramid:
  """The pyramid of a config's section; raises ValueError as `build_neck` does."""
  fields = dataclasses.asdict(options)
  fields["num_levels"] = fields.pop("levels")
  return build_neck(fields.pop("name"), feature_specs, **fields, dtype=dtype, rngs=rngs)


def build_neck(
  name: str,
  feature_specs: Sequence[FeatureSpec],
  *,
  channels: int = 256,
  num_levels: int = 5,
  repeats: int = 1,
  separable: bool = False,
  norm: bifpn.Norm = "group",
  input_norm: bool = True,
  attention_heads: int = 0,
  dtype: DTypeLike = jnp.float32,
  rngs: nnx.Rngs,
) -> Pyramid:
  """A pyramid on the levels of a backbone.

  Args:
    name: "fpn", "bifpn" or "simple_pyramid".
    feature_specs: levels of the backbone, fine to coarse.
    channels: channels of every output level.
    num_levels: output levels.
    repeats, separable, norm: of "bifpn"; the plain FPN has no use for them.
    input_norm: a trainable LayerNorm on every level of the backbone first.
    attention_heads: heads of one more global attention block on the last level; 0 for none.
    dtype: of the computation.
    rngs: for the weights.

  Raises:
    ValueError: an unknown name, or what the neck itself refuses.
  """
  shared = dict(
    num_levels=num_levels,
    input_norm=input_norm,
    attention_heads=attention_heads,
    dtype=dtype,
    rngs=rngs,
  )
  match name:
    case "fpn":
      return fpn.FPN(feature_specs, channels, **shared)
    case "bifpn":
      return bifpn.BiFPN(feature_specs, channels, repeats=repeats, separable=separable, norm=norm, **shared)
    case "simple_pyramid":
      return simple_pyramid.SimplePyramid(feature_specs, channels, **shared)
    case _:
      raise ValueError(f"Neck {name!r} is unknown; known: {', '.join(NECKS)}.")
