"""Folders of ArrayRecord shards that `python -m frozen_vision.data.prepare` has written; no TensorFlow.

One split of one kind of data is the folder `OUT/BUILDER/SPLIT/VERSION`, which a TFDS builder has filled, with
an index beside the shards. The index is written last: a folder that has it is complete.
"""

from collections.abc import Mapping
import dataclasses
import functools
import hashlib
import os
import pathlib
from typing import Any
import zipfile

import numpy as np

from frozen_vision.data import fingerprint, text_files
from frozen_vision.data import names as data_names
from frozen_vision.files import atomic

_BUILDERS = "frozen_vision_"  # how the names of all builders begin
_METADATA_FILE = "metadata.json"  # TFDS's name for it
_INDEX_FILE = "index.npz"


class PreparedError(ValueError):
  """Prepared data that are damaged; the message names the file and how to make it again."""


@dataclasses.dataclass(frozen=True)
class Kind:
  """One kind of prepared data.

  Attributes:
    builder: name of its TFDS builder, and of a folder below the one given to `prepare`.
    command: the arguments of `prepare` that make it, `{out}` and `{split}` for where.
    fields: what every record holds.
    version: of what is in the shards.
  """

  builder: str
  command: str
  fields: tuple[str, ...] = ()
  version: str = "1.0.0"

  def folder(self, out: str | os.PathLike[str], split: str) -> pathlib.Path:
    """The folder of the shards of `split`, below the one given to `prepare`."""
    return pathlib.Path(out) / self.builder / split / self.version

  def is_complete(self, out: str | os.PathLike[str], split: str) -> bool:
    return (self.folder(out, split) / _INDEX_FILE).is_file()

  def complete(self, out: str | os.PathLike[str], split: str, **index: np.ndarray) -> None:
    """Adds the index to finished shards, and so completes them."""
    with atomic.open_aside(self.folder(out, split) / _INDEX_FILE) as file:
      np.savez(file, **index)

  def require(self, out: str | os.PathLike[str], split: str) -> pathlib.Path:
    """The folder of a complete split.

    Raises:
      FileNotFoundError: nothing complete is there; says what is, and how to make it.
    """
    target = self.folder(out, split)
    if not self.is_complete(out, split):
      state = "is incomplete" if target.is_dir() else "is absent"
      found = splits_below(out)
      raise FileNotFoundError(
        f"{target} {state}; prepare it with: python -m frozen_vision.data.prepare "
        + self.command.format(out=out, split=split)
        + (f" (prepared in {out}: {', '.join(found)})" if found else "")
      )
    return target


def splits_below(out: str | os.PathLike[str]) -> list[str]:
  """`BUILDER/SPLIT` of everything complete below a folder."""
  found = pathlib.Path(out).glob(f"{_BUILDERS}*/*/*/{_INDEX_FILE}")
  return sorted({"/".join(path.parts[-4:-2]) for path in found})


def locate(path: str | os.PathLike[str]) -> tuple[pathlib.Path, str, str] | None:
  """(out, builder, split) of a folder `OUT/BUILDER/SPLIT` or `OUT/BUILDER/SPLIT/VERSION`, else None."""
  path = pathlib.Path(path).absolute()
  for folder in (path, path.parent):
    # Any folder may have such a name; a split has versions in it, be they complete or not.
    if folder.parent.name.startswith(_BUILDERS) and any(folder.glob("[0-9]*.[0-9]*.[0-9]*")):
      return folder.parent.parent, folder.parent.name, folder.name
  return None


