"""The options that every config has, and how a config is checked."""

import difflib
from typing import Any

import ml_collections

from frozen_vision import optimizer
from frozen_vision.tasks import common


# Sections whose keys are checked by what they configure.
_OPEN = (
    "backbone.overrides", "detection.head_options", "segmentation.mask2former", "segmentation.upernet",
    "segmentation.linear")


def base_config() -> ml_collections.ConfigDict:
  """A config with every option that the loops read; a task adds a section of its own."""
  return ml_collections.ConfigDict(dict(
      headline="",  # printed first
      task="",
      seed=0,
      backbone=common.backbone_config(),
      trainable=("neck/.*", "head/.*"),  # regular expressions of parameter paths; the rest is frozen
      # Of the frozen weights as they are held: float32 | bfloat16 (on TPU and GPU) | int8 (folded backbones).
      frozen_dtype="float32",
      steps=1000,
      batch_size=16,
      eval_batch_size=16,
      accumulate=1,  # micro-batches per update
      ema_decay=0.0,  # average of the trainable parameters, used for evaluation; 0 for none
      optimizer=optimizer.default_config(),
      loader=dict(workers=0, threads=1),
      log_every=20,
      eval_every=0,  # steps; 0: at the end only
      checkpoint_every=500,
      keep_checkpoints=2,
      pictures=8,  # examples shown after each evaluation
      tensorboard=True,  # also write TensorBoard events, if TensorFlow is installed
  ))


def check(config: ml_collections.ConfigDict, known: ml_collections.ConfigDict) -> None:
  """Compares the keys of a config with those that are read.

  Raises:
    ValueError: lists every key that nothing reads and every key that is missing.
  """
  found, wanted = set(_paths(config)), set(_paths(known))
  is_open = lambda key: any(f"{key}.".startswith(f"{name}.") for name in _OPEN)
  unknown = sorted(key for key in found - wanted if not is_open(key))
  missing = sorted(key for key in wanted - found if key not in _OPEN)
  problems = []
  for key in unknown:
    close = difflib.get_close_matches(key, wanted, n=1)
    problems.append(f"unknown {key}" + (f" (did you mean {close[0]}?)" if close else ""))
  problems += [f"missing {key}" for key in missing]
  if problems:
    raise ValueError(
        "The config does not fit:\n  " + "\n  ".join(problems)
        + "\nStart from frozen_vision.config.base_config() and the task's default_config().")


def _paths(config: Any, prefix: str = "") -> list[str]:
  """Dotted paths of all leaves; an empty section is a leaf."""
  paths = []
  for key, value in config.items():
    name = f"{prefix}{key}"
    if isinstance(value, ml_collections.ConfigDict) and len(value):
      paths += _paths(value, name + ".")
    else:
      paths.append(name)
  return paths
