"""Options of classification."""

import dataclasses
from typing import Annotated, Literal

from frozen_vision import config
from frozen_vision.options import Count, Fraction, Natural, NonNegative, Path, Range
from frozen_vision.tasks.shared_options import RandAugmentOptions


@dataclasses.dataclass(frozen=True)
class ShapesOptions:
  """Generated images of one shape each (`data.generated.shape_images`)."""

  train_images: Count = 1200
  validation_images: Count = 300
  test_images: Natural = 300  # of probes; 0 for none
  image_size: Annotated[int, Range(32)] = 64
  seed: Natural = 0


@dataclasses.dataclass(frozen=True)
class ProbeOptions:
  """Probes of a frozen backbone's embeddings (`--mode=probe`)."""

  metric: Literal["top1", "mean_per_class"] = "top1"  # that linear classifiers are selected and tested by
  held_out: Fraction = 0.2  # of the training data, for validation where no test data are given
  neighbours: tuple[Count, ...] = (10, 20, 100, 200)
  shots: tuple[Count, ...] = (5, 20, 50)
  episodes: Count = 600


@dataclasses.dataclass(frozen=True)
class ClassificationOptions:
  """The section `classification`."""

  data: Literal["files", "shapes"] = "files"  # at `train` and `validation`, or generated
  train: Path = "."  # image folder or tar archive with CLASS/IMAGE members
  validation: Path = "."
  # Of every class in `train`, held out and taken in the place of `validation`; the same whatever the seed.
  validation_fraction: Fraction = 0.0
  test: Path = ""  # of probes; without it they test on `validation` and hold out a part of `train`
  shapes: ShapesOptions = ShapesOptions()
  probe: ProbeOptions = ProbeOptions()
  decoded_cache: bool = False  # keep all images decoded in memory; for many small ones of one size
  image_size: Count = 224  # side that the loader gives
  crop_padding: Annotated[
    int, Range(-1)
  ] = -1  # CIFAR-style shifted crops by up to so many pixels; -1: random resized
  crop_scale: tuple[Fraction, Fraction] = (0.08, 1.0)
  rand_augment: RandAugmentOptions = RandAugmentOptions()
  erasing: Fraction = 0.25
  mixup: NonNegative = 0.8
  cutmix: NonNegative = 1.0
  mix_probability: Fraction = 1.0
  label_smoothing: Fraction = 0.1
  # ((first step, side), ...): sides that images are resized to on the device, growing during the run.
  # Empty: as loaded. Evaluation uses the last.
  resolutions: tuple[tuple[Natural, Count], ...] = ()

  def __post_init__(self):
    starts = [start for start, _ in self.resolutions]
    if starts and (starts[0] != 0 or starts != sorted(set(starts))):
      raise ValueError(
        f"ClassificationOptions.resolutions is {self.resolutions}; expected growing first steps from 0."
      )


@dataclasses.dataclass(frozen=True)
class ClassificationConfig(config.Config):
  """A config of task `classification`."""

  task: str = "classification"
  classification: ClassificationOptions = ClassificationOptions()
