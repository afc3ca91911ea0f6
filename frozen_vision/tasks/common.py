"""What tasks share: the backbone of a config, and paths that must exist."""

from collections.abc import Sequence, Sized
import dataclasses
import itertools
import os
import pathlib
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from frozen_vision.backbones import families
from frozen_vision.config import Config
from frozen_vision.data import pipeline
from frozen_vision.heads import files as head_weights
from frozen_vision.tasks import base
from frozen_vision.tasks.shared_options import InitOptions

_HOW_TO_GET_WEIGHTS = (
  "Download a SwinV2 checkpoint (Microsoft's, SimMIM's, timm's or transformers'; SwinV2-G was never "
  "published) and write it in our format with python -m frozen_vision.convert SOURCE FILE, or give it as "
  "it is with --config.backbone.weights=SOURCE; or give the name of published weights, such as "
  "--config.backbone.weights=swinv2_base_window12_192_22k, to have them fetched; "
  "--config.backbone.weights=random trains on a random backbone."
)


def build_backbone(config: Config) -> nnx.Module:
  """The backbone that `config.backbone` names, with its weights. Raises as `open_backbone` does."""
  found = open_backbone(config)
  return found.load() if isinstance(found, families.BackboneFile) else found


def open_backbone(config: Config) -> nnx.Module | families.BackboneFile:
  """The backbone that `config.backbone` names: with random weights, or the file that has them.

  Raises:
    FileNotFoundError: no such weights.
    ValueError: an unknown name or option; weights of another network than the one that is named.
  """
  options = config.backbone
  overrides = dict(config.backbone.overrides)
  dtype = jnp.dtype(options.dtype)
  if options.weights in ("random", "init"):
    if options.weights == "random":
      overrides = {**families.family_of(options.name).random, **overrides}
    return families.build_backbone(options.name, dtype=dtype, rngs=nnx.Rngs(config.seed), **overrides)
  source = options.name
  if options.weights in families.published_weights():
    source = options.weights
  elif options.weights != "shipped":
    source = existing_path(options.weights, "backbone.weights", _HOW_TO_GET_WEIGHTS)
  backbone = families.open_backbone(source, prefer=options.name, dtype=dtype, **overrides)
  named = families.backbone_config(options.name, **overrides)
  for field in dataclasses.fields(named):
    found = getattr(backbone.module.config, field.name, None)
    wanted = getattr(named, field.name)
    if found != wanted and field.name not in named.weightless:
      raise ValueError(
        f"config.backbone.weights: {source} holds a network with {field.name} = {found}, but "
        f"config.backbone.name = {options.name} has {wanted}. Give the weights of that backbone, or the "
        "name of the backbone of these weights."
      )
  return backbone


def start_head(module: nnx.Module, init: InitOptions, option: str) -> None:
  """Fills neck and head from the file `init.path`, if one is given; `option` is the section's name."""
  if init.path:
    path = existing_path(
      init.path, f"{option}.path", "It is written by frozen_vision.convert or experiments/export_head.py."
    )
    nnx.update(module, head_weights.load(nnx.state(module), path, keep=tuple(init.keep)))


def train_batches(
  config: Config,
  source: pipeline.Source,
  transform: pipeline.TrainTransform,
  start_example: int,
) -> pipeline.BatchIterator:
  """`pipeline.train_batches` with the batch size, seed and loader of a config: this process's share."""
  return pipeline.train_batches(
    source,
    transform,
    batch_size=config.batch_size,
    seed=config.seed,
    start_example=start_example,
    num_workers=config.loader.workers,
    num_threads=config.loader.threads,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )


def eval_batches(
  config: Config,
  source: pipeline.Source,
  transform: pipeline.EvalTransform,
  *,
  num_workers: int = 0,
) -> pipeline.BatchIterator:
  """`pipeline.eval_batches` likewise. Threads decode images; where that is too slow, workers do too."""
  return pipeline.eval_batches(
    source,
    transform,
    batch_size=config.eval_batch_size,
    num_workers=num_workers,
    num_threads=config.loader.threads,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )


def shared_classes(
  train: Sequence[str], validation: Sequence[str], names: tuple[str, str], how: str = ""
) -> base.Classes:
  """The classes of the training data, if the data for validation have the same ones in the same order.

  Args:
    names: what the two are called in the error, and `how` to mend it.

  Raises:
    ValueError: they differ.
  """
  if list(train) != list(validation):
    found = [
      f"{name} has the {len(classes)} classes {list(classes[:5])}{'...' if len(classes) > 5 else ''}"
      for name, classes in zip(names, (train, validation))
    ]
    first = next(pair for pair in itertools.zip_longest(train, validation) if pair[0] != pair[1])
    raise ValueError(
      f"{', but '.join(found)}; the first to differ is {first[0]!r} against {first[1]!r}. Both must have "
      f"the same ones in the same order. {how}".strip()
    )
  return base.named_classes(train)


def frame_view(frame: tuple[int, int], resize: Any) -> dict[str, Any]:
  """`Task.view` of images that are resized into a frame (height, width), padded at the right and below."""
  return {"frame": list(frame), "short side": resize.short_side, "long side": resize.long_side}


def headline(task: str, train: Sized, validation: Sized, classes: Sized, what: str = "images") -> str:
  """`Detection: 20,000 training and 200 validation images, 6 classes.`"""
  return f"{task}: {len(train):,} training and {len(validation):,} validation {what}, {len(classes)} classes."


def existing_path(path: str | os.PathLike, option: str, how: str = "") -> pathlib.Path:
  """The path, if it exists.

  Raises:
    FileNotFoundError: names the option, the absolute path that was looked at, and `how` to get it.
  """
  found = pathlib.Path(path).expanduser()
  if not found.exists():
    raise FileNotFoundError(
      f"config.{option}: {found.absolute()} does not exist. "
      f"{how or 'Give an existing path with --config.' + option + '=PATH.'}"
    )
  return found


def layer_of(path: str, config: Config) -> int:
  """Depth of a parameter for layer-wise decay: 0 is the patch embedding, the last the head.

  As SimMIM's finetuning: blocks count from 1, and a merging shares the depth of the block before it.
  """
  depths = families.backbone_config(config.backbone.name, **config.backbone.overrides).depths
  parts = path.split("/")
  if parts[:2] == ["backbone", "patch_embed"]:
    return 0
  if parts[:2] == ["backbone", "stages"]:
    stage = int(parts[2])
    if parts[3] == "downsample":
      return sum(depths[: stage + 1])
    return sum(depths[:stage]) + int(parts[4]) + 1
  return sum(depths) + 1
