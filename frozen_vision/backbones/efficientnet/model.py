"""EfficientNet (B0 to B7, padded as TensorFlow or torchvision does) and EfficientNet-Lite."""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import ClassVar

from flax import nnx
from jaxtyping import Float

from frozen_vision.backbones import base, convolutional
from frozen_vision.backbones.convolutional import Layers
from frozen_vision.layers import convolution as conv_lib
from frozen_vision.layers.activations import ACTIVATIONS
from frozen_vision.layers.convolution import ConvSpec
from frozen_vision.ops.arrays import Array

_DIVISOR = 8


@dataclasses.dataclass(frozen=True)
class StageSpec:
  """A run of blocks of B0: its length, kernel, stride, expansion and channels (arXiv 1905.11946, table 1)."""

  repeats: int
  size: int
  strides: int
  expansion: int
  channels: int


_STAGES = (
  StageSpec(1, 3, 1, 1, 16),
  StageSpec(2, 3, 2, 6, 24),
  StageSpec(2, 5, 2, 6, 40),
  StageSpec(3, 3, 2, 6, 80),
  StageSpec(3, 5, 1, 6, 112),
  StageSpec(4, 5, 2, 6, 192),
  StageSpec(1, 3, 1, 6, 320),
)
_STEM, _HEAD = 32, 1280


@dataclasses.dataclass(frozen=True)
class EfficientNetConfig(convolutional.ConvConfig):
  """Shape of an EfficientNet.

  Attributes:
    width, depth: what B0's channels and repeats are multiplied by.
    lite: EfficientNet-Lite: no squeeze-and-excitation, ReLU6; the widths of stem and head and the repeats of
      the first and last stage are not scaled.
  """

  width: float = 1.0
  depth: float = 1.0
  lite: bool = False

  norm_momentum: ClassVar[float] = 0.01

  @property
  def activation(self) -> str:
    return "relu6" if self.lite else "swish"

  @property
  def stages(self) -> tuple[StageSpec, ...]:
    """The stages with this network's repeats and channels."""
    scaled = []
    for index, stage in enumerate(_STAGES):
      fixed = self.lite and index in (0, len(_STAGES) - 1)
      repeats = stage.repeats if fixed else math.ceil(stage.repeats * self.depth)
      scaled.append(dataclasses.replace(stage, repeats=repeats, channels=self._scaled(stage.channels)))
    return tuple(scaled)

  def stage_depths(self) -> tuple[int, ...]:
    return tuple(stage.repeats for stage in self.stages)

  @property
  def stem_channels(self) -> int:
    return _STEM if self.lite else self._scaled(_STEM)

  @property
  def head_channels(self) -> int:
    return _HEAD if self.lite else self._scaled(_HEAD)

  @property
  def levels(self) -> tuple[int, ...]:
    """The stages whose outputs are feature levels: the last one at each stride."""
    strides = [stage.strides for stage in self.stages[1:]] + [2]
    last = tuple(index for index, following in enumerate(strides) if following == 2)
    return last if self.finest_stride == 2 else last[1:]

  @property
  def feature_specs(self) -> tuple[base.FeatureSpec, ...]:
    strides = [2 * math.prod(s.strides for s in self.stages[: index + 1]) for index in self.levels]
    return tuple(
      base.FeatureSpec(stride, self.stages[index].channels)
      for stride, index in zip(strides, self.levels, strict=True)
    )

  def stem(self) -> dict[str, ConvSpec]:
    return {"conv": ConvSpec(3, self.stem_channels, 3, strides=2)}

  def head(self) -> dict[str, ConvSpec]:
    """The convolution whose pooled output is the embedding."""
    return {"conv": ConvSpec(self.stages[-1].channels, self.head_channels)}

  def block(self, stage: int, index: int) -> dict[str, ConvSpec]:
    """The convolutions of a block by name."""
    spec = self.stages[stage]
    before = self.stem_channels if stage == 0 else self.stages[stage - 1].channels
    inputs = before if index == 0 else spec.channels
    inner = inputs * spec.expansion
    strides = spec.strides if index == 0 else 1
    specs = {}
    if spec.expansion > 1:
      specs["expand"] = ConvSpec(inputs, inner)
    specs["depthwise"] = ConvSpec(inner, inner, spec.size, strides=strides, groups=inner)
    if not self.lite:
      fewer = max(1, inputs // 4)  # a quarter of the block's input, not of the expanded channels
      specs["squeeze"] = ConvSpec(inner, fewer, norm=False)
      specs["excite"] = ConvSpec(fewer, inner, norm=False)
    specs["project"] = ConvSpec(inner, spec.channels)
    return specs

  def run_stem(
    self, images: Float[Array, "b h w 3"], layers: Layers
  ) -> tuple[Float[Array, "b _h _w _c"], Float[Array, "b _h2 _w2 _c2"]]:
    x = ACTIVATIONS[self.activation](layers("conv", images))
    return x, x

  def run_block(
    self,
    x: Float[Array, "b _h _w _c"],
    layers: Layers,
    specs: Mapping[str, ConvSpec],
    drop: Callable[[Array], Array],
  ) -> Float[Array, "b _h2 _w2 _c2"]:
    activation = ACTIVATIONS[self.activation]
    y = activation(layers("expand", x)) if "expand" in specs else x
    y = activation(layers("depthwise", y))
    if "squeeze" in specs:
      y = conv_lib.squeeze_excite(y, lambda z: layers("squeeze", z), lambda z: layers("excite", z), nnx.silu)
    y = layers("project", y)
    residual = specs["depthwise"].strides == 1 and x.shape[-1] == specs["project"].outputs
    return x + drop(y) if residual else y

  def run_head(self, x: Float[Array, "b h w _c"], layers: Layers) -> Float[Array, "b h w _d"]:
    return ACTIVATIONS[self.activation](layers("conv", x))

  def _scaled(self, channels: int) -> int:
    """Channels times the width, as a multiple of 8 that is at most a tenth below."""
    scaled = channels * self.width
    rounded = max(_DIVISOR, int(scaled + _DIVISOR / 2) // _DIVISOR * _DIVISOR)
    return rounded + _DIVISOR if rounded < 0.9 * scaled else rounded


_TF = dict(same_padding=True, norm_epsilon=1e-3)
_LITE = dict(_TF, lite=True, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
_SCALES = ((1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8), (1.6, 2.2), (1.8, 2.6), (2.0, 3.1))
# Widths and depths: the released models. `tf_` rows pad as TensorFlow does, as the original weights need; the
# others are torchvision's and timm's, padded symmetrically. Lite's images are (x - 127) / 128 of 0..255.
VARIANTS: dict[str, EfficientNetConfig] = (
  {f"tf_efficientnet_b{i}": EfficientNetConfig(*scale, **_TF) for i, scale in enumerate(_SCALES)}
  | {
    f"efficientnet_b{i}": EfficientNetConfig(*scale, norm_epsilon=1e-5 if i < 5 else 1e-3)
    for i, scale in enumerate(_SCALES)
  }
  | {f"efficientnet_lite{i}": EfficientNetConfig(*scale, **_LITE) for i, scale in enumerate(_SCALES[:5])}
)


class EfficientNet(convolutional.ConvBackbone):
  """An EfficientNet without its classifier; `embed` pools the last convolution's output."""

  config: EfficientNetConfig

  @property
  def embed_dim(self) -> int:
    return self.config.head_channels
