"""Runs one cell of a report to its end, and writes what the page needs of it."""

import dataclasses
import logging
import math
import pathlib
import time
from typing import Any

import jax
import numpy as np

from frozen_vision import failures, fine_tune, probe
from frozen_vision.config import Config
from frozen_vision.data import content, fingerprint
from frozen_vision.files import atomic, lock
from frozen_vision.freezing import prepare
from frozen_vision.report import card, cells, examples, recipes
from frozen_vision.runs import curves
from frozen_vision.tasks import base
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import loop

_logger = logging.getLogger(__name__)
# Exit statuses of a process that runs one cell: it was told to stop (EX_TEMPFAIL: try again), and another
# process is running the cell.
INTERRUPTED = 75
LOCKED = 76


class Interrupted(RuntimeError):
  """A run was told to stop before its end; what it saved is continued by the same command."""


def run(plan: cells.Plan, cell: cells.Cell) -> cells.Found:
  """Runs a cell, or continues it; a finished one is left as it is.

  What goes wrong is left in `error.json`, for the page, and raised.

  Raises:
    ValueError: a stale cell; and whatever the run raises.
    LockedError: another process is running it.
    Interrupted: the run was told to stop.
  """
  found = cells.look(plan, cell)
  if found.state == "finished":
    return found
  if found.state == "stale":
    raise ValueError(f"{cell.name}: {found.reason}.")
  folder = plan.folder(cell)
  with lock.hold(folder / ".cell.lock", f"the cell {cell.name}"):
    (folder / "error.json").unlink(missing_ok=True)  # of an earlier try
    try:
      _run(plan, cell, folder)
    except (Interrupted, KeyboardInterrupt, lock.LockedError):
      raise
    except Exception as error:
      reason = failures.sentence(error) or f"{type(error).__name__}: {error}"
      atomic.write_json(folder / "error.json", {"error": reason})
      raise
  return cells.look(plan, cell)


def _run(plan: cells.Plan, cell: cells.Cell, folder: pathlib.Path) -> None:
  wanted = plan.fingerprint(cell)
  started = time.perf_counter()
  if cell.recipe == cells.CARD:
    details = card.make(cell.entry)
    cells.finish(plan, cell, fingerprint=wanted, scores={}, examples={}, data={}, details=details)
    return
  recipe, config = plan.known[cell.recipe], plan.config(cell)
  continued = (folder / "config.json").exists()
  run_cell = {"train": _train, "probe": _probe, "fine_tune": _fine_tune}[recipe.kind]
  scores, of_examples, data, details = run_cell(recipe, config, folder)
  # A run that was begun before took longer than this process knows.
  details |= {"seconds": None if continued else time.perf_counter() - started}
  cells.finish(
    plan, cell, fingerprint=wanted, scores=scores, examples=of_examples, data=data, details=details
  )


Outcome = tuple[dict[str, float], dict[str, np.ndarray], dict[str, str], dict[str, Any]]


def _train(recipe: recipes.Recipe, config: Config, folder: pathlib.Path) -> Outcome:
  """(scores, examples, data, details) of a head that is trained, from the files of its run."""
  loop.train(config, folder)
  log = folder / "metrics.jsonl"
  final = curves.evaluation_at(log, config.steps)
  if not final:
    raise Interrupted(f"The run in {folder} was told to stop.")
  series = curves.read_metrics(log)
  task = tasks_build.build_task(config)
  rows = [row.name for row in recipe.rows]
  # -1 is COCO's word for a number without an object; boxes alone have no mask AP.
  scores = {row: final[row] for row in rows if final.get(row, -1.0) >= 0}
  of_examples = examples.of_run(task, config.task, folder)
  identity = _identity(task, "validation")
  details = {
    "trained_parameters": _trained_parameters(task, config),
    "steps": config.steps,
    "batch_size": config.batch_size,
    "optimizer": config.optimizer.name,
    "learning_rate": config.optimizer.learning_rate,
    "test_examples": len(task.data["validation"]),
    "stride": config.backbone.overrides.get("stride"),
    "curves": {key: series[key] for key in ("train/loss",) if key in series},
    "metrics": final,
  }
  of_rows = {row: of_examples[row] for row in scores if row in of_examples}
  return scores, of_rows, dict.fromkeys(scores, identity), details


def _probe(recipe: recipes.Recipe, config: Config, folder: pathlib.Path) -> Outcome:
  """The same of the probes of a backbone's embeddings.

  Seeds of one backbone have one cache of embeddings; while another seed writes to it, they are computed here.
  """
  del recipe
  try:
    found = probe.probe(config, folder)
  except lock.LockedError as error:
    _logger.warning("%s The embeddings are computed here, too.", error)
    config = dataclasses.replace(config, cache=dataclasses.replace(config.cache, path=""))
    found = probe.probe(config, folder)
  task = tasks_build.build_task(config)
  identity = _identity(task, "test" if "test" in task.data else "validation")
  scores = {"linear": found["linear"]["test"], "calibration": found["calibration"]["scaled_ece"]}
  keys = {"linear": "linear"}
  if found["knn"]:
    neighbours = max((int(k) for k in found["knn"] if int(k) <= 20), default=min(map(int, found["knn"])))
    keys["knn"], scores["knn"] = f"knn_{neighbours}", found["knn"][str(neighbours)]
  if "5" in found["few_shot"]:
    keys["few_shot"], scores["few_shot"] = "few_shot_5", found["few_shot"]["5"]["mean"]
  with np.load(folder / "examples.npz") as arrays:
    of_examples = {row: arrays[key] for row, key in keys.items()}
  data = dict.fromkeys(scores, identity)
  if "few_shot" in data:  # episodes are drawn by the seed
    data["few_shot"] = f"{identity} {config.seed}"
  classifier = found["linear"]
  details = {
    "selected": classifier["weight_decay"],
    "at_edge_of_grid": classifier["at_edge_of_grid"],
    "grid": [[point["weight_decay"], point["validation"]] for point in classifier["grid"]],
    "test_examples": found["examples"]["test"],
    "examples": found["examples"],
    "neighbours": keys.get("knn", ""),
    "ece": found["calibration"]["ece"],
    "temperature": found["calibration"]["temperature"],
  }
  return scores, of_examples, data, details


def _fine_tune(recipe: recipes.Recipe, config: Config, folder: pathlib.Path) -> Outcome:
  """The same of a classifier that is fine-tuned over a grid, whose rows are test metrics of its last run."""
  found = fine_tune.fine_tune(config, folder)
  if not found:
    raise Interrupted(f"The fine-tuning in {folder} was told to stop.")
  scores = {row.name: found["test_metrics"][row.name] for row in recipe.rows}
  identity = _identity(tasks_build.build_task(config), "test")
  details = {name: found[name] for name in ("steps", "selected", "at_edge_of_grid", "grid", "metric")}
  return scores, {}, dict.fromkeys(scores, identity), details | {"metrics": found["test_metrics"]}


def _identity(task: base.Task, split: str) -> str:
  return content.digest(fingerprint.of_source(task.data[split]))[:32]


def _trained_parameters(task: base.Task, config: Config) -> int:
  """How many parameters the recipe trains on a backbone of these sizes."""
  model = prepare.prepare(
    task.build_model,
    prepare.abstract_source(config.backbone),
    trainable=config.trainable,
    adapters=config.adapters,
    storage=config.frozen_dtype,
    fold=config.backbone.fold,
  )
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.trainable))
