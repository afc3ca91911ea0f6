"""Reads labelled images that `python -m frozen_vision.data.prepare` has written; no TensorFlow."""

import functools
import json
import os
import pathlib
from typing import Any

import numpy as np
from jaxtyping import UInt8

from frozen_vision.data import label_maps, segmentation

BUILDER_NAME = "frozen_vision_segmentation"
VERSION = "1.0.0"
_METADATA_FILE = "metadata.json"  # TFDS's name for it
# Written last: a folder that has it is complete.
_INDEX_FILE = "index.npz"


def folder(out: str | os.PathLike[str], split: str) -> pathlib.Path:
  """Where the shards of `split` lie below the folder given to `prepare`."""
  return pathlib.Path(out) / BUILDER_NAME / split / VERSION


def is_complete(out: str | os.PathLike[str], split: str) -> bool:
  return (folder(out, split) / _INDEX_FILE).is_file()


def metadata(source: segmentation.SegmentationSource) -> dict[str, Any]:
  """What the builder stores beside the shards."""
  return {"class_names": list(source.class_names), "source": repr(source)}


def write_index(source: segmentation.SegmentationSource, out: str | os.PathLike[str], split: str) -> None:
  """Adds the index to finished shards, and so completes them."""
  target = folder(out, split)
  partial = target / f"partial_{_INDEX_FILE}"
  np.savez(
      partial, names=np.array([source.name(i) for i in range(len(source))]),
      largest_size=np.array(source.largest_size))
  partial.rename(target / _INDEX_FILE)


class PreparedSegmentation(segmentation.EncodedSource):
  """Prepared labelled images: the same records, in the same order, as the source they were made from."""

  def __init__(self, directory: str | os.PathLike[str], split: str):
    """Opens a split.

    Args:
      directory: the folder that was `--out` of the preparation.
      split: the `--split` of the preparation.

    Raises:
      FileNotFoundError: nothing complete is there.
    """
    self.split = split
    self._folder = folder(directory, split)
    if not is_complete(directory, split):
      state = "is incomplete" if self._folder.is_dir() else "is absent"
      raise FileNotFoundError(
          f"{self._folder} {state}; prepare it with: python -m frozen_vision.data.prepare ade20k --root "
          f"ADE20K --out {directory} --split {split}, or with the command segmentation for other data.")
    stored = json.loads((self._folder / _METADATA_FILE).read_text(encoding="utf-8"))
    self.class_names = tuple(stored["class_names"])
    self._format = label_maps.LabelFormat(self.class_names)
    with np.load(self._folder / _INDEX_FILE) as index:
      self._names = index["names"]
      self.largest_size = tuple(index["largest_size"].tolist())

  def __len__(self) -> int:
    return len(self._names)

  def __repr__(self) -> str:
    return f"PreparedSegmentation({self._folder}, {len(self)} images, {self.num_classes} classes)"

  def __getstate__(self) -> dict[str, Any]:
    return {key: value for key, value in self.__dict__.items() if key != "_shards"}

  @functools.cached_property
  def _shards(self) -> Any:
    import tensorflow_datasets as tfds  # takes seconds; those who only look up paths need it not

    return tfds.builder_from_directory(self._folder).as_data_source(self.split)

  def name(self, index: int) -> str:
    return str(self._names[index])

  def image_bytes(self, index: int) -> bytes:
    return self._stored(index)["image"]

  def label(self, index: int) -> UInt8[np.ndarray, "h w"] | None:
    data = self._stored(index)["label"]
    return self._format.decode(data, name=self.name(index)) if data else None

  def _stored(self, index: int) -> dict[str, Any]:
    if not 0 <= index < len(self):
      raise IndexError(f"image {index} of {len(self)}.")
    return self._shards[index]
