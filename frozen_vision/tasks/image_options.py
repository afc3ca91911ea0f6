"""Options of tasks that train on images alone, whatever their labels."""

import dataclasses
from typing import Annotated, Literal

from frozen_vision.options import Count, Fraction, Natural, Path, Range
from frozen_vision.tasks.classification_options import ShapesOptions


@dataclasses.dataclass(frozen=True)
class ImageOptions:
  """The images of pretraining: those of classification, whose labels are not read."""

  data: Literal["files", "shapes"] = "files"  # at `train` and `validation`, or generated
  train: Path = "."  # image folder or tar archive with FOLDER/IMAGE members
  validation: Path = "."
  shapes: ShapesOptions = ShapesOptions()
  decoded_cache: bool = False  # keep all images decoded in memory; for many small ones of one size
  image_size: Count = 224  # side that the loader gives
  resized_to: Natural = 0  # side that images are resized to on the device; 0: as loaded
  # CIFAR-style shifted crops by up to so many pixels; -1: random resized
  crop_padding: Annotated[int, Range(-1)] = -1
  crop_scale: tuple[Fraction, Fraction] = (0.08, 1.0)

  @property
  def side(self) -> int:
    """Side of the images that the network sees, in pixels."""
    return self.resized_to or self.image_size
