"""Helpers of all tasks: the backbone of a config, and paths that must exist."""

from collections.abc import Mapping, Sequence, Sized
import dataclasses
import hashlib
import re
from typing import Any

from flax import nnx
import jax
from jaxtyping import Float64
import numpy as np

from frozen_vision.backbones import families
from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.config import BackboneOptions, Config
from frozen_vision.data import classes as class_lists
from frozen_vision.data import pipeline
from frozen_vision.data.classification import augment
from frozen_vision.files import trees
from frozen_vision.files.paths import existing_path
from frozen_vision.freezing import prepare
from frozen_vision.heads import files as head_weights
from frozen_vision.tasks import base
from frozen_vision.tasks.shared_options import InitOptions, RandAugmentOptions

_NECK_STREAM = 0x6E65636B  # the neck's random numbers are not the head's


def build_backbone(config: Config) -> nnx.Module:
  """The backbone that `config.backbone` names, with its weights. Raises as `prepare.open_source` does."""
  return load_backbone(config.backbone, config.seed)


def load_backbone(options: BackboneOptions, seed: int) -> nnx.Module:
  """The backbone that a section of a config names, with its weights; the seed is that of random ones."""
  found = prepare.open_source(options, seed)
  return found.load() if isinstance(found, families.BackboneFile) else found


def feature_specs(config: Config) -> tuple[FeatureSpec, ...]:
  """The levels of the backbone that `config.backbone` names; nothing is built or read."""
  return specs_of(config.backbone)


def specs_of(options: BackboneOptions) -> tuple[FeatureSpec, ...]:
  """The levels of the backbone that a section of a config names; nothing is built or read."""
  return families.backbone_config(options.name, **options.overrides).feature_specs


def features(model: Any, view: Mapping[str, jax.Array], rng: jax.Array | None) -> base.Features:
  """All levels of the backbone for padded images, as `Task.features` of tasks whose images vary in size.

  Args:
    model: its `backbone`.
    view: `image` and `image_size`, as in a batch.
    rng: key of stochastic depth; None is deterministic.
  """
  images = model.backbone.preprocessing.normalise(view["image"], view["image_size"])
  return model.backbone(images, rng=rng)


def head_levels(
  model: Any, view: Mapping[str, jax.Array], features: base.Features, rng: jax.Array | None = None
) -> base.Features:
  """The levels that the head reads: those of the neck, or of the backbone where there is no neck.

  A neck that reads images sees them as the backbone does.

  Args:
    model: its `backbone` and `neck`, which may be None.
    view: `image` and `image_size`, as in the batch that `features` are of.
    rng: key of the step in training; None is deterministic.
  """
  if model.neck is None:
    return features
  if not model.neck.reads_images:
    return model.neck(features)
  images = model.backbone.preprocessing.normalise(view["image"], view["image_size"])
  return model.neck(features, images, rng=None if rng is None else jax.random.fold_in(rng, _NECK_STREAM))


def check_neck_trains(neck: nnx.Module, config: Config, init: InitOptions) -> None:
  """Raises ValueError where a neck with random weights is neither trained nor filled from a file."""
  paths = [f"neck/{path}" for path in trees.flatten(nnx.state(neck, nnx.Param))]
  if init.path or any(re.fullmatch(pattern, path) for pattern in config.trainable for path in paths):
    return
  raise ValueError(
    f"{config.task}.neck is {config.section.neck.name}, and config.trainable is {config.trainable}: nothing "
    f'of the neck would train. Set --config.trainable="{("neck/.*", *config.trainable)}".'
  )


def check_backbone_trains(backbone: Any, config: Config) -> None:
  """Raises ValueError where a task that pretrains has a backbone of which nothing trains, folded or not."""
  paths = []
  if isinstance(backbone, nnx.Module):
    paths = [f"backbone/{path}" for path in trees.flatten(nnx.state(backbone, nnx.Param))]
  if not any(re.fullmatch(pattern, path) for pattern in config.trainable for path in paths):
    raise ValueError(
      f"config.task is {config.task}, which trains a backbone, and config.trainable is {config.trainable}: "
      "nothing of the backbone would train. Set --config.trainable=\"('.*',)\"."
    )


def start_head(module: nnx.Module, init: InitOptions, option: str) -> None:
  """Fills neck and head from the file `init.path`, if one is given; `option` is the section's name."""
  if init.path:
    path = existing_path(
      init.path, f"{option}.path", "It is written by frozen_vision.convert or experiments/export_head.py."
    )
    nnx.update(module, head_weights.load(nnx.state(module), path, keep=tuple(init.keep)))


def frozen_head(config: Config, frozen: nnx.State) -> str | None:
  """Digest of the file that frozen parts of neck and head are read from; None where all of them train."""
  init = getattr(config.section, "init", None)
  parts = [trees.path_string(path) for path, leaf in nnx.to_flat_state(frozen) if isinstance(leaf, nnx.Param)]
  if init is None or not init.path or not any(path.startswith(head_weights.PARTS) for path in parts):
    return None
  with open(existing_path(init.path, f"{config.task}.init.path"), "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def check_frozen_head(found: str | None, config: Config, frozen: nnx.State, where: str) -> None:
  """Raises ValueError where frozen parts of neck and head are not those that a checkpoint was trained on.

  Args:
    found: `frozen_head` of the run; None where a checkpoint does not know.
    where: its workdir, for the error.
  """
  if found is not None and found != frozen_head(config, frozen):
    raise ValueError(
      f"The run in {where} has frozen parts of neck and head from {config.section.init.path}, which holds "
      "other ones than when it was trained. Put that file back, or train in another --workdir."
    )


def train_batches(
  config: Config,
  source: pipeline.Source,
  transform: pipeline.TrainTransform,
  start_example: int,
  repeats: Float64[np.ndarray, "m"] | None = None,
) -> pipeline.BatchIterator:
  """`pipeline.train_batches` with the batch size, seed and loader of a config: this process's part."""
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
    views=config.cache.views,
    repeats=repeats,
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


def rand_augment(options: RandAugmentOptions) -> augment.RandAugment | None:
  """The RandAugment that a section of a config describes; None for no operations."""
  return augment.RandAugment(**dataclasses.asdict(options)) if options.num_ops else None


def shared_classes(
  train: Sequence[str], validation: Sequence[str], names: tuple[str, str], how: str = ""
) -> base.Classes:
  """The classes of the training data, if the data for validation have the same ones in the same order.

  Args:
    names: what the two are called in the error, and `how` to mend it.

  Raises:
    ValueError: they differ.
  """
  differs = class_lists.difference(train, validation)
  if differs:
    raise ValueError(
      f"{names[1]} does not have the classes of {names[0]}, but {differs}. Both must have "
      f"the same ones in the same order. {how}".strip()
    )
  return base.named_classes(train)


def frame_view(frame: tuple[int, int], resize: Any) -> dict[str, Any]:
  """`Task.view` of images that are resized into a frame (height, width), padded at the right and below."""
  return {"frame": list(frame), "short side": resize.short_side, "long side": resize.long_side}


def headline(task: str, train: Sized, validation: Sized, classes: Sized, what: str = "images") -> str:
  """`Detection: 20,000 training and 200 validation images, 6 classes.`"""
  return f"{task}: {len(train):,} training and {len(validation):,} validation {what}, {len(classes)} classes."
