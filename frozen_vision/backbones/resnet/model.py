"""ResNet: v1.5, SimCLR's wide ones, and ResNet-RS.

v1.5 is torchvision's form, with the stride on the 3 x 3 convolution of a bottleneck. ResNet-RS adds a stem of
three 3 x 3 convolutions, a strided convolution in the place of the max-pool, an average pool before the
shortcut's convolution (ResNet-D) and squeeze-and-excitation in every block.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Float

from frozen_vision.backbones import base, convolutional
from frozen_vision.backbones.convolutional import Layers
from frozen_vision.layers import convolution as conv_lib
from frozen_vision.layers.activations import ACTIVATIONS
from frozen_vision.layers.convolution import ConvSpec
from frozen_vision.ops import convolution as conv_ops
from frozen_vision.ops.arrays import Array

_EXPANSION = 4


@dataclasses.dataclass(frozen=True)
class ResNetConfig(convolutional.ConvConfig):
  """Shape of a ResNet.

  Attributes:
    depths: blocks per stage, at strides 4 to 32.
    bottleneck: blocks of 1 x 1, 3 x 3, 1 x 1 with four times the width at their end; else two 3 x 3.
    width: channels of the stem's output and inner channels of the first stage; they double at every stage.
    deep_stem: three 3 x 3 convolutions in the place of one 7 x 7.
    pool_by_convolution: a strided 3 x 3 convolution in the place of the max-pool.
    pooled_shortcut: an average pool and a 1 x 1 convolution where a shortcut has a stride (ResNet-D).
    pool_every_shortcut: `pooled_shortcut` likewise where a shortcut has a convolution and no stride, over
      windows of 2 x 2 that overlap. TensorFlow's Model Garden has it, timm not.
    squeeze: channels of squeeze-and-excitation as a fraction of the block's; 0 for none.
    activation: `relu` or `swish`.
  """

  depths: tuple[int, ...]
  bottleneck: bool = True
  width: int = 64
  deep_stem: bool = False
  pool_by_convolution: bool = False
  pooled_shortcut: bool = False
  pool_every_shortcut: bool = False
  squeeze: float = 0.0
  activation: str = "relu"

  weightless: ClassVar[tuple[str, ...]] = (
    *convolutional.ConvConfig.weightless,
    "activation",
    "pool_every_shortcut",
  )

  def __post_init__(self):
    super().__post_init__()
    if self.activation not in ACTIVATIONS:
      raise ValueError(f"ResNetConfig.activation is {self.activation!r}; known: {', '.join(ACTIVATIONS)}.")

  @property
  def feature_specs(self) -> tuple[base.FeatureSpec, ...]:
    finest = (base.FeatureSpec(2, self.width),) if self.stem_is_a_level else ()
    stages = tuple(
      base.FeatureSpec(4 * 2**stage, self.stage_channels(stage)) for stage in range(len(self.depths))
    )
    return finest + stages

  @property
  def levels(self) -> tuple[int, ...]:
    return tuple(range(len(self.depths)))

  @property
  def stem_is_a_level(self) -> bool:
    return self.finest_stride == 2

  def stage_depths(self) -> tuple[int, ...]:
    return self.depths

  def stage_channels(self, stage: int) -> int:
    return self.width * 2**stage * (_EXPANSION if self.bottleneck else 1)

  def stem(self) -> dict[str, ConvSpec]:
    """The convolutions before the first stage, by name and in order."""
    if not self.deep_stem:
      specs = {"conv1": ConvSpec(3, self.width, 7, strides=2)}
    else:
      half = self.width // 2
      specs = {
        "conv1": ConvSpec(3, half, 3, strides=2),
        "conv2": ConvSpec(half, half, 3),
        "conv3": ConvSpec(half, self.width, 3),
      }
    if self.pool_by_convolution:
      specs["pool"] = ConvSpec(self.width, self.width, 3, strides=2)
    return specs

  def block(self, stage: int, index: int) -> dict[str, ConvSpec]:
    """The convolutions of a block by name."""
    outputs, inner = self.stage_channels(stage), self.width * 2**stage
    first = self.width if stage == 0 else self.stage_channels(stage - 1)
    inputs = first if index == 0 else outputs
    strides = 2 if index == 0 and stage > 0 else 1
    if self.bottleneck:
      specs = {
        "conv1": ConvSpec(inputs, inner),
        "conv2": ConvSpec(inner, inner, 3, strides=strides),
        "conv3": ConvSpec(inner, outputs),
      }
    else:
      specs = {"conv1": ConvSpec(inputs, inner, 3, strides=strides), "conv2": ConvSpec(inner, outputs, 3)}
    if self.squeeze:
      fewer = int(outputs * self.squeeze)
      specs["squeeze"] = ConvSpec(outputs, fewer, norm=False)
      specs["excite"] = ConvSpec(fewer, outputs, norm=False)
    if strides > 1 or inputs != outputs:
      pooled = self.pooled_shortcut and strides > 1
      specs["shortcut"] = ConvSpec(inputs, outputs, strides=1 if pooled else strides)
    return specs

  def run_stem(
    self, images: Float[Array, "b h w 3"], layers: Layers
  ) -> tuple[Float[Array, "b _h _w _c"], Float[Array, "b _h2 _w2 _c2"]]:
    activation = ACTIVATIONS[self.activation]
    x = images
    for name in self.stem():
      if name != "pool":
        x = activation(layers(name, x))
    if self.pool_by_convolution:
      return x, activation(layers("pool", x))
    padding = "SAME" if self.same_padding else 1
    return x, conv_ops.max_pool(x, size=3, strides=2, padding=padding)

  def run_block(
    self,
    x: Float[Array, "b _h _w _c"],
    layers: Layers,
    specs: Mapping[str, ConvSpec],
    drop: Callable[[Array], Array],
  ) -> Float[Array, "b _h2 _w2 _c2"]:
    activation = ACTIVATIONS[self.activation]
    y = activation(layers("conv1", x))
    y = layers("conv2", y)
    if self.bottleneck:
      y = layers("conv3", activation(y))
    if self.squeeze:
      y = conv_lib.squeeze_excite(y, lambda z: layers("squeeze", z), lambda z: layers("excite", z), nnx.relu)
    if "shortcut" in specs:
      strides = max(spec.strides for spec in specs.values())
      if self.pooled_shortcut and (strides > 1 or self.pool_every_shortcut):
        x = conv_ops.average_pool(x, size=2, strides=strides)
      x = layers("shortcut", x)
    return activation(x + drop(y))


def _rs(*depths: int) -> ResNetConfig:
  """ResNet-RS as timm has it."""
  return ResNetConfig(depths, deep_stem=True, pool_by_convolution=True, pooled_shortcut=True, squeeze=0.25)


# SimCLR was trained on RGB in 0..1 as it is; a resnet50 of its first version needs these as overrides.
SIMCLR_IMAGES = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
# Depths of 18 to 152: arXiv 1512.03385, table 1. _x2 and _x4: SimCLR's, all widths times 2 and 4.
# RS: arXiv 2103.07579, table 7 of its appendix, as timm's `resnetrs*`.
VARIANTS: dict[str, ResNetConfig] = {
  "resnet18": ResNetConfig((2, 2, 2, 2), bottleneck=False),
  "resnet34": ResNetConfig((3, 4, 6, 3), bottleneck=False),
  "resnet50": ResNetConfig((3, 4, 6, 3)),
  "resnet101": ResNetConfig((3, 4, 23, 3)),
  "resnet152": ResNetConfig((3, 8, 36, 3)),
  "resnet50_x2": ResNetConfig((3, 4, 6, 3), width=128, **SIMCLR_IMAGES),
  "resnet50_x4": ResNetConfig((3, 4, 6, 3), width=256, **SIMCLR_IMAGES),
  "resnet_rs50": _rs(3, 4, 6, 3),
  "resnet_rs101": _rs(3, 4, 23, 3),
  "resnet_rs152": _rs(3, 8, 36, 3),
  "resnet_rs200": _rs(3, 24, 36, 3),
  "resnet_rs270": _rs(4, 29, 53, 4),
  "resnet_rs350": _rs(4, 36, 72, 4),
  "resnet_rs420": _rs(4, 44, 87, 4),
}


class ResNet(convolutional.ConvBackbone):
  """A ResNet without its classifier; calling it gives the output of every stage."""

  config: ResNetConfig

  def feature_options(self) -> Mapping[str, Any]:
    config = self.config  # what else changes features changes the shapes of weights too
    return {
      **super().feature_options(),
      "activation": config.activation,
      "pooled_shortcut": config.pooled_shortcut,
      **({"pool_every_shortcut": True} if config.pool_every_shortcut else {}),
    }
