"""Fine-tunes a classifier over a grid: `python -m frozen_vision.main --mode=fine_tune`.

The protocol of "How Well Do Self-Supervised Models Transfer?" (arXiv 2011.13377): a run for every learning
rate and weight decay, the best on validation data, one more run with these on training and validation data
together, one test. Every run goes through the training loop, and is judged by its last step.
"""

from collections.abc import Mapping, Sequence
import logging
import math
import os
import pathlib
import shutil
from typing import Any

import jax

from frozen_vision import config as config_lib
from frozen_vision.data import fingerprint, text_files
from frozen_vision.files import atomic
from frozen_vision.runs import checkpoints, curves
from frozen_vision.runs import workdir as workdir_lib
from frozen_vision.tasks import build as tasks_build
from frozen_vision.tasks import classification
from frozen_vision.training import loop

_logger = logging.getLogger(__name__)
_RESULT = "result.json"


def fine_tune(config: config_lib.ConfigLike, folder: str | os.PathLike[str]) -> dict[str, Any]:
  """Runs the grid `classification.fine_tuning`, selects, trains once more and tests.

  Args:
    config: of task `classification`, with training, validation and test data. Its optimizer has the learning
      rate and weight decay of every run in the place of its own.
    folder: for `fine_tuning.json` and `.md`, and a workdir of every run: `grid/lr_..._wd_...`, whose
      checkpoints are removed when it is finished, and `test/lr_..._wd_...`. What is finished is not run
      again, also where the grid has become another.

  Returns:
    What `fine_tuning.json` holds; empty if a run was told to stop. The same call goes on there.

  Raises:
    ValueError: a config of another task, no test data, or a folder with results of another config.
    FloatingPointError: every run of the grid diverged.
  """
  config, folder = tasks_build.read_config(config), pathlib.Path(folder)
  if jax.process_count() > 1:
    raise ValueError("Grids of fine-tuning run in one process; start the command without --distributed.")
  data = _check(config)
  metric, grid = config.classification.score, config.classification.fine_tuning
  rows = []
  for rate in grid.learning_rates:
    for decay in grid.weight_decays:
      run = point(config, rate, decay)
      where = folder / "grid" / run_name(rate, decay)
      result = _result(run, where, data, is_kept=False)
      if result is None:
        return {}
      score = result["metrics"].get(metric)
      _logger.info("Learning rate %g, weight decay %g: %s.", rate, decay, _words(score))
      rows.append({"learning_rate": rate, "weight_decay": decay, "validation": score})
  best = select(rows)
  if best is None:
    raise FloatingPointError(
      "Every run of the grid diverged; give lower ones in config.classification.fine_tuning.learning_rates."
    )
  final = point(config, best["learning_rate"], best["weight_decay"])
  final = final.replace({"classification.refit": True})
  tested = folder / "test" / run_name(best["learning_rate"], best["weight_decay"])
  result = _result(final, tested, data, is_kept=True)
  if result is None:
    return {}
  metrics = result["metrics"]
  found = {
    "backbone": {"name": config.backbone.name, "weights": config.backbone.weights},
    "seed": config.seed,
    "steps": config.steps,
    "metric": metric,
    "grid": rows,
    "selected": best,
    "at_edge_of_grid": at_edge(best, grid.learning_rates, grid.weight_decays),
    "test": metrics.get(metric),
    "test_metrics": metrics,
    "test_workdir": tested.relative_to(folder).as_posix(),
  }
  text = to_markdown(found)
  atomic.write_json(folder / "fine_tuning.json", found, indent=1)
  atomic.write_text(folder / "fine_tuning.md", text)
  _logger.info("Written: %s and fine_tuning.json.\n%s", folder / "fine_tuning.md", text)
  return found


def point(config: config_lib.Config, rate: float, decay: float) -> config_lib.Config:
  """The run of one learning rate and weight decay of the grid."""
  return config.replace({"optimizer.learning_rate": rate, "optimizer.weight_decay": decay / rate})


def run_name(rate: float, decay: float) -> str:
  """The folder of a run: of its own, however little it differs from another."""
  texts = (short if float(short := f"{value:g}") == value else repr(value) for value in (rate, decay))
  return "lr_{}_wd_{}".format(*texts)


