"""Sections that several tasks have in their configs."""

import dataclasses

from frozen_vision.options import Count, Natural, NonNegative, Path


@dataclasses.dataclass(frozen=True)
class ScenesOptions:
  """Generated scenes."""

  train_images: Count = 20000
  validation_images: Count = 200
  image_size: Count = 128


@dataclasses.dataclass(frozen=True)
class InitOptions:
  """Initial weights of neck and head from a file, in place of random ones."""

  path: Path = ""  # a file of frozen_vision.convert or of experiments/export_head.py
  keep: tuple[str, ...] = ()  # regular expressions of the paths that start at random all the same


@dataclasses.dataclass(frozen=True)
class RandAugmentOptions:
  """RandAugment of images or clips."""

  num_ops: Natural = 2  # 0: none
  magnitude: NonNegative = 9.0
  magnitude_std: NonNegative = 0.5
