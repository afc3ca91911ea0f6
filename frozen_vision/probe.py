"""Probes the embeddings of a frozen backbone on a data set: `python -m frozen_vision.main --mode=probe`."""

import logging
import os
import pathlib
from typing import Any

import jax
import numpy as np

from frozen_vision import config as config_lib
from frozen_vision.data.classification import splits
from frozen_vision.files import atomic
from frozen_vision.freezing import embeddings, prepare
from frozen_vision.probes import suite
from frozen_vision.tasks import build as tasks_build
from frozen_vision.tasks import classification

_logger = logging.getLogger(__name__)


def probe(config: config_lib.ConfigLike, workdir: str | os.PathLike) -> dict[str, Any]:
  """Runs all probes on the backbone and the data of a classification config.

  Linear classifiers are selected on validation data, fitted again on training and validation data, and tested
  once. Where only one of validation and test data is there, it is tested on, and a random part of the
  training data, drawn by the seed, is held out for validation, as arXiv 2011.13377 does.

  Args:
    config: of task `classification`; its section `classification.probe` has the probes' options.
    workdir: where `probe.json`, `probe.md` and `examples.npz` (`suite.Results.examples`) are written.

  Returns:
    What `probe.json` holds.

  Raises:
    ValueError: a config of another task; data without a training image of each class.
    FileNotFoundError: data or weights that are not where the config says.
  """
  config = tasks_build.read_config(config)
  if jax.process_count() > 1:
    raise ValueError("Probes run in one process; start the command without --distributed.")
  task = tasks_build.build_task(config)
  if not isinstance(task, classification.ClassificationTask):
    raise ValueError(
      f"Probes need one label an image; config.task is {config.task!r}. "
      "Take a config of task 'classification', such as configs/classification.py."
    )
  backbone = prepare.Backbones().of(config)
  if config.headline:
    _logger.info("%s", config.headline)
  _logger.info("%s Backbone: %s, %s.", task.headline, config.backbone.name, config.backbone.weights)
  parts = {name: _embed(config, task, backbone, name) for name in task.parts}
  is_given = {"validation", "test"} <= set(parts)
  if is_given:
    train, validation, test = parts["train"], parts["validation"], parts["test"]
  else:
    test = parts["test"] if "test" in parts else parts["validation"]
    try:
      kept, held = splits.split(
        parts["train"].labels, fraction=config.classification.probe.held_out, seed=config.seed
      )
    except ValueError as error:
      raise ValueError(f"config.classification.probe.held_out: {error}") from error
    train, validation = (suite.Examples(*(array[rows] for array in parts["train"])) for rows in (kept, held))
  options = config.classification.probe
  results = suite.run(
    train,
    validation,
    test,
    metric=config.classification.score if options.metric == "auto" else options.metric,
    ks=options.neighbours,
    shots=options.shots,
    episodes=options.episodes,
    seed=config.seed,
  )
  found = {
    "backbone": {"name": config.backbone.name, "weights": config.backbone.weights, "key": backbone.key},
    "view": task.view,
    "seed": config.seed,
    "validation_data": "given" if is_given else f"{options.held_out:.0%} of the training data",
    **results.to_dict(),
  }
  text = results.to_text()
  folder = pathlib.Path(workdir)
  with atomic.open_aside(folder / "examples.npz") as file:
    np.savez(file, **results.examples)
  atomic.write_json(folder / "probe.json", found)
  atomic.write_text(folder / "probe.md", _page(config, found, text))
  _logger.info("Written: %s and probe.json.\n%s", folder / "probe.md", text)
  return found


def _embed(
  config: config_lib.Config,
  task: classification.ClassificationTask,
  backbone: prepare.FrozenBackbone,
  part: str,
) -> suite.Examples:
  _logger.info("Embeddings of the %s data: %s images.", part, f"{len(task.parts[part]):,}")
  return suite.Examples(
    *embeddings.embed(
      backbone,
      task.parts[part],
      task.eval_transform(),
      batch_size=config.eval_batch_size,
      path=config.cache.path or None,
      dtype=config.cache.dtype,
      num_threads=config.loader.threads,
    )
  )


def _page(config: config_lib.Config, found: dict[str, Any], table: str) -> str:
  counts, backbone = found["examples"], config.backbone
  return f"""# {backbone.name} ({backbone.weights}), frozen

{counts["train"]:,} training, {counts["validation"]:,} validation and {counts["test"]:,} test images at \
{config.classification.image_size} px; seed {config.seed}. Validation data: {found["validation_data"]}.

{table}
"""
