"""Public SwinV2 checkpoints as our parameters: every key is used or named as ignored."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import logging
import os
import pathlib
import re
from typing import Any

import numpy as np

from frozen_vision import messages
from frozen_vision.backbones import base, checkpoint
from frozen_vision.backbones.swinv2 import checkpoint_keys
from frozen_vision.backbones.swinv2 import checkpoint_windows as windows_lib
from frozen_vision.backbones.swinv2 import config as swinv2_config
from frozen_vision.backbones.swinv2 import model as swinv2
from frozen_vision.backbones.swinv2 import published as named_weights
from frozen_vision.files import checkpoint_file, trees
from frozen_vision.files import keys as key_reports
from frozen_vision.files.tensors import LazyTensor

_logger = logging.getLogger(__name__)
_WINDOWS = ("window_sizes", "pretrained_window_sizes")


@dataclasses.dataclass(frozen=True)
class Head:
  """A linear classifier on the pooled features (`SwinV2.embed`).

  Attributes:
    kernel: [channels, classes] float32.
    bias: [classes] float32.
  """

  kernel: np.ndarray
  bias: np.ndarray

  def select(self, classes: Sequence[int]) -> "Head":
    """The rows of some classes, such as the 1000 of ImageNet-1K among the 21841 of ImageNet-22K.

    The released code selects so when it fine-tunes a 22K model (its data/map22kto1k.txt has the rows).

    Raises:
      ValueError: a class that the head does not have.
    """
    rows = np.asarray(classes, np.int64)
    if rows.size and (rows.min() < 0 or rows.max() >= self.bias.size):
      raise ValueError(f"Classes {rows.min()}..{rows.max()} of a head of {self.bias.size} classes.")
    return Head(self.kernel[:, rows], self.bias[rows])


@dataclasses.dataclass(frozen=True)
class Checkpoint(checkpoint.Checkpoint):
  """A public SwinV2, mapped but not read.

  Attributes:
    config: shape, windows and pretrained windows.
    head_leaves: kernel and bias of the classifier as the file has them, if it has one.
  """

  config: swinv2.SwinV2Config
  head_leaves: tuple[LazyTensor, LazyTensor] | None

  def head(self) -> Head | None:
    """The classifier, if the checkpoint has one."""
    if self.head_leaves is None:
      return None
    return Head(*checkpoint.read_classifier(self.head_leaves, self.path))

  def summary(self) -> str:
    """A report of the use of every key, with the windows and the classifier."""
    head = "none" if self.head_leaves is None else f"{self.head_leaves[1].shape[0]} classes"
    config = self.config
    return "\n".join(
      [
        f"{self.path}: {self.name or 'SwinV2 of no known variant'}, as saved by {self.source}",
        f"  embed_dim {config.embed_dim}, depths {config.depths}, heads {config.num_heads}, "
        f"extra norm every {config.extra_norm_interval or 'no'} blocks",
        f"  windows {config.window_sizes}, pretrained windows {config.pretrained_window_sizes}",
        f"  {len(self.used)} keys used for {len(self.leaves)} parameters of {self.num_weights:,} numbers",
        f"  classifier: {head}",
        *self.ignored_lines(),
      ]
    )


def open_checkpoint(path: str | os.PathLike, name: str | None = None, **overrides: Any) -> Checkpoint:
  """Maps a public `.safetensors` or `.pth` file onto our parameters, without reading the weights yet.

  Windows are taken from `overrides`, else from the coordinates in the file, else from a `config.json` beside
  it, else from its name (`...window12to16_192to256...`). They are the windows in effect at the image size of
  the training: 16, 16, 16, 8 for window 16 at 256 px. Where nothing tells the pretrained windows they stay 0,
  the window in use, as in the released code: right at the image size of the training only.

  Args:
    path: a file or several (`files.checkpoint_file`), or a name of published weights (`published.TABLE`),
      which are fetched.
    name: the row of `swinv2_config.VARIANTS` that the weights must fit; inferred from the shapes if None.
    overrides: fields of `SwinV2Config`. With `embed_dim`, `depths` or `num_heads`, a shape that is no row of
      the table is accepted too.

  Raises:
    FileNotFoundError, ValueError: no such file, a damaged one, or one that is not total: all keys at fault
      are listed.
  """
  if os.fspath(path) in named_weights.TABLE:
    path = named_weights.TABLE[os.fspath(path)].local_path()
  file = checkpoint_file.open_checkpoint(path)
  return map_tensors(file.tensors, file.path, name=name, others=file.others, **overrides)


def map_tensors(
  tensors: dict[str, LazyTensor],
  path: pathlib.Path,
  *,
  name: str | None = None,
  others: Sequence[str] = (),
  **overrides: Any,
) -> Checkpoint:
  """`open_checkpoint`, of a file that is already open."""
  source = checkpoint_keys.detect(set(tensors))
  if source is None:
    raise ValueError(
      f"{path} has keys of no known SwinV2 checkpoint (Microsoft, SimMIM, timm, transformers, torchvision) "
      f"and was not written by frozen_vision.save_backbone; its {len(tensors)} keys begin with "
      f"{sorted(tensors)[:5]}."
    )
  blocks = source.blocks(tensors)
  name, config = _config(tensors, source, blocks, path, name, overrides)
  used, faults, leaves = set(), key_reports.KeyReport(), {}
  for ours, shape in _parameters(config).items():
    theirs, transform = source.names(ours)
    used.update(theirs)
    for key, expected in zip(theirs, transform.shapes(shape)):
      if key not in tensors:
        faults.add_missing(key, expected)
      elif tensors[key].shape != expected:
        faults.add_misshaped(key, tensors[key].shape, expected)
    parts = [tensors[key] for key in theirs if key in tensors]
    if parts:
      leaves[ours] = LazyTensor(
        shape,
        parts[0].dtype,
        lambda parts=parts, apply=transform.apply: apply(*(part.read() for part in parts)),
      )
  ignored = {name: "not a tensor of the model" for name in others}
  head = [tensors.get(key) for key in source.head]
  for key, tensor in tensors.items():
    if key in used or key in source.head:
      continue
    if any(re.fullmatch(pattern, key) for pattern in source.ignored):
      ignored[key] = "recomputed here, or of another task"
    else:
      faults.add_unexpected(key, tensor.shape)
  channels = config.stage_channels(len(config.depths) - 1)
  if any(head) and not (all(head) and head[0].shape == (head[1].shape[0], channels)):
    for key, tensor, expected in zip(source.head, head, (f"(classes, {channels})", "(classes,)")):
      found = tensor.shape if tensor else "missing"
      faults.add_misshaped(f"classifier {key}", f"{found}", expected)
  faults.check(
    f"{path} ({source.name}) does not fit {name or 'the shape it was taken for'}: embed_dim "
    f"{config.embed_dim}, depths {config.depths}, heads {config.num_heads}"
  )
  return Checkpoint(
    path, source.name, name, config, leaves, tuple(sorted(used)), ignored, tuple(head) if all(head) else None
  )


def recognises(tensors: Mapping[str, LazyTensor]) -> bool:
  """Whether these are the keys of a SwinV2 checkpoint: other transformers have a patch embedding too."""
  keys = set(tensors)
  # CLIP's logit_scale, which a checkpoint of feature distillation may hold, is below no attention.
  scales = (key for key in keys if key.endswith(("attn.logit_scale", "self.logit_scale")))
  return checkpoint_keys.detect(keys) is not None and any(scales)


@functools.lru_cache(maxsize=8)
def _parameters(config: swinv2.SwinV2Config) -> dict[str, checkpoint_keys.Shape]:
  """{path: shape} of every parameter of ours."""
  return trees.shapes(trees.weights(base.abstract(swinv2.SwinV2, config)))


def _config(
  tensors: dict[str, LazyTensor],
  source: checkpoint_keys.Source,
  blocks: dict[tuple[int, int], set[str]],
  path: pathlib.Path,
  name: str | None,
  overrides: dict[str, Any],
) -> tuple[str | None, swinv2.SwinV2Config]:
  """Shape and windows of a checkpoint."""
  found = _shape(tensors, source, blocks, path)
  shape = {key: found[key] for key in ("embed_dim", "depths", "num_heads")}
  stages = len(found["depths"])
  if isinstance(overrides.get("window_size"), int):
    overrides = dict(overrides)
    overrides["window_sizes"] = (overrides.pop("window_size"),) * stages
  if name is not None:
    if name not in swinv2_config.VARIANTS:
      raise ValueError(messages.unknown("backbone", name, swinv2_config.VARIANTS))
    config = swinv2_config.VARIANTS[name]
  else:
    rows = [
      row
      for row, config in swinv2_config.VARIANTS.items()
      if shape == {key: getattr(config, key) for key in shape}
    ]
    if not rows and not set(shape) & set(overrides):
      raise ValueError(
        f"{path} ({source.name}) has the shape of no known variant: {shape}. Give name= to see which keys "
        f"differ from one of {sorted(swinv2_config.VARIANTS)}, or confirm the shape with "
        f"depths={found['depths']}."
      )
    name = rows[0] if rows else None
    config = (
      swinv2_config.VARIANTS[name]
      if name
      else swinv2.SwinV2Config(**shape, window_sizes=(0,) * stages, pretrained_window_sizes=(0,) * stages)
    )
    config = dataclasses.replace(config, extra_norm_interval=found["extra_norm_interval"])
  windows = windows_lib.of_buffers(
    tensors, {source.block_prefix.format(s=s, b=b, odd=2 * s + 1): s for s, b in blocks}, stages
  )
  if source.maps_hold_windows:
    config = dataclasses.replace(config, whole_windows=True)
    for field, file in zip(_WINDOWS, windows or ((8,) * stages,) * 2):
      given = overrides.get(field)
      if given is not None and tuple(given) != file and overrides.get("whole_windows", True):
        raise ValueError(
          f"{path} is torchvision's, which knows no pretrained windows and computes something else than "
          f"SwinV2 at other windows: {field} = {tuple(given)}, its own are {file}. With "
          "whole_windows=False the weights are used as SwinV2's, and the features are not torchvision's."
        )
    windows = windows or ((8,) * stages,) * 2
  windows = windows or windows_lib.of_surroundings(path, stages)
  if windows is None and "window_sizes" not in overrides:
    raise ValueError(
      f"{path} does not tell its windows, neither in its keys nor in its name or a config.json beside it. "
      "Give window_sizes=(...), one per stage, and pretrained_window_sizes=(...) if they differ."
    )
  if windows is None:
    # The window in use, and not that of the row: nothing says that these weights have seen another.
    windows = (config.window_sizes, (0,) * stages)
    if "pretrained_window_sizes" not in overrides:
      _logger.warning(
        "%s does not tell the windows of its pretraining, so positions are normalised by the windows in use, "
        "%s. If it was trained at others, give pretrained_window_sizes; the released weights of %s have %s.",
        path,
        tuple(overrides["window_sizes"]),
        name or "this shape",
        config.pretrained_window_sizes,
      )
  config = dataclasses.replace(config, **dict(zip(_WINDOWS, windows)))
  return name, config.replace(**overrides)


def _shape(
  tensors: dict[str, LazyTensor],
  source: checkpoint_keys.Source,
  blocks: dict[tuple[int, int], set[str]],
  path: pathlib.Path,
) -> dict[str, Any]:
  """Fields of `SwinV2Config` that shapes and names tell."""
  stages = max((stage for stage, _ in blocks), default=-1) + 1
  depths = tuple(max((b for s, b in blocks if s == stage), default=-1) + 1 for stage in range(stages))
  patches = tensors[source.stem["patch_embed/proj/kernel"][0][0]].shape
  heads = []
  for stage in range(stages):
    scales = [
      tensors[source.block_prefix.format(s=s, b=b, odd=2 * s + 1) + name]
      for (s, b), names in blocks.items()
      if s == stage
      for name in names
      if name.endswith("logit_scale")
    ]
    heads.append(scales[0].shape[0] if scales and scales[0].shape else 0)
  if not stages or not all(depths) or not all(heads) or len(patches) != 4:
    raise ValueError(
      f"{path} ({source.name}) is no SwinV2: {stages} stages of {depths} blocks with {heads} heads (by "
      f"logit_scale), patch embedding of shape {patches}."
    )
  extra = [b for (_, b), names in blocks.items() if any(name.startswith("enorm.") for name in names)]
  return dict(
    embed_dim=patches[0],
    depths=depths,
    num_heads=tuple(heads),
    extra_norm_interval=min(extra) + 1 if extra else 0,
  )