def select(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
  """The first of the best rows on validation data; None if all diverged."""
  finished = [row for row in rows if row["validation"] is not None]
  return max(finished, key=lambda row: row["validation"], default=None)  # the first of equals


def at_edge(best: Mapping[str, Any], rates: Sequence[float], decays: Sequence[float]) -> bool:
  """Whether a grid that goes further might hold a better pair; there is no weight decay below 0."""
  ends = []
  for value, values in ((best["learning_rate"], rates), (best["weight_decay"], decays)):
    if len(values) > 1:
      ends.append(value == max(values) or (value == min(values) and value > 0))
  return any(ends)


def _check(config: config_lib.Config) -> dict[str, Any]:
  """The fingerprints of all data, after a look at whether they suffice."""
  if config.task != "classification":
    raise ValueError(
      f"Fine-tuning needs labels for whole images; config.task is {config.task!r}. "
      "Take a config of task 'classification', such as configs/fine_tuning.py."
    )
  if config.classification.refit:
    raise ValueError(
      "config.classification.refit is True, but --mode=fine_tune selects on validation data before; "
      "expected False."
    )
  task = tasks_build.build_task(config)
  assert isinstance(task, classification.ClassificationTask)
  if "test" not in task.parts:
    raise ValueError(
      "There are no test data, and those that a run is selected on cannot test it; give "
      "--config.classification.test=FOLDER."
    )
  return {part: fingerprint.of_source(source) for part, source in task.parts.items()}


def _result(
  run: config_lib.Config, where: pathlib.Path, data: dict[str, Any], *, is_kept: bool
) -> dict[str, Any] | None:
  """The last evaluation of a run, trained where it is not finished yet; None if it was told to stop."""
  path = where / _RESULT
  if path.is_file():
    return _kept(path, run, data)
  try:
    loop.train(run, where)
    metrics = curves.evaluation_at(where / "metrics.jsonl", run.steps)
    if not metrics:
      _logger.info("The run in %s was told to stop; the same command goes on there.", where)
      return None
  except FloatingPointError as error:
    _logger.warning("%s: %s", where.name, error)
    metrics = {}
  result = {"identity": {"config": run.to_dict(), "data": data}, "metrics": metrics}
  atomic.write_json(path, result, indent=1)
  if not is_kept:
    for name in checkpoints.FOLDERS:
      shutil.rmtree(where / name, ignore_errors=True)
  return result


def _kept(path: pathlib.Path, run: config_lib.Config, data: dict[str, Any]) -> dict[str, Any]:
  """The result of a finished run, if it is of the same config and data."""
  found = text_files.read_json(path)
  try:
    found_config, found_data = found["identity"]["config"], found["identity"]["data"]
    found["metrics"].get
  except (AttributeError, KeyError, TypeError) as error:
    raise ValueError(f"{path} is no result of a run; remove {path.parent} to train it again.") from error
  workdir_lib.check_config(
    tasks_build.read_config(found_config, quiet=True).to_dict(),
    workdir_lib.to_json(run.to_dict(), "config"),
    f"{path.parent} holds the result of another config",
    ignore=loop.FREE_OPTIONS,
  )
  if differing := fingerprint.changed(found_data, data):
    raise ValueError(
      f"{path.parent} holds the result of other {' and '.join(differing)} data; use another --workdir, or "
      "remove it to train on these."
    )
  return found


def _words(score: float | None) -> str:
  return "diverged" if score is None or not math.isfinite(score) else f"{score:.4f}"


def to_markdown(found: Mapping[str, Any]) -> str:
  """The grid and the test as Markdown."""
  backbone, best = found["backbone"], found["selected"]
  decays = list(dict.fromkeys(row["weight_decay"] for row in found["grid"]))
  lines = [
    f"# {backbone['name']} ({backbone['weights']}), fine-tuned",
    "",
    f"{found['steps']:,} steps, seed {found['seed']}; {found['metric']} on validation data:",
    "",
    f"| learning rate | {' | '.join(f'weight decay {decay:g}' for decay in decays)} |",
    "|---" * (len(decays) + 1) + "|",
  ]
  for rate in dict.fromkeys(row["learning_rate"] for row in found["grid"]):
    scores = [_words(row["validation"]) for row in found["grid"] if row["learning_rate"] == rate]
    lines.append(f"| {rate:g} | {' | '.join(scores)} |")
  edge = ", at the edge of the grid: a wider one may hold better ones" if found["at_edge_of_grid"] else ""
  return "\n".join(
    [
      *lines,
      "",
      "A weight decay is what a step at the full learning rate takes away of a parameter.",
      "",
      f"Selected: learning rate {best['learning_rate']:g}, weight decay {best['weight_decay']:g}{edge}.",
      "",
      f"Trained with them on training and validation data, {found['metric']} on test data: "
      f"{_words(found['test'])}.",
      "",
    ]
  )