class Shards:
  """The examples of one split, by position; sent to a worker process it is a path."""

  def __init__(self, kind: Kind, out: str | os.PathLike[str], split: str):
    """Raises FileNotFoundError as `Kind.require`."""
    self.folder = kind.require(out, split)
    self.split = split
    self._kind = kind
    self._command = kind.command.format(out=out, split=split)

  def identity(self) -> dict[str, int]:
    """Names and sizes of the files of the split, for its fingerprint."""
    files = self.files()
    return dict(zip([path.name for path in files], fingerprint.file_sizes(files).tolist()))

  def file_digest(self, name: str) -> str:
    """SHA-256 of a file beside the shards; raises PreparedError where it is absent."""
    try:
      with open(self.folder / name, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
      raise self.damaged(name, error) from error

  def damaged(self, what: str, reason: str | Exception) -> PreparedError:
    """The error that says which file of the split cannot be used."""
    if isinstance(reason, Exception):
      reason = f"{type(reason).__name__}: {' '.join(str(reason).split())[:200]}"
    return PreparedError(
      f"{self.folder / what} is damaged ({reason}). Prepare the split again: "
      f"python -m frozen_vision.data.prepare {self._command} --overwrite"
    )

  def metadata(self, **fields: type | tuple[type, ...]) -> dict[str, Any]:
    """The metadata that the builder has stored beside the shards.

    Args:
      fields: names and types of what it must hold.

    Raises:
      PreparedError: it is damaged.
    """
    stored = self.json(_METADATA_FILE)
    if not isinstance(stored, dict):
      raise self.damaged(_METADATA_FILE, f"it holds a {type(stored).__name__}, expected an object")
    for name, kind in fields.items():
      if not isinstance(stored.get(name), kind):
        raise self.damaged(_METADATA_FILE, f"{name} is absent or of the wrong kind")
    return stored

  def json(self, name: str) -> Any:
    """The content of a JSON file beside the shards; raises PreparedError."""
    try:
      return text_files.read_json(self.folder / name, max_bytes=2**36)
    except text_files.TextError as error:
      raise self.damaged(name, str(error).removeprefix(f"{self.folder / name}")) from error

  def index(self, **arrays: str) -> dict[str, np.ndarray]:
    """The arrays beside the shards.

    Args:
      arrays: names of what it must hold, each with the kinds of dtype that it may have (numpy's letters).

    Raises:
      PreparedError: it is damaged, or would become larger than its file.
    """
    path = self.folder / _INDEX_FILE
    try:
      size = path.stat().st_size
      with zipfile.ZipFile(path) as archive:
        # numpy.savez compresses nothing: a member that says so could be of any size.
        if any(member.compress_type or member.file_size > size for member in archive.infolist()):
          raise self.damaged(_INDEX_FILE, "a member is compressed, or larger than the file")
      with np.load(path, allow_pickle=False) as archive:
        index = dict(archive)
    except PreparedError:
      raise
    except Exception as error:  # zipfile and numpy raise BadZipFile, KeyError, ValueError, ...
      raise self.damaged(_INDEX_FILE, error) from error
    for name, kinds in arrays.items():
      if not isinstance(index.get(name), np.ndarray) or index[name].dtype.kind not in kinds:
        raise self.damaged(_INDEX_FILE, f"{name} is absent or of the wrong kind")
      if index[name].ndim != 1:
        raise self.damaged(_INDEX_FILE, f"{name} has {index[name].ndim} axes, expected 1")
    return index

  def names(self, index: Mapping[str, np.ndarray]) -> list[str]:
    """`names` of the index; raises PreparedError where one leads out of a folder."""
    names = [str(name) for name in index["names"]]
    for name in names:
      if data_names.leads_outside(name):
        raise self.damaged(_INDEX_FILE, f"{name!r} is no name of an image below a folder")
    return names

  def require_length(self, expected: int, **arrays: np.ndarray) -> None:
    """Raises PreparedError where an array of the index does not have the expected length."""
    for name, array in arrays.items():
      if len(array) != expected:
        raise self.damaged(_INDEX_FILE, f"{name} has {len(array)} entries, expected {expected}")

  def files(self) -> list[pathlib.Path]:
    """All files of the split; see `data.content`."""
    return sorted(path for path in self.folder.iterdir() if path.is_file())

  def __getitem__(self, position: int) -> dict[str, Any]:
    try:
      record = self._examples[position]
    except PreparedError:
      raise
    except Exception as error:  # ArrayRecord and protobuf raise RuntimeError, ParseError, IndexError, ...
      raise self.damaged(self.shard_of(position), error) from error
    # A record of zeros is read as one without content.
    empty = [name for name in self._kind.fields if record.get(name) is None]
    if empty:
      raise self.damaged(self.shard_of(position), f"example {position} has no {', '.join(empty)}")
    return record

  def __getstate__(self) -> dict[str, Any]:
    return {key: value for key, value in self.__dict__.items() if key != "_examples"}

  @functools.cached_property
  def _examples(self) -> Any:
    import tensorflow_datasets as tfds  # takes seconds, and looking up paths does not need it

    try:
      return tfds.builder_from_directory(self.folder).as_data_source(self.split)
    except Exception as error:  # JSON, protobuf and TFDS raise their own
      raise self.damaged("dataset_info.json, features.json or a shard", error) from error

  def shard_of(self, position: int) -> str:
    """The name of the shard that holds an example, as far as the description of the set can be read."""
    try:
      (split,) = (entry for entry in self.json("dataset_info.json")["splits"] if entry["name"] == self.split)
      lengths = [int(length) for length in split["shardLengths"]]
      number = int(np.searchsorted(np.cumsum(lengths), position, side="right"))
      (path,) = self.folder.glob(f"*-{number:05d}-of-{len(lengths):05d}")
      return path.name
    except (ValueError, KeyError, TypeError):
      return f"the shard of example {position}"
