"""Public ViT checkpoints as our variables: every key is used or named as ignored."""

from collections.abc import Mapping
import functools
import math
import os
import pathlib
import re
from typing import Any

from frozen_vision import messages
from frozen_vision.backbones import base
from frozen_vision.backbones.checkpoint import Checkpoint
from frozen_vision.backbones.vit import checkpoint_keys, model
from frozen_vision.backbones.vit.checkpoint_layout import grid_of, Layout, num_blocks, Shape, Transform
from frozen_vision.backbones.vit.config import VARIANTS, ViTConfig
from frozen_vision.files import checkpoint_file, keys, trees
from frozen_vision.files.tensors import LazyTensor

_OWN_TABLE = r"blocks\.\d+\.attn\.relative_position_bias_table"

# Fields that shapes and names of a checkpoint tell, and by which a row is found.
_TOLD = (
  "embed_dim",
  "depth",
  "patch_size",
  "mlp_dim",
  "mlp",
  "registers",
  "layer_scale",
  "class_token",
  "pre_norm",
  "pooling",
)


def open_checkpoint(path: str | os.PathLike, name: str | None = None, **overrides: Any) -> Checkpoint:
  """Maps a public checkpoint onto our variables, without reading the weights yet.

  Args:
    path: what `files.checkpoint_file.open_checkpoint` opens: `.safetensors`, shards, `.pth`, `.npz`.
    name: the row of `config.VARIANTS`. It may be left out where only one row has the shapes of the file;
      DeiT, AugReg, DINO and MAE are alike in their shapes, as are CLIP and OpenCLIP, SigLIP and SigLIP 2.
    overrides: fields of `ViTConfig`; with sizes among them the file need not have those of the row.

  Raises:
    FileNotFoundError, ValueError: no such file, a damaged one, or one that is not total: all keys at fault
      are listed.
  """
  file = checkpoint_file.open_checkpoint(path)
  return map_tensors(file.tensors, file.path, name=name, others=file.others, **overrides)


def recognises(tensors: Mapping[str, LazyTensor]) -> bool:
  """Whether these are the keys of a public ViT checkpoint."""
  return checkpoint_keys.detect(_unstacked(tensors)) is not None


def map_tensors(
  tensors: Mapping[str, LazyTensor],
  path: pathlib.Path,
  *,
  name: str | None = None,
  others: list[str] | tuple[str, ...] = (),
  **overrides: Any,
) -> Checkpoint:
  """`open_checkpoint`, of a file that is already open."""
  tensors = _unstacked(tensors)
  layout = checkpoint_keys.detect(tensors)
  if layout is None:
    raise ValueError(
      f"{path} has keys of no known ViT checkpoint (Meta, timm, transformers, OpenCLIP, big_vision); its "
      f"{len(tensors)} keys begin with {sorted(tensors)[:5]}."
    )
  own_tables = [key for key in tensors if re.fullmatch(_OWN_TABLE, key.removeprefix(layout.prefix))]
  if own_tables:
    raise ValueError(
      f"{path} has relative positions for every block, such as {own_tables[0]}, as classifiers have that "
      "were fine-tuned from SimMIM or Feature Distillation; expected one table for all blocks, "
      f"{layout.prefix}rel_pos_bias.relative_position_bias_table: give the pretrained or distilled "
      "checkpoint."
    )
  name, config = _config(tensors, layout, path, name, overrides)
  report, leaves, used = keys.KeyReport(), {}, set()
  for ours, shape in variable_shapes(config).items():
    alternatives = [a for a in layout.alternatives(ours) if all(key in tensors for key in a[0])]
    fitting = [a for a in alternatives if [tensors[k].shape for k in a[0]] == a[1].shapes(shape, config)]
    if not alternatives:
      if ours != "periods":  # only Meta's checkpoints hold them; the others compute them
        report.add_missing(_absent(layout, ours, tensors), f"for {ours} {shape}")
      continue
    theirs, transform = (fitting or alternatives)[0]
    used.update(theirs)
    for key, expected in zip(theirs, transform.shapes(shape, config)):
      if tensors[key].shape != expected:
        report.add_misshaped(key, tensors[key].shape, expected)
    leaves[ours] = _transformed([tensors[key] for key in theirs], transform, shape)
  if config.positions == "rotary" and "periods" not in leaves:
    leaves["periods"] = _computed_periods(config)
  ignored = {other: "not a tensor of the model" for other in others}
  for key, tensor in tensors.items():
    if key in used:
      continue
    names = (key, key.removeprefix(layout.prefix))
    if any(re.fullmatch(pattern, name) for pattern in layout.ignored for name in names):
      ignored[key] = "of another task, or recomputed here"
    else:
      report.add_unexpected(key, tensor.shape)
  report.check(
    f"{path} ({layout.name}) does not fit {name}: embed_dim {config.embed_dim}, depth {config.depth}, "
    f"{config.num_heads} heads, patches of {config.patch_size}"
  )
  return Checkpoint(path, layout.name, name, config, leaves, tuple(sorted(used)), ignored)


def _transformed(parts: list[LazyTensor], transform: Transform, shape: Shape) -> LazyTensor:
  """One of our arrays, made of those of the file when it is read."""
  return LazyTensor(shape, parts[0].dtype, lambda: transform.apply(*(part.read() for part in parts)))


