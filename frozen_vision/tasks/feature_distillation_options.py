"""Options of feature distillation."""

import dataclasses
from typing import Literal

from frozen_vision import config
from frozen_vision.config import BackboneOptions
from frozen_vision.options import Natural, NonNegative
from frozen_vision.tasks.image_options import ImageOptions


@dataclasses.dataclass(frozen=True)
class FeatureDistillationOptions(ImageOptions):
  """The section `feature_distillation`; the student is `config.backbone`."""

  teacher: BackboneOptions = BackboneOptions()
  teacher_size: Natural = 0  # side that images are resized to for the teacher; 0: the student's
  beta: NonNegative = 2.0  # of smooth l1: below it the loss is quadratic
  # Of a student with `backbone.weights=init`. fixed: as in the released code (`initial_weights.rescaled`);
  # plain: as the backbone's family is initialised.
  initialisation: Literal["fixed", "plain"] = "fixed"


@dataclasses.dataclass(frozen=True)
class FeatureDistillationConfig(config.Config):
  """A config of task `feature_distillation`."""

  task: str = "feature_distillation"
  trainable: tuple[str, ...] = (".*",)
  feature_distillation: FeatureDistillationOptions = FeatureDistillationOptions()
