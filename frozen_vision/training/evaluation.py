"""The one evaluation loop."""

from collections.abc import Callable, Mapping
import dataclasses
import logging
import pathlib
import time
from typing import Any

import jax
import numpy as np

from frozen_vision.devices import sharding
from frozen_vision.metrics import gather
from frozen_vision.runs import log as run_log
from frozen_vision.tasks import base
from frozen_vision.training import feeds

_logger = logging.getLogger(__name__)


def evaluate(
  evaluation: base.Evaluation,
  predict: Callable[[base.Batch], Any],
  *,
  num_pictures: int = 0,
) -> tuple[dict[str, float], dict[str, np.ndarray], base.Evaluator]:
  """Runs over a whole evaluation set; every process takes its part, and all have the metrics of the whole.

  Args:
    predict: a batch of this process -> predictions on all devices, split along their first axis.
    num_pictures: how many examples of the first batch are drawn; 0 for none.

  Returns:
    (metrics, pictures, the evaluator). Metrics have `examples_per_second` besides the evaluator's own.
  """
  evaluator = evaluation.evaluator()
  pictures: dict[str, np.ndarray] = {}
  examples, started = 0, time.perf_counter()

  def score(predictions: Any, batch: base.Batch) -> None:
    predictions = sharding.local_rows(predictions)
    evaluator.update(predictions, batch)
    if num_pictures and not pictures:
      pictures.update(evaluation.pictures(predictions, batch, num_pictures))

  with evaluation.batches() as batches:
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


def evaluate_all(
  task: base.Task,
  predictions: Mapping[str, Callable[[base.Batch], base.Outputs]],
  folder: pathlib.Path,
  log: run_log.RunLog,
  step: int,
  *,
  at_end: bool,
  num_pictures: int,
  keep: Callable[[Mapping[str, float]], None] | None = None,
  cached: Mapping[str, feeds.CachedEvaluation] | None = None,
) -> dict[str, float]:
  """Runs the task's evaluations, writes results, logs the metrics, and draws pictures.

  Metrics and results of "val" stand as they are; those of another evaluation have its name before them.

  Args:
    predictions: by evaluation, for `evaluate`.
    folder: of the results.
    at_end: whether evaluations that wait for the end are run.
    num_pictures: how many examples of each evaluation are drawn, by the first process.
    keep: called with all metrics before they are logged: a step whose metrics are in the log is done with.
    cached: evaluations whose batches come with their features.
  """
  metrics: dict[str, float] = {}
  images: dict[str, np.ndarray] = {}
  for name, evaluation in task.evaluations.items():
    if evaluation.at_end_only and not at_end:
      continue
    if cached and name in cached:
      evaluation = dataclasses.replace(evaluation, batches=cached[name].batches)
    own, pictures, evaluator = evaluate(
      evaluation, predictions[name], num_pictures=num_pictures if jax.process_index() == 0 else 0
    )
    is_main = name == "val"
    evaluation.write(evaluator, folder if is_main else folder / name)
    own = own if is_main else {f"{name}/{metric}": value for metric, value in own.items()}
    images |= pictures if is_main else {f"{name}_{key}": image for key, image in pictures.items()}
    _logger.info(
      "Evaluation at step %d: %s", step, "  ".join(f"{metric} {value:.4g}" for metric, value in own.items())
    )
    metrics |= own
  if keep is not None:
    keep(metrics)
  log.scalars(step, {f"eval/{metric}": value for metric, value in metrics.items()})
  try:
    log.images(step, images)
  except OSError as error:  # a run does not end for its pictures
    _logger.warning("The pictures of step %d could not be written: %s.", step, error)
  return metrics
