"""The one evaluation loop."""

from collections.abc import Callable
import time
from typing import Any

import numpy as np

from frozen_vision.devices import sharding
from frozen_vision.metrics import gather
from frozen_vision.tasks import base


def evaluate(
  task: base.Task,
  predict: Callable[[base.Batch], Any],
  *,
  num_pictures: int = 0,
) -> tuple[dict[str, float], dict[str, np.ndarray], base.Evaluator]:
  """Runs a task's whole evaluation set; every process its share, with the metrics of all.

  Args:
    predict: a batch of this process -> predictions on all devices, cut along their first axis.
    num_pictures: how many examples of the first batch are drawn; 0 for none.

  Returns:
    (metrics, pictures, the evaluator). Metrics have `examples_per_second` besides the evaluator's own.
  """
  evaluator = task.evaluator()
  pictures: dict[str, np.ndarray] = {}
  examples, started = 0, time.perf_counter()

  def score(predictions: Any, batch: base.Batch) -> None:
    predictions = sharding.local_rows(predictions)
    evaluator.update(predictions, batch)
    if num_pictures and not pictures:
      pictures.update(task.pictures(predictions, batch, num_pictures))

  with task.eval_batches() as batches:
    waiting = None
    for batch in batches:
      predictions = predict(batch)
      if waiting is not None:
        score(*waiting)  # the host scores one batch while the device works on the next
      waiting = (predictions, batch)
      examples += int(np.sum(batch["example_valid"]))
  if waiting is not None:
    score(*waiting)
  metrics = evaluator.result()
  metrics["examples_per_second"] = sum(gather.gather_objects(examples)) / (time.perf_counter() - started)
  return metrics, pictures, evaluator
