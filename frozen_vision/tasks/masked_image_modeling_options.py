"""Options of masked image modeling."""

import dataclasses
from typing import Annotated, Literal

from frozen_vision import config
from frozen_vision.options import Count, Fraction, Range
from frozen_vision.tasks.image_options import ImageOptions


@dataclasses.dataclass(frozen=True)
class MaskedImageModelingOptions(ImageOptions):
  """The section `masked_image_modeling`."""

  image_size: Count = 192
  crop_scale: tuple[Fraction, Fraction] = (0.67, 1.0)
  mask_patch: Count = 32  # side of what is masked together, in pixels
  mask_ratio: Fraction = 0.6  # of the patches, rounded up
  # Odd side, 3 at least, of the window by whose mean and deviation target pixels are normalised; 0: none.
  target_window: Annotated[int, Range(0)] = 47
  # Of a backbone with `backbone.weights=init`. fixed: as SimMIM's ViTs begin (`initial_weights.rescaled`);
  # plain: as the backbone's family is initialised, which is SimMIM's way for SwinV2.
  initialisation: Literal["fixed", "plain"] = "plain"

  def __post_init__(self):
    if self.side % self.mask_patch:
      raise ValueError(
        f"MaskedImageModelingOptions.mask_patch is {self.mask_patch}, and images have a side of {self.side} "
        "pixels; expected a whole number of patches."
      )
    if self.target_window and (self.target_window % 2 == 0 or self.target_window < 3):
      raise ValueError(
        f"MaskedImageModelingOptions.target_window is {self.target_window}; expected an odd number "
        "from 3 on, or 0."
      )


@dataclasses.dataclass(frozen=True)
class MaskedImageModelingConfig(config.Config):
  """A config of task `masked_image_modeling`."""

  task: str = "masked_image_modeling"
  trainable: tuple[str, ...] = (".*",)
  masked_image_modeling: MaskedImageModelingOptions = MaskedImageModelingOptions()
