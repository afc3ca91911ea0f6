"""Opens a checkpoint of any kind that is read here: safetensors, PyTorch's, npz, TensorFlow's."""

from collections.abc import Mapping
import dataclasses
import os
import pathlib
import re

import numpy as np

from frozen_vision.files import numpy_file, state_dicts, tensorflow_checkpoint, tensors, torch_file
from frozen_vision.files.formats import FileFormatError, parse_json
from frozen_vision.files.tensors import LazyTensor

_INDEX_SUFFIX = ".index.json"
# Names of weights in a repository of the Hugging Face Hub.
WEIGHTS_IN_FOLDERS = ("model.safetensors.index.json", "model.safetensors")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)")
_MAX_SHARDS = 10_000
# Tied weights lie in a file once and are read twice.
_MAX_REPETITION = 4


@dataclasses.dataclass(frozen=True)
class CheckpointFile:
  """Tensors of a checkpoint, none of them read yet.

  Attributes:
    path: the file, or the one of several that was named.
    tensors: by their names in the file, without `module.` and `_orig_mod.`.
    metadata: of a `.safetensors` header.
    others: names of everything else in the file.
  """

  path: pathlib.Path
  tensors: dict[str, LazyTensor]
  metadata: dict[str, str]
  others: list[str]

  def read_all(self) -> dict[str, np.ndarray]:
    """Every tensor, in memory.

    Raises:
      FileFormatError: together they are several times as large as the file, as views of one storage can be.
    """
    total = sum(
      tensor.dtype.itemsize * int(np.prod(tensor.shape, dtype=object)) for tensor in self.tensors.values()
    )
    size = self.path.stat().st_size
    if (
      self.path.suffix != tensorflow_checkpoint.INDEX_SUFFIX
      and not _SHARD.fullmatch(self.path.name)
      and total > _MAX_REPETITION * size + (1 << 24)
    ):
      raise FileFormatError(self.path, f"has {size:,} bytes and describes tensors of {total:,}.")
    return {name: tensor.read() for name, tensor in self.tensors.items()}


def split_part(source: str | os.PathLike) -> tuple[pathlib.Path, str | None]:
  """(file, part) of `FILE:PART`, where FILE exists; (path, None) of anything else.

  The part names one of several state dicts in a file, such as `dino.pth:teacher`.
  """
  path = pathlib.Path(source).expanduser()
  if not path.exists() and ":" in path.name:
    file, _, part = os.fspath(path).rpartition(":")
    if part and pathlib.Path(file).is_file():
      return pathlib.Path(file), part
  return path, None


def open_checkpoint(source: str | os.PathLike) -> CheckpointFile:
  """Opens a checkpoint without reading a tensor.

  Args:
    source: a `.safetensors` file, an `.npz`, the `.index` of TensorFlow's checkpoint, or a file of PyTorch's,
      whatever its ending. A checkpoint in several files is named by any shard
      (`model-00002-of-00005.safetensors`), by its index (`model.safetensors.index.json`) or by the folder
      with it. `:PART` at the end chooses one of several
      state dicts in a file (`state_dicts.choose`).

  Raises:
    FileNotFoundError: no such file, or a shard is missing.
    FileFormatError: damaged, or of another format.
  """
  path, part = split_part(source)
  path = weights_in_folder(path) or path
  tensors.check_file(path)
  match = _SHARD.fullmatch(path.name)
  if path.name.endswith(_INDEX_SUFFIX):
    return _join(path, shards_of_index(path))
  if match:
    index = path.with_name(f"{match[1]}{match[4]}{_INDEX_SUFFIX}")
    if index.is_file():
      return _join(path, shards_of_index(index))
    return _open_shards(path, match)
  return _open_one(path, part)


def weights_in_folder(folder: pathlib.Path) -> pathlib.Path | None:
  """The index or the file of weights in a folder; None where there is none, or no folder."""
  return next((folder / name for name in WEIGHTS_IN_FOLDERS if (folder / name).is_file()), None)


