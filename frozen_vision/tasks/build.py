"""The tasks by name, with the options of each."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import ml_collections

from frozen_vision import config as config_lib
from frozen_vision import options
from frozen_vision.backbones import families
from frozen_vision.config import BackboneOptions
from frozen_vision.tasks import (
  action,
  base,
  classification,
  contrastive,
  dense_regression,
  detection,
  feature_distillation,
  masked_image_modeling,
  old_options,
  segmentation,
  self_distillation,
)
from frozen_vision.tasks.action_options import ActionConfig
from frozen_vision.tasks.classification_options import ClassificationConfig
from frozen_vision.tasks.contrastive_options import ContrastiveConfig
from frozen_vision.tasks.dense_regression_options import DenseRegressionConfig
from frozen_vision.tasks.detection_options import DetectionConfig
from frozen_vision.tasks.feature_distillation_options import FeatureDistillationConfig
from frozen_vision.tasks.masked_image_modeling_options import MaskedImageModelingConfig
from frozen_vision.tasks.segmentation_options import SegmentationConfig
from frozen_vision.tasks.self_distillation_options import SelfDistillationConfig

# By name: the task, and its configs. A task from elsewhere is added here.
TASKS: dict[str, tuple[type[base.Task], type[config_lib.Config]]] = {
  "action": (action.ActionTask, ActionConfig),
  "classification": (classification.ClassificationTask, ClassificationConfig),
  "contrastive": (contrastive.ContrastiveTask, ContrastiveConfig),
  "dense_regression": (dense_regression.DenseRegressionTask, DenseRegressionConfig),
  "detection": (detection.DetectionTask, DetectionConfig),
  "feature_distillation": (feature_distillation.FeatureDistillationTask, FeatureDistillationConfig),
  "masked_image_modeling": (masked_image_modeling.MaskedImageModelingTask, MaskedImageModelingConfig),
  "segmentation": (segmentation.SegmentationTask, SegmentationConfig),
  "self_distillation": (self_distillation.SelfDistillationTask, SelfDistillationConfig),
}


def build_task(config: config_lib.ConfigLike, classes: base.Classes | None = None) -> base.Task:
  """The task of a config, with its data opened and checked.

  Args:
    config: as `read_config` takes it.
    classes: of a model that is trained already, or only planned; no data is looked for then.

  Raises:
    ValueError: an unknown task, or options that do not fit; all are listed.
    FileNotFoundError: data or weights that are not where the config says.
  """
  config = read_config(config)
  return task_class(config.task)(config, classes)


def read_config(values: config_lib.ConfigLike, *, quiet: bool = False) -> config_lib.Config:
  """The checked config of nested values: what a config file's `get_config` returns, or a run's `config.json`.

  Args:
    values: options that are not given have their defaults; old names are understood. A config is returned as
      it is.
    quiet: says nothing about old names.

  Raises:
    OptionError: an unknown task, or options that are unknown or do not fit; all are listed.
  """
  if isinstance(values, config_lib.Config):
    return values
  return read_current(old_options.translate(values, quiet=quiet))


def read_current(values: Mapping[str, Any]) -> config_lib.Config:
  """`read_config` of nested values in which options have the names that they have now."""
  return check(options.read(config_type(values.get("task", "")), values))


def check(config: config_lib.Config) -> config_lib.Config:
  """The config, if its backbone, and its teacher if it has one, have the options that it sets.

  Raises:
    OptionError: they have not.
  """
  config = dataclasses.replace(config, backbone=_checked(config.backbone, "config.backbone"))
  teacher = getattr(config.section, "teacher", None)
  if isinstance(teacher, BackboneOptions):
    teacher = _checked(teacher, f"config.{config.task}.teacher")
    config = dataclasses.replace(
      config, **{config.task: dataclasses.replace(config.section, teacher=teacher)}
    )
  return config


def _checked(backbone: BackboneOptions, path: str) -> BackboneOptions:
  """The section `path`, with `overrides` of the types that its backbone's sizes have."""
  try:
    sizes = type(families.backbone_config(backbone.name))
    overrides = options.check_values(sizes, backbone.overrides, f"{path}.overrides")
    families.backbone_config(backbone.name, **overrides)
  except options.OptionError:
    raise
  except (TypeError, ValueError) as error:
    raise options.OptionError(f"{path}: {error}") from error
  return dataclasses.replace(backbone, overrides=overrides)


def task_class(name: str) -> type[base.Task]:
  """The class of a task; raises OptionError for an unknown name."""
  config_type(name)
  return TASKS[name][0]


def config_type(task: str) -> type[config_lib.Config]:
  """The class of a task's configs; raises OptionError for an unknown task."""
  if task not in TASKS:
    raise options.OptionError(f"config.task is {task!r}; known: {', '.join(TASKS)}.")
  return TASKS[task][1]


def default_config(task: str) -> ml_collections.ConfigDict:
  """Every option of a task's configs at its default, for a config file to change; raises OptionError."""
  return config_lib.config_dict(config_type(task)())
