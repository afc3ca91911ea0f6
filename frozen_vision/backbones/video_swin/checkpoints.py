"""Public Video Swin checkpoints as our parameters, and 2D Swin checkpoints inflated over time.

Sources: torchvision's `swin3d_*`, the released code's (mmaction names); of 2D weights: torchvision's `swin_*`
and Microsoft's Swin V1. Every key is used or named as ignored, every parameter of ours is filled.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import os
import pathlib
import re
from typing import Any

from flax import nnx
import jax.numpy as jnp
import numpy as np

from frozen_vision.backbones import checkpoint
from frozen_vision.backbones.video_swin import model as video_swin
from frozen_vision.backbones.video_swin import windows as windows3d
from frozen_vision.files import checkpoint_file
from frozen_vision.files import keys as key_reports
from frozen_vision.files import tensors as weights
from frozen_vision.files.tensors import LazyTensor

Apply = Callable[[np.ndarray], np.ndarray]


def _SAME(x):
  return x


def _LINEAR(x):
  return x.T


# The convolution (c, 3, t, h, w) as the matrix product it is: rows ordered frame, row, column, colour.
def _PATCHES(x):
  return x.transpose(2, 3, 4, 1, 0).reshape(-1, x.shape[0])


def _inflate_patches(x: np.ndarray) -> np.ndarray:
  """A 2D convolution spread evenly over the frames of a patch: a still clip gives what its frame gave."""
  frames = video_swin.PATCH_SIZE[0]
  return _PATCHES(np.repeat(x[:, :, None], frames, axis=2) / np.float32(frames))


def _pair(
  ours: str, theirs: str, transform: Apply = _SAME, *, norm: bool = False
) -> list[tuple[str, str, Apply]]:
  """Weight and bias of a layer, as (pattern of their names, our name, transform)."""
  kernel = "scale" if norm else "kernel"
  return [(rf"{theirs}\.weight", f"{ours}/{kernel}", transform), (rf"{theirs}\.bias", f"{ours}/bias", _SAME)]


def _block(place: str, fc1: str, fc2: str) -> list[tuple[str, str, Apply]]:
  ours = r"stages/{s}/blocks/{b}/"
  return [
    *_pair(ours + "norm1", place + "norm1", norm=True),
    *_pair(ours + "norm2", place + "norm2", norm=True),
    *_pair(ours + "attn/qkv", place + r"attn\.qkv", _LINEAR),
    *_pair(ours + "attn/proj", place + r"attn\.proj", _LINEAR),
    *_pair(ours + "mlp/fc1", place + fc1, _LINEAR),
    *_pair(ours + "mlp/fc2", place + fc2, _LINEAR),
    (place + r"attn\.relative_position_bias_table", ours + "attn/position_bias", _SAME),
  ]


def _merging(place: str) -> list[tuple[str, str, Apply]]:
  ours = r"stages/{s}/downsample/"
  return [
    (place + r"reduction\.weight", ours + "reduction/kernel", _LINEAR),
    *_pair(ours + "norm", place + "norm", norm=True),
  ]


@dataclasses.dataclass(frozen=True)
class _Source:
  """Names of one kind of checkpoint.

  Attributes:
    stem: the convolution, then its norm and the final norm, as prefixes of names.
    block, merging: where they lie; named groups are the numbers in the name.
    stage: from the number in a name to our stage: (of a block, of a merging).
    mlp: the two layers of the MLP.
    head: the classifier.
  """

  name: str
  stem: tuple[str, str, str]
  block: str
  merging: str
  stage: tuple[Callable[[int], int], Callable[[int], int]]
  mlp: tuple[str, str]
  head: str
  is_2d: bool = False

  def table(self) -> list[tuple[re.Pattern, str, Apply]]:
    conv, norm, last = (re.escape(name) for name in self.stem)
    rows = [
      *_pair("patch_embed/proj", conv, _inflate_patches if self.is_2d else _PATCHES),
      *_pair("patch_embed/norm", norm, norm=True),
      *_pair("norm", last, norm=True),
      *_block(self.block, *(re.escape(name) for name in self.mlp)),
      *_merging(self.merging),
    ]
    return [(re.compile(pattern), ours, transform) for pattern, ours, transform in rows]

  def place(self, match: re.Match) -> dict[str, int]:
    found = {key: int(value) for key, value in match.groupdict().items()}
    if "n" in found:
      found["s"] = self.stage[0 if "b" in found else 1](found["n"])
    return found


_SOURCES = (
  _Source(
    "torchvision",
    ("patch_embed.proj", "patch_embed.norm", "norm"),
    r"features\.(?P<n>\d+)\.(?P<b>\d+)\.",
    r"features\.(?P<n>\d+)\.",
    (lambda n: n // 2, lambda n: n // 2),
    ("mlp.0", "mlp.3"),
    "head",
  ),
  _Source(
    "Video-Swin-Transformer",
    ("backbone.patch_embed.proj", "backbone.patch_embed.norm", "backbone.norm"),
    r"backbone\.layers\.(?P<s>\d+)\.blocks\.(?P<b>\d+)\.",
    r"backbone\.layers\.(?P<s>\d+)\.downsample\.",
    (int, int),
    ("mlp.fc1", "mlp.fc2"),
    "cls_head.fc_cls",
  ),
  _Source(
    "torchvision 2D",
    ("features.0.0", "features.0.2", "norm"),
    r"features\.(?P<n>\d+)\.(?P<b>\d+)\.",
    r"features\.(?P<n>\d+)\.",
    (lambda n: (n - 1) // 2, lambda n: n // 2 - 1),
    ("mlp.0", "mlp.3"),
    "head",
    is_2d=True,
  ),
  _Source(
    "Swin Transformer 2D",
    ("patch_embed.proj", "patch_embed.norm", "norm"),
    r"layers\.(?P<s>\d+)\.blocks\.(?P<b>\d+)\.",
    r"layers\.(?P<s>\d+)\.downsample\.",
    (int, int),
    ("mlp.fc1", "mlp.fc2"),
    "head",
    is_2d=True,
  ),
)
_IGNORED = r".*\.(relative_position_index|attn_mask)"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A public checkpoint, mapped but not read.

  Attributes:
    source: "torchvision", "Video-Swin-Transformer", "torchvision 2D" or "Swin Transformer 2D".
    name: the row of `video_swin.VARIANTS` of that shape, or None.
    leaves: {our parameter path: array in our layout}.
    ignored: {name: why}.
  """

  path: pathlib.Path
  source: str
  name: str | None
  config: video_swin.VideoSwinConfig
  leaves: dict[str, LazyTensor]
  ignored: dict[str, str]
  head_leaves: tuple[LazyTensor, LazyTensor] | None

  def build(self, *, dtype: Any = jnp.float32) -> video_swin.VideoSwin:
    """The network with these weights; raises ValueError with all keys that are missing or do not fit."""
    abstract = nnx.eval_shape(lambda: video_swin.VideoSwin(self.config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    return nnx.merge(graphdef, weights.fill(state, self.leaves, self.path))

  def head(self) -> tuple[np.ndarray, np.ndarray] | None:
    """Kernel [channels, classes] and bias of the classifier on `VideoSwin.embed`, if there is one."""
    if self.head_leaves is None:
      return None
    return checkpoint.read_classifier(self.head_leaves, self.path)


def open_checkpoint(path: str | os.PathLike, **overrides: Any) -> Checkpoint:
  """Maps a `.safetensors` or `.pth` file of Video Swin, or of 2D Swin, without reading the weights yet.

  2D weights are inflated: the patch embedding is spread evenly over a patch's frames, and every bias of a
  relative position is repeated for all offsets in time (bicubically resized first if `window_size` has
  another side), so that on a still clip the network gives what the 2D one gives on its frame.

  Args:
    overrides: fields of `VideoSwinConfig`; `window_size` where the weights do not tell it, or for 2D weights
      (default (8, M, M) with their own window M).

  Raises:
    FileNotFoundError, ValueError: no such file, a damaged one, or keys of no known source.
  """
  file = checkpoint_file.open_checkpoint(path)
  return map_tensors(file.tensors, file.path, others=file.others, **overrides)


def map_tensors(
  tensors: Mapping[str, LazyTensor], path: pathlib.Path, *, others: Sequence[str] = (), **overrides: Any
) -> Checkpoint:
  """`open_checkpoint`, of a file that is already open."""
  source = _detect(tensors, path)
  head = tuple(tensors.get(f"{source.head}.{leaf}") for leaf in ("weight", "bias"))
  ignored = {name: "not a tensor of the model" for name in others}
  table, named, faults = source.table(), {}, key_reports.KeyReport()
  for key in tensors:
    match = next((found for found in ((row, row[0].fullmatch(key)) for row in table) if found[1]), None)
    if match is not None:
      (_, ours, transform), place = match
      named[ours.format(**source.place(place))] = (key, transform)
    elif re.fullmatch(_IGNORED, key):
      ignored[key] = "recomputed here"
    elif key not in (f"{source.head}.weight", f"{source.head}.bias"):
      faults.add_unexpected(key, tensors[key].shape)
  for leaf, tensor in zip(("weight", "bias"), head):
    if any(head) and tensor is None:
      faults.add_missing(f"{source.head}.{leaf}", "of the classifier")
  faults.check(f"{path} ({source.name}) is no Video Swin")
  name, config, window_2d = _config(tensors, named, source, path, overrides)
  leaves = {}
  for ours, (key, transform) in named.items():
    if source.is_2d and ours.endswith("position_bias"):

      def transform(x):
        return inflate_bias(x, config.window_size, window_2d)

    tensor = tensors[key]
    leaves[ours] = LazyTensor(
      _shape(tensor, transform),
      tensor.dtype,
      lambda tensor=tensor, transform=transform: transform(np.asarray(tensor.read(), np.float32)),
    )
  return Checkpoint(path, source.name, name, config, leaves, ignored, head if all(head) else None)


def inflate_bias(table: np.ndarray, window: windows3d.Size, source_window: int) -> np.ndarray:
  """A 2D table of position biases [(2M-1)^2, heads] for a window of space and time.

  Every offset in time gets the same bias; another side than M is reached by bicubic resizing of the grid of
  offsets, as in the released code.
  """
  frames, rows, columns = (2 * side - 1 for side in window)
  side = 2 * source_window - 1
  grid = table.reshape(side, side, -1)
  if (rows, columns) != (side, side):
    grid = np.einsum("ia,jb,abh->ijh", _bicubic(side, rows), _bicubic(side, columns), grid)
  return np.tile(grid.reshape(rows * columns, -1), (frames, 1)).astype(np.float32)


def _bicubic(inputs: int, outputs: int) -> np.ndarray:
  """Weights [outputs, inputs] of PyTorch's bicubic resizing: a = -0.75, centres at halves, edges repeated."""
  a = -0.75
  matrix = np.zeros((outputs, inputs))
  for row in range(outputs):
    position = (row + 0.5) * inputs / outputs - 0.5
    first = math.floor(position)
    for tap in range(first - 1, first + 3):
      d = abs(position - tap)
      weight = ((a + 2) * d - (a + 3)) * d * d + 1 if d <= 1 else ((d - 5) * d + 8) * a * d - 4 * a
      matrix[row, min(max(tap, 0), inputs - 1)] += weight
  return matrix


def _detect(tensors: Mapping[str, LazyTensor], path: pathlib.Path) -> _Source:
  for source in _SOURCES:
    # The convolution tells 2D from 3D, the MLP one code from another.
    conv = tensors.get(f"{source.stem[0]}.weight")
    if (
      conv is not None
      and len(conv.shape) == (4 if source.is_2d else 5)
      and any(key.endswith(f".{source.mlp[0]}.weight") for key in tensors)
    ):
      return source
  raise ValueError(
    f"{path} has keys of no known checkpoint ({', '.join(source.name for source in _SOURCES)}); its "
    f"{len(tensors)} keys begin with {sorted(tensors)[:5]}."
  )


def _shape(tensor: LazyTensor, transform: Apply) -> tuple[int, ...]:
  """Shape after a transform, without reading."""
  return transform(np.broadcast_to(np.float32(0), tensor.shape)).shape


def _config(
  tensors: Mapping[str, LazyTensor],
  named: dict[str, Any],
  source: _Source,
  path: pathlib.Path,
  overrides: dict[str, Any],
) -> tuple[str | None, video_swin.VideoSwinConfig, int]:
  """(variant, shape, window of 2D weights) that the names and shapes tell."""
  blocks = [
    tuple(map(int, m.groups()))
    for m in (re.match(r"stages/(\d+)/blocks/(\d+)/", ours) for ours in named)
    if m
  ]
  stages = max((s for s, _ in blocks), default=-1) + 1
  depths = tuple(1 + max((b for s, b in blocks if s == stage), default=-1) for stage in range(stages))
  tables = [named.get(f"stages/{stage}/blocks/0/attn/position_bias") for stage in range(stages)]
  if not stages or not all(depths) or not all(tables):
    raise ValueError(
      f"{path} ({source.name}) is no Swin: {stages} stages of {depths} blocks, "
      f"{sum(map(bool, tables))} position bias tables."
    )
  shapes = [tensors[key].shape for key, _ in tables]
  embed_dim = tensors[f"{source.stem[0]}.weight"].shape[0]
  shape = dict(embed_dim=embed_dim, depths=depths, num_heads=tuple(rows[1] for rows in shapes))
  name = next(
    (
      row
      for row, config in video_swin.VARIANTS.items()
      if all(getattr(config, field) == value for field, value in shape.items())
    ),
    None,
  )
  config = video_swin.VARIANTS[name] if name else video_swin.VideoSwinConfig(**shape)
  overrides = {key: tuple(value) if isinstance(value, list) else value for key, value in overrides.items()}
  window_2d = 0
  if source.is_2d:
    window_2d = (math.isqrt(shapes[0][0]) + 1) // 2
    overrides.setdefault("window_size", (config.window_size[0], window_2d, window_2d))
  elif "window_size" not in overrides:
    overrides["window_size"] = _window(shapes[0][0], path)
  fields = [field.name for field in dataclasses.fields(video_swin.VideoSwinConfig)]
  unknown = [key for key in overrides if key not in fields]
  if unknown:
    raise ValueError(f"Unknown options {unknown} of a Video Swin; known: {fields}.")
  return name, dataclasses.replace(config, **overrides), window_2d


def _window(rows: int, path: pathlib.Path) -> windows3d.Size:
  """The window (D, M, M) whose table has so many rows, if only one with M > 1 and D > 1 has."""
  found = [
    ((rows // side**2 + 1) // 2, (side + 1) // 2, (side + 1) // 2)
    for side in range(3, math.isqrt(rows) + 1, 2)
    if rows % side**2 == 0 and rows // side**2 > 1
  ]
  if len(found) != 1:
    raise ValueError(
      f"{path}: position bias tables of {rows} rows fit the windows {found}; give window_size=(frames, "
      "rows, columns)."
    )
  return found[0]
