"""The tasks by name."""

import ml_collections

from frozen_vision import config as config_lib
from frozen_vision.tasks import action, base, classification, detection, segmentation

# By name: the task, and the module that has its options.
_TASKS = {
  "action": (action.ActionTask, action),
  "classification": (classification.ClassificationTask, classification),
  "detection": (detection.DetectionTask, detection),
  "segmentation": (segmentation.SegmentationTask, segmentation),
}


def build_task(config: ml_collections.ConfigDict, classes: base.Classes | None = None) -> base.Task:
  """The task of a config, with its data opened and checked.

  Args:
    classes: of a model that is trained already, or only planned; no data is looked for then.

  Raises:
    ValueError: an unknown task, or keys of the config that nothing reads; all are listed.
    FileNotFoundError: data or weights that are not where the config says.
  """
  config_lib.check(config, default_config(config.task))
  return _TASKS[config.task][0](config, classes)


def default_config(task: str) -> ml_collections.ConfigDict:
  """Every option that a config of this task has, at its default.

  Raises:
    ValueError: an unknown task.
  """
  if task not in _TASKS:
    raise ValueError(f"config.task is {task!r}; known: {', '.join(_TASKS)}.")
  config = config_lib.base_config()
  config.task = task
  config[task] = _TASKS[task][1].default_config()
  return config