@functools.lru_cache(maxsize=32)
def variable_shapes(config: ViTConfig) -> dict[str, Shape]:
  """{path: shape} of every variable of ours."""
  return trees.shapes(trees.weights(base.abstract(model.ViT, config)))


def _absent(layout: Layout, ours: str, tensors: Mapping[str, LazyTensor]) -> str:
  """Names that a variable would be made of and that are absent: of the alternative of which most is there."""
  alternatives = layout.alternatives(ours)
  if not alternatives:
    return f"what {layout.name} has no name for"
  theirs = max((a[0] for a in alternatives), key=lambda names: sum(name in tensors for name in names))
  return ", ".join(key for key in theirs if key not in tensors)


def _computed_periods(config: ViTConfig) -> LazyTensor:
  """Rotary periods in float32, as timm and transformers compute them; Meta's files hold bfloat16's."""
  from_table = model.positions.rotary_periods(config.rotary_base, config.head_dim)
  return LazyTensor(from_table.shape, from_table.dtype, lambda: from_table)


def _unstacked(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
  """big_vision's scanned blocks, `encoderblock/...` with a leading axis, one by one."""
  found = {}
  for key, tensor in tensors.items():
    if "/encoderblock/" not in key or not tensor.shape:
      found[key] = tensor
      continue
    for index in range(tensor.shape[0]):
      found[key.replace("/encoderblock/", f"/encoderblock_{index}/")] = LazyTensor(
        tensor.shape[1:], tensor.dtype, lambda tensor=tensor, index=index: tensor.read()[index]
      )
  return found


def _config(
  tensors: Mapping[str, LazyTensor],
  layout: Layout,
  path: pathlib.Path,
  name: str | None,
  overrides: dict[str, Any],
) -> tuple[str, ViTConfig]:
  """The row, with what the file tells of options in place of the row's."""
  told = _told(tensors, layout, path)
  if name is None:
    rows = [
      row
      for row, config in VARIANTS.items()
      if all(getattr(config, k) == told[k] for k in _TOLD)
      and (config.positions == "relative") == told["has_relative"]
    ]
    if len(rows) != 1:
      problem = f"fit several rows: {rows}" if rows else f"fit no row of {sorted(VARIANTS)}"
      shapes = ", ".join(f"{key} {told[key]}" for key in _TOLD)
      raise ValueError(
        f"{path} ({layout.name}): its shapes ({shapes}) {problem}. Give name=..., which also decides on what "
        "shapes do not tell: heads, activation, epsilon and normalisation."
      )
    [name] = rows
  if name not in VARIANTS:
    raise ValueError(messages.unknown("backbone", name, VARIANTS))
  row = VARIANTS[name]
  options = {}
  if told["position_grid"] and row.positions != "rotary":
    options["position_grid"] = told["position_grid"]
  if row.qkv_bias == "qv" and not told["has_qkv_bias"]:  # timm leaves DINOv3's out where they are zero
    options["qkv_bias"] = "none"
  return name, row.replace(**options | overrides)


def _grid(positions: Shape | None, relative: Shape | None, class_token: bool) -> int:
  """Cells per side that positions are stored for, absolute or relative ones; 0 where there are none."""
  if relative is not None:
    return (math.isqrt(relative[0] - 3 * class_token) + 1) // 2
  return 0 if positions is None else grid_of(positions[-2], class_token)


def _told(tensors: Mapping[str, LazyTensor], layout: Layout, path: pathlib.Path) -> dict[str, Any]:
  """Fields of `ViTConfig` that shapes and names tell."""

  def shape(ours: str) -> Shape | None:
    found = layout.find(ours, tensors)
    return None if found is None else tensors[found[0][0]].shape

  patches = shape("patch_embed/proj/kernel")
  if patches is None or len(patches) != 4:
    raise ValueError(f"{path} ({layout.name}) is no ViT: its patch embedding has the shape {patches}.")
  flax = layout in (checkpoint_keys.BIG_VISION, checkpoint_keys.VISION_TRANSFORMER) or patches[2] == 3
  channels, patch = (patches[3], patches[0]) if flax else (patches[0], patches[2])
  relative = shape("relative_positions")
  positions, registers, probe = shape("positions"), shape("registers"), shape("attention_pool/probe")
  gate = shape("blocks/0/mlp/down/kernel") or (0, 0)
  fc1 = shape("blocks/0/mlp/fc1/kernel")
  hidden = 0 if fc1 is None else fc1[-1] if flax else fc1[0]
  packed = layout.find("blocks/0/mlp/gate/kernel", tensors)
  # Under timm's names a SwiGLU's two halves are a `fc1` twice as wide as what `fc2` takes in.
  swiglu = packed is not None and (fc1 is None or gate[1] != hidden)
  class_token = shape("cls_token") is not None
  return dict(
    embed_dim=channels,
    depth=num_blocks(layout, tensors),
    patch_size=patch,
    mlp="swiglu" if swiglu else "mlp",
    mlp_dim=gate[1] if swiglu else hidden,
    registers=0 if registers is None else registers[-2],
    layer_scale=shape("blocks/0/scale1/scale") is not None,
    class_token=class_token,
    pre_norm=shape("pre_norm/scale") is not None,
    pooling="class" if probe is None else "attention",
    position_grid=_grid(positions, relative, class_token),
    has_relative=relative is not None,
    has_qkv_bias=shape("blocks/0/attn/v_bias") is not None,
  )
