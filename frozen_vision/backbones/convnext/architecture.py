"""Shapes of ConvNeXts (arXiv 2201.03545), of Meta's classifiers and of DINOv3."""

from collections.abc import Sequence
import dataclasses
from typing import ClassVar

from jaxtyping import Float

from frozen_vision.backbones import base
from frozen_vision.layers.convolution import ConvSpec
from frozen_vision.ops.arrays import Array

NORM_EPSILON = 1e-6
_KERNEL = 7


@dataclasses.dataclass(frozen=True)
class ConvNeXtConfig(base.BackboneConfig):
  """Shape of a ConvNeXt.

  Attributes:
    depths: blocks per stage, at strides 4 to 32.
    channels: of each stage.
    layer_scale: initial factor of every residual branch.
    drop_path_rate: stochastic depth of the last block, growing linearly from 0; used only with `rng`.
    mean, std: of RGB values in 0..1 that the weights expect.
  """

  depths: tuple[int, ...]
  channels: tuple[int, ...]
  layer_scale: float = 1e-6
  drop_path_rate: float = 0.0
  mean: tuple[float, float, float] = base.IMAGENET_MEAN
  std: tuple[float, float, float] = base.IMAGENET_STD

  weightless: ClassVar[tuple[str, ...]] = ("layer_scale", "drop_path_rate", "mean", "std")

  def __post_init__(self):
    if len(self.depths) != len(self.channels):
      raise ValueError(
        f"ConvNeXtConfig.channels = {self.channels} has {len(self.channels)} entries; depths = {self.depths} "
        "asks for one per stage."
      )

  @property
  def feature_specs(self) -> tuple[base.FeatureSpec, ...]:
    return tuple(base.FeatureSpec(4 * 2**stage, channels) for stage, channels in enumerate(self.channels))

  def depthwise(self, stage: int) -> ConvSpec:
    channels = self.channels[stage]
    return ConvSpec(channels, channels, _KERNEL, groups=channels, norm=False)


_SIZES = {
  "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
  "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
  "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
  "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
  "xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
}
# T to XL: arXiv 2201.03545, table 9 and its text; DINOv3's T to L have the same sizes (its hub/backbones.py).
VARIANTS: dict[str, ConvNeXtConfig] = {
  f"convnext_{name}": ConvNeXtConfig(*sizes) for name, sizes in _SIZES.items()
} | {f"dinov3_convnext_{name}": ConvNeXtConfig(*_SIZES[name]) for name in ("tiny", "small", "base", "large")}


def cropped(
  features: Sequence[Float[Array, "b _h _w _c"]], size: tuple[int, int], specs: Sequence[base.FeatureSpec]
) -> tuple[Float[Array, "b _h _w _c"], ...]:
  """Maps of a padded image without the cells that lie wholly in the padding."""
  height, width = size
  return tuple(
    x[:, : -(-height // spec.stride), : -(-width // spec.stride)]
    for x, spec in zip(features, specs, strict=True)
  )
