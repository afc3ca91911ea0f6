"""Options of self-distillation."""

import dataclasses

from frozen_vision import config
from frozen_vision.options import Count, Fraction, Natural, Positive
from frozen_vision.tasks.image_options import ImageOptions


@dataclasses.dataclass(frozen=True)
class SelfDistillationOptions(ImageOptions):
  """The section `self_distillation`; defaults are those of DINO's released code, main_dino.py."""

  crop_scale: tuple[Fraction, Fraction] = (0.4, 1.0)  # of the two global crops
  blur: tuple[Fraction, Fraction] = (1.0, 0.1)  # probabilities for the two global crops
  blur_sigma: tuple[Positive, Positive] = (0.1, 2.0)  # pixels of the loaded crop
  solarise: tuple[Fraction, Fraction] = (0.0, 0.2)
  local_crops: Natural = 8
  local_size: Count = 96  # side of the local crops, as they are loaded and as the network sees them
  local_crop_scale: tuple[Fraction, Fraction] = (0.05, 0.4)
  local_blur: Fraction = 0.5
  prototypes: Count = 65536
  hidden: Count = 2048  # of the head's layers
  head_layers: Count = 3
  bottleneck: Count = 256  # channels that are compared with the prototypes
  fixed_norm: bool = True  # prototypes have length one; False: lengths of their own, which train
  student_temperature: Positive = 0.1
  teacher_temperature: Positive = 0.04
  first_teacher_temperature: Positive = 0.04  # grows linearly to the other one
  temperature_steps: Natural = 0  # within so many steps
  center_momentum: Fraction = 0.9

  def __post_init__(self):
    if self.crop_padding >= 0:
      raise ValueError(
        f"SelfDistillationOptions.crop_padding is {self.crop_padding}; expected -1: views are random crops."
      )


@dataclasses.dataclass(frozen=True)
class SelfDistillationConfig(config.Config):
  """A config of task `self_distillation`.

  The run's average is the teacher: `ema_decay` is its first momentum, which grows to 1 along half a cosine.
  """

  task: str = "self_distillation"
  trainable: tuple[str, ...] = (".*",)
  ema_decay: Fraction = 0.996
  self_distillation: SelfDistillationOptions = SelfDistillationOptions()

  def __post_init__(self):
    if self.accumulate != 1:
      raise ValueError(
        f"config.accumulate is {self.accumulate}; the center is a mean over a whole batch, so "
        "self-distillation takes 1."
      )
    if not self.ema_decay:
      raise ValueError(
        "config.ema_decay is 0; the run's average is the teacher of self-distillation: expected its "
        "momentum, such as 0.996."
      )
