"""The tasks by name."""

from collections.abc import Callable

import ml_collections

from frozen_vision import config as config_lib
from frozen_vision.tasks import action, base, classification, detection, segmentation

# By name: the task, and its own options at their defaults. A task from elsewhere is added here.
TASKS: dict[str, tuple[type[base.Task], Callable[[], ml_collections.ConfigDict]]] = {
  "action": (action.ActionTask, action.default_config),
  "classification": (classification.ClassificationTask, classification.default_config),
  "detection": (detection.DetectionTask, detection.default_config),
  "segmentation": (segmentation.SegmentationTask, segmentation.default_config),
}


def task_class(name: str) -> type[base.Task]:
  """The class of a task.

  Raises:
    ValueError: an unknown name.
  """
  if name not in TASKS:
    raise ValueError(f"config.task is {name!r}; known: {', '.join(TASKS)}.")
  return TASKS[name][0]


def build_task(config: ml_collections.ConfigDict, classes: base.Classes | None = None) -> base.Task:
  """The task of a config, with its data opened and checked.

  Args:
    classes: of a model that is trained already, or only planned; no data is looked for then.

  Raises:
    ValueError: an unknown task, or keys of the config that nothing reads; all are listed.
    FileNotFoundError: data or weights that are not where the config says.
  """
  config_lib.check(config, default_config(config.task))
  return task_class(config.task)(config, classes)


def default_config(task: str) -> ml_collections.ConfigDict:
  """Every option that a config of this task has, at its default.

  Raises:
    ValueError: an unknown task.
  """
  task_class(task)
  config = config_lib.base_config()
  config.task = task
  config[task] = TASKS[task][1]()
  return config
