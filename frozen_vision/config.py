"""The options that every config has, how a config file is read, and how a config is checked."""

from collections.abc import Mapping
import difflib
import importlib.util
import os
import pathlib
import re
from typing import Any

import ml_collections

from frozen_vision.tasks import common
from frozen_vision.training import optimizer

# Sections whose keys are checked by what they configure.
_OPEN = (
  "backbone.overrides",
  "detection.head_options",
  "segmentation.mask2former",
  "segmentation.upernet",
  "segmentation.linear",
)


def base_config() -> ml_collections.ConfigDict:
  """A config with every option that the loops read; a task adds a section of its own."""
  return ml_collections.ConfigDict(
    dict(
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
      # Devices of all processes as a grid, each with its own part of every batch. Frozen weights are spread
      # over all of them, or over `model` with a copy in every group of `data`; -1: what is left.
      mesh=dict(data=-1, model=1, frozen="all"),
      ema_decay=0.0,  # average of the trainable parameters, used for evaluation; 0 for none
      optimizer=optimizer.default_config(),
      loader=dict(workers=0, threads=1),
      log_every=20,
      eval_every=0,  # steps; 0: at the end only
      checkpoint_every=500,
      keep_checkpoints=2,
      pictures=8,  # examples shown after each evaluation
      tensorboard=True,  # also write TensorBoard events, if TensorFlow is installed
    )
  )


def load_config(
  source: str | os.PathLike, changes: Mapping[str, Any] | None = None
) -> ml_collections.ConfigDict:
  """A config file as the command line reads it.

  Args:
    source: a Python file with `get_config`, perhaps with a variant of it: `configs/coco_htc.py:photos`.
    changes: options to set, by dotted path; `{"optimizer.learning_rate": 5e-4}` is what
      `--config.optimizer.learning_rate=5e-4` is. A dict changes the options of a section that it names.

  Returns:
    The config, locked: options that do not exist cannot be set by mistake.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a file without `get_config`, a variant that it does not know, or a change of an option that
      does not exist or is of another type.
  """
  match = re.fullmatch(r"(.+?\.py)(?::(.*))?", os.fspath(source), re.DOTALL)
  path = pathlib.Path(match[1] if match else source)
  if not path.is_file():
    raise FileNotFoundError(f"Config {path.absolute()}: no such file.")
  if not match:
    raise ValueError(f"Config {path}: expected a Python file, .py.")
  spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise ValueError(f"Config {path}: expected a function get_config in it.")
  config = module.get_config() if match[2] is None else module.get_config(match[2])
  for option, value in (changes or {}).items():
    _set(config, option, value)
  return config.lock()


def _set(config: ml_collections.ConfigDict, option: str, value: Any) -> None:
  """Sets an option by its dotted path; see `load_config`."""
  section = config
  *sections, last = option.split(".")
  for part in sections:
    section = section.get(part) if isinstance(section, ml_collections.ConfigDict) else None
  is_open = ".".join(sections) in _OPEN
  if not isinstance(section, ml_collections.ConfigDict) or not (is_open or last in section):
    close = difflib.get_close_matches(option, _paths(config), n=1)
    raise ValueError(
      f"config.{option}: there is no such option" + (f"; did you mean config.{close[0]}?" if close else ".")
    )
  if isinstance(section.get(last), ml_collections.ConfigDict):
    for key, part in dict(value).items():
      _set(config, f"{option}.{key}", part)
    return
  try:
    section[last] = value
  except TypeError as error:
    raise ValueError(
      f"config.{option} is a {type(section[last]).__name__}, {section[last]!r}; {value!r} does not fit."
    ) from error


def check(config: ml_collections.ConfigDict, known: ml_collections.ConfigDict) -> None:
  """Compares the keys of a config with those that are read.

  Raises:
    ValueError: lists every key that nothing reads and every key that is missing.
  """
  found, wanted = set(_paths(config)), set(_paths(known))

  def is_open(key):
    return any(f"{key}.".startswith(f"{name}.") for name in _OPEN)

  unknown = sorted(key for key in found - wanted if not is_open(key))
  missing = sorted(key for key in wanted - found if key not in _OPEN)
  problems = []
  for key in unknown:
    close = difflib.get_close_matches(key, wanted, n=1)
    problems.append(f"unknown {key}" + (f" (did you mean {close[0]}?)" if close else ""))
  problems += [f"missing {key}" for key in missing]
  if problems:
    raise ValueError(
      "The config does not fit:\n  "
      + "\n  ".join(problems)
      + "\nStart from frozen_vision.config.base_config() and the task's default_config()."
    )


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
