"""Workdirs of runs that have not trained: a checkpoint of freshly initialised heads, as a run leaves it."""

import os

import ml_collections

from frozen_vision.freezing import prepare
from frozen_vision.runs import checkpoints as checkpoint
from frozen_vision.runs import workdir as workdir_lib
from frozen_vision.tasks import base
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import loop

# Ids of detection are others than indices, as COCO's are.
CLASSES = {
  "detection": ({"id": 3, "name": "disk"}, {"id": 7, "name": "ring"}, {"id": 8, "name": "bar"}),
  "segmentation": base.named_classes(("background", "disk", "ring")),
  "action": base.named_classes(("left", "right", "up", "down")),
  "classification": base.named_classes(("cat", "dog")),
}


def save_run(
  workdir: str | os.PathLike, config: ml_collections.ConfigDict, classes: base.Classes | None = None
) -> prepare.Model:
  """Writes `checkpoints/` of step 1 and returns the model; of `classes` None the checkpoint knows none."""
  task = tasks_build.build_task(config, classes)
  model = loop.build_model(task, config)
  state = {"trainable": model.trainable, "mutable": model.mutable}
  if config.ema_decay > 0:
    state["ema"] = model.trainable
  known = {} if classes is None else {"classes": task.classes}
  with checkpoint.Checkpoints(workdir, best_metric=task.best_metric) as checkpoints:
    checkpoints.save(
      1,
      state,
      workdir_lib.make_meta(config=config.to_dict(), feature_key=model.feature_key, examples=0, **known),
    )
  return model
