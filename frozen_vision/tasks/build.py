"""The tasks by name."""

import ml_collections

from frozen_vision import config as config_lib
from frozen_vision.tasks import action, base, classification, detection, segmentation


def build_task(config: ml_collections.ConfigDict) -> base.Task:
  """The task of a config, with its data opened and checked.

  Raises:
    ValueError: an unknown task, or keys of the config that nothing reads; all are listed.
    FileNotFoundError: data or weights that are not where the config says.
  """
  known = config_lib.base_config()
  match config.task:
    case "action":
      known.action = action.default_config()
      make = action.ActionTask
    case "classification":
      known.classification = classification.default_config()
      make = classification.ClassificationTask
    case "detection":
      known.detection = detection.default_config()
      make = detection.DetectionTask
    case "segmentation":
      known.segmentation = segmentation.default_config()
      make = segmentation.SegmentationTask
    case other:
      raise ValueError(f"config.task is {other!r}; known: action, classification, detection, segmentation.")
  config_lib.check(config, known)
  return make(config)
