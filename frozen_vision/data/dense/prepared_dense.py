"""Reads normals and depth that `python -m frozen_vision.data.prepare` has written; no TensorFlow."""

import os
from typing import Any

import numpy as np

from frozen_vision.data import prepared
from frozen_vision.data.dense import folders, sources

KIND = prepared.Kind(
  "frozen_vision_dense",
  "nyuv2 --root NYUV2 --out {out}, or with the command dense for other data, --split {split}.",
  fields=("image", "name"),
)


def metadata(source: folders.DenseFolders) -> dict[str, Any]:
  """The metadata that the builder stores beside the shards."""
  return {"targets": list(source.targets), "source": repr(source)}


def write_index(source: folders.DenseFolders, out: str | os.PathLike[str], split: str) -> None:
  """Adds the index to finished shards, and so completes them."""
  names = np.array([source.name(i) for i in range(len(source))])
  KIND.complete(out, split, names=names, largest_size=np.array(source.largest_size))


class PreparedDense(folders.EncodedDense):
  """Prepared data: the same records, in the same order, as the source they were made from."""

  def __init__(
    self, directory: str | os.PathLike[str], split: str, format: folders.MapFormat = folders.MapFormat()
  ):
    """Opens a split.

    Args:
      directory: the folder that was `--out` of the preparation.
      split: the `--split` of the preparation.
      format: files are kept as they were, so it says how they are meant here as well.

    Raises:
      FileNotFoundError: nothing complete is there.
    """
    self.format = format
    self._shards = prepared.Shards(KIND, directory, split)
    index = self._shards.index(names="U", largest_size="i")
    self._shards.require_length(2, largest_size=index["largest_size"])
    stored = self._shards.metadata(targets=list)["targets"]
    self.targets = tuple(name for name in sources.TARGETS if name in stored)
    if len(self.targets) != len(stored) or not stored:
      raise self._shards.damaged("metadata.json", f"targets are {str(stored)[:60]}")
    self._names = self._shards.names(index)
    self.largest_size = tuple(index["largest_size"].tolist())

  def __len__(self) -> int:
    return len(self._names)

  def __repr__(self) -> str:
    return f"PreparedDense({self._shards.folder}, {len(self)} images, {' and '.join(self.targets)})"

  def identity(self) -> dict[str, Any]:
    """See `fingerprint.Identified`."""
    return {
      "file names": self._names,
      "shards": self._shards.identity(),
      "format": repr(self.format),
    }

  def name(self, index: int) -> str:
    return self._names[index]

  def encoded(self, index: int, what: str) -> tuple[str, bytes]:
    """See `EncodedDense`."""
    if not 0 <= index < len(self):
      raise IndexError(f"image {index} of {len(self)}.")
    record = self._shards[index]
    suffix = record[f"{what}_suffix"].decode("utf-8", "replace")
    return f"{self._names[index]}{suffix}", record[what]
