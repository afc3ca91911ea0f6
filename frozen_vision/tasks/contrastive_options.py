"""Options of contrastive pretraining."""

import dataclasses

from frozen_vision import config
from frozen_vision.options import Count, Fraction, Positive
from frozen_vision.tasks.image_options import ImageOptions


@dataclasses.dataclass(frozen=True)
class ContrastiveOptions(ImageOptions):
  """The section `contrastive`; defaults, inherited ones too, are MoCo v3's for ViTs."""

  blur: tuple[Fraction, Fraction] = (1.0, 0.1)  # probabilities for the two views
  blur_sigma: tuple[Positive, Positive] = (0.1, 2.0)  # pixels of the loaded image
  solarise: tuple[Fraction, Fraction] = (0.0, 0.2)
  channels: Count = 256  # of the vectors that are compared
  hidden: Count = 4096  # of projector and predictor
  projector_layers: Count = 3
  temperature: Positive = 0.2
  momentum: Fraction = 0.99  # of the momentum encoder at first; it grows to 1 along a half cosine

  def __post_init__(self):
    if self.crop_padding >= 0:
      raise ValueError(
        f"ContrastiveOptions.crop_padding is {self.crop_padding}; expected -1: views are random crops."
      )


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig(config.Config):
  """A config of task `contrastive`."""

  task: str = "contrastive"
  trainable: tuple[str, ...] = (".*",)
  contrastive: ContrastiveOptions = ContrastiveOptions()

  def __post_init__(self):
    if self.accumulate != 1:
      raise ValueError(
        f"config.accumulate is {self.accumulate}; images are told apart from the others of a whole batch, so "
        "contrastive pretraining takes 1."
      )
