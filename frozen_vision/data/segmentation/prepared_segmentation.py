"""Reads labelled images that `python -m frozen_vision.data.prepare` has written; no TensorFlow."""

import os
from typing import Any

from jaxtyping import UInt8
import numpy as np

from frozen_vision.data import prepared
from frozen_vision.data.segmentation import label_maps, sources

KIND = prepared.Kind(
  "frozen_vision_segmentation",
  "ade20k --root ADE20K --out {out} --split {split}, or with the command segmentation for other data.",
  fields=("image", "label", "name"),
)


def metadata(source: sources.SegmentationSource) -> dict[str, Any]:
  """The metadata that the builder stores beside the shards."""
  return {"class_names": list(source.class_names), "source": repr(source)}


def write_index(source: sources.SegmentationSource, out: str | os.PathLike[str], split: str) -> None:
  """Adds the index to finished shards, and so completes them."""
  KIND.complete(
    out,
    split,
    names=np.array([source.name(i) for i in range(len(source))]),
    largest_size=np.array(source.largest_size),
  )


class PreparedSegmentation(sources.EncodedSource):
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
    self._shards = prepared.Shards(KIND, directory, split)
    index = self._shards.index(names="U", largest_size="i")
    self._shards.require_length(2, largest_size=index["largest_size"])
    self.class_names = tuple(self._shards.metadata(class_names=list)["class_names"])
    try:
      self._format = label_maps.LabelFormat(self.class_names)
    except (ValueError, TypeError) as error:
      raise self._shards.damaged("metadata.json", error) from error
    self._names = self._shards.names(index)
    self.largest_size = tuple(index["largest_size"].tolist())

  def __len__(self) -> int:
    return len(self._names)

  def __repr__(self) -> str:
    return f"PreparedSegmentation({self._shards.folder}, {len(self)} images, {self.num_classes} classes)"

  def identity(self) -> dict[str, Any]:
    """See `fingerprint.Identified`."""
    return {"file names": self._names, "shards": self._shards.identity()}

  def name(self, index: int) -> str:
    return self._names[index]

  def image_bytes(self, index: int) -> bytes:
    return self._stored(index)["image"]

  def label_counting(self, index: int) -> tuple[UInt8[np.ndarray, "h w"] | None, dict[str, int]]:
    """See `EncodedSource`."""
    data = self._stored(index)["label"]
    return self._format.decode_counting(data, name=self.name(index)) if data else (None, {})

  def _stored(self, index: int) -> dict[str, Any]:
    if not 0 <= index < len(self):
      raise IndexError(f"image {index} of {len(self)}.")
    return self._shards[index]