def _open_one(path: pathlib.Path, part: str | None) -> CheckpointFile:
  if path.suffix == ".safetensors":
    if part is not None:
      raise FileFormatError(path, f"is a safetensors file, which has no parts such as {part!r}.")
    found, metadata = tensors.open_safetensors(path)
    return CheckpointFile(path, state_dicts.strip_prefixes(found), metadata, [])
  if path.suffix == ".npz":
    return CheckpointFile(path, numpy_file.open_npz(path), {}, [])
  if path.suffix == tensorflow_checkpoint.INDEX_SUFFIX:
    if part is not None:
      raise FileFormatError(path, f"is TensorFlow's checkpoint, which has no parts such as {part!r}.")
    found, others = tensorflow_checkpoint.open_tensorflow(path)
    return CheckpointFile(path, found, {}, others)
  index = tensorflow_checkpoint.index_of_data(path)
  if index is not None:
    raise FileFormatError(path, f"is the data of TensorFlow's checkpoint; give its index, {index.name}.")
  found, others = torch_file.open_torch(path, part)
  return CheckpointFile(path, found, {}, others)


def _open_shards(path: pathlib.Path, match: re.Match[str]) -> CheckpointFile:
  """All shards of which one was named, where there is no index: each says how many there are."""
  stem, count, suffix = match[1], int(match[3]), match[4]
  if not 1 <= count <= _MAX_SHARDS:
    raise FileFormatError(path, f"says that it is one of {count:,} shards.")
  shards = [path.with_name(f"{stem}-{index:05d}-of-{count:05d}{suffix}") for index in range(1, count + 1)]
  return _join(path, {shard: None for shard in shards})


def shards_of_index(index: pathlib.Path) -> dict[pathlib.Path, set[str]]:
  """The shards that an index lists, as files beside it, each with the tensors that it must hold.

  Raises:
    FileFormatError: no index, or one whose shards are not beside it.
  """
  content = parse_json(index.read_bytes(), index, "it")
  places = content.get("weight_map") if isinstance(content, dict) else None
  if not isinstance(places, dict) or not places:
    raise FileFormatError(index, "is no index of shards: it holds no weight_map.")
  shards: dict[pathlib.Path, set[str]] = {}
  for key, name in places.items():
    if not isinstance(name, str) or pathlib.PurePath(name).name != name or name.startswith("."):
      raise FileFormatError(index, f"places {key} in {name!r:.80}; a shard is a file beside the index.")
    shards.setdefault(index.with_name(name), set()).add(key)
  if len(shards) > _MAX_SHARDS:
    raise FileFormatError(index, f"lists {len(shards):,} shards.")
  return shards


def _join(named: pathlib.Path, shards: Mapping[pathlib.Path, set[str] | None]) -> CheckpointFile:
  """One checkpoint of several files; with the keys that each must hold, if an index says them."""
  absent = [shard.name for shard in shards if not shard.is_file()]
  if absent:
    raise FileNotFoundError(
      f"{named} is one of {len(shards)} shards, of which {len(absent)} are not beside it: "
      f"{', '.join(absent[:5])}."
    )
  joined: dict[str, LazyTensor] = {}
  metadata: dict[str, str] = {}
  others: list[str] = []
  for shard, wanted in shards.items():
    tensors.check_file(shard)
    one = _open_one(shard, None)
    twice = sorted(set(joined) & set(one.tensors))
    if twice:
      raise FileFormatError(shard, f"holds {twice[:5]}, which another shard holds too.")
    if wanted is not None and not wanted <= set(one.tensors):
      raise FileFormatError(
        shard, f"lacks {sorted(wanted - set(one.tensors))[:5]}, which the index says that it holds."
      )
    joined |= one.tensors
    metadata |= one.metadata
    others += one.others
  return CheckpointFile(named, state_dicts.strip_prefixes(joined), metadata, others)
