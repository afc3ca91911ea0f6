"""Folders of ArrayRecord shards that `python -m frozen_vision.data.prepare` has written; no TensorFlow.

One split of one kind of data is the folder `OUT/BUILDER/SPLIT/VERSION`, which a TFDS builder has filled, with
an index beside the shards. The index is written last: a folder that has it is complete.
"""

import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

import numpy as np

from frozen_vision.files import atomic

_BUILDERS = "frozen_vision_"  # how the names of all builders begin
_METADATA_FILE = "metadata.json"  # TFDS's name for it
_INDEX_FILE = "index.npz"


@dataclasses.dataclass(frozen=True)
class Kind:
  """One kind of prepared data.

  Attributes:
    builder: name of its TFDS builder, and of a folder below the one given to `prepare`.
    command: the arguments of `prepare` that make it, `{out}` and `{split}` for where.
    version: of what is in the shards.
  """

  builder: str
  command: str
  version: str = "1.0.0"

  def folder(self, out: str | os.PathLike[str], split: str) -> pathlib.Path:
    """Where the shards of `split` lie below the folder given to `prepare`."""
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

  def metadata(self) -> dict[str, Any]:
    """What the builder has stored beside the shards."""
    return json.loads((self.folder / _METADATA_FILE).read_text(encoding="utf-8"))

  def index(self) -> dict[str, np.ndarray]:
    with np.load(self.folder / _INDEX_FILE) as index:
      return dict(index)

  def __getitem__(self, position: int) -> dict[str, Any]:
    return self._examples[position]

  def __getstate__(self) -> dict[str, Any]:
    return {key: value for key, value in self.__dict__.items() if key != "_examples"}

  @functools.cached_property
  def _examples(self) -> Any:
    import tensorflow_datasets as tfds  # takes seconds; those who only look up paths need it not

    return tfds.builder_from_directory(self.folder).as_data_source(self.split)
