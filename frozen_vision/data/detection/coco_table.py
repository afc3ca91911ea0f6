"""Compact storage of COCO annotations: flat arrays, one record at a time made from them.

118k images with 860k annotations are gigabytes as Python objects, which every loader process
would hold once more; as flat arrays and one block of text they are a few hundred megabytes.
"""

from collections.abc import Sequence
import dataclasses
import json
from typing import Any, Self

from jaxtyping import Bool, Float32, Int32, Int64
import numpy as np

from frozen_vision.data.detection import coco_annotations as checks


@dataclasses.dataclass(frozen=True)
class CocoTable:
  """Images in order, and their annotations in the order of images.

  Attributes:
    image_ids: official ids.
    file_names: as in the annotation file.
    sizes: (height, width).
    starts: annotations of image i are starts[i] to starts[i + 1].
    boxes: xyxy in pixels.
    labels: 0..num_classes-1.
    crowd: COCO's iscrowd.
    area: pixels.
    annotation_ids: unique, above 0.
    segment_starts: segmentation of annotation j is text[segment_starts[j]:segment_starts[j + 1]].
    text: JSON of all segmentations.
  """

  image_ids: Int64[np.ndarray, "m"]
  file_names: tuple[str, ...]
  sizes: Int32[np.ndarray, "m 2"]
  starts: Int64[np.ndarray, "m_plus_1"]
  boxes: Float32[np.ndarray, "a 4"]
  labels: Int32[np.ndarray, "a"]
  crowd: Bool[np.ndarray, "a"]
  area: Float32[np.ndarray, "a"]
  annotation_ids: Int64[np.ndarray, "a"]
  segment_starts: Int64[np.ndarray, "a_plus_1"]
  text: bytes

  @classmethod
  def build(cls, images: Sequence[checks.ImageRow], annotations: Sequence[checks.AnnotationRow]) -> Self:
    """The table of `images`; annotations whose box is None are left out."""
    position = {row.id: i for i, row in enumerate(images)}
    rows = [row for row in annotations if row.box is not None]
    rows.sort(key=lambda row: position[row.image_id])  # stable: the file's order within an image
    counts = np.bincount([position[row.image_id] for row in rows], minlength=len(images))
    texts = [row.segmentation.encode("ascii") for row in rows]
    return cls(
      image_ids=np.asarray([row.id for row in images], np.int64),
      file_names=tuple(row.file_name for row in images),
      sizes=np.asarray([(r.height, r.width) for r in images], np.int32).reshape(-1, 2),
      starts=_starts(counts),
      boxes=np.asarray([row.box for row in rows], np.float32).reshape(-1, 4),
      labels=np.asarray([row.label for row in rows], np.int32),
      crowd=np.asarray([row.crowd for row in rows], bool),
      area=np.asarray([row.area for row in rows], np.float32),
      annotation_ids=np.asarray([row.id for row in rows], np.int64),
      segment_starts=_starts([len(text) for text in texts]),
      text=b"".join(texts),
    )

  def __len__(self) -> int:
    return len(self.image_ids)

  def take(self, indices: Int64[np.ndarray, "k"]) -> Self:
    """The table of the images at `indices`, in that order."""
    spans = [np.arange(self.starts[i], self.starts[i + 1]) for i in indices]
    chosen = np.concatenate(spans) if spans else np.zeros(0, np.int64)
    texts = [self.text[self.segment_starts[j] : self.segment_starts[j + 1]] for j in chosen]
    return CocoTable(
      image_ids=self.image_ids[indices],
      file_names=tuple(self.file_names[i] for i in indices),
      sizes=self.sizes[indices],
      starts=_starts([len(span) for span in spans]),
      boxes=self.boxes[chosen],
      labels=self.labels[chosen],
      crowd=self.crowd[chosen],
      area=self.area[chosen],
      annotation_ids=self.annotation_ids[chosen],
      segment_starts=_starts([len(text) for text in texts]),
      text=b"".join(texts),
    )

  def objects_per_image(self) -> Int64[np.ndarray, "m"]:
    """Annotations of each image that are not crowds."""
    owner = np.repeat(np.arange(len(self)), np.diff(self.starts))
    return np.bincount(owner[~self.crowd], minlength=len(self)).astype(np.int64)

  def objects(self) -> tuple[Int64[np.ndarray, "a"], Float32[np.ndarray, "a 4"]]:
    """(position of the image, box) of every annotation that is no crowd."""
    owner = np.repeat(np.arange(len(self)), np.diff(self.starts))
    return owner[~self.crowd], self.boxes[~self.crowd]

  def image_rows(self) -> list[checks.ImageRow]:
    return [
      checks.ImageRow(int(identity), name, int(height), int(width))
      for identity, name, (height, width) in zip(self.image_ids, self.file_names, self.sizes)
    ]

  def segment_texts(self, index: int) -> list[bytes]:
    """JSON of each segmentation of image `index`."""
    edges = self.segment_starts[self.starts[index] : self.starts[index + 1] + 1]
    return [self.text[edges[j] : edges[j + 1]] for j in range(len(edges) - 1)]

  def record(self, index: int) -> dict[str, Any]:
    """The record of image `index` without its pixels; arrays are copies."""
    span = slice(self.starts[index], self.starts[index + 1])
    return {
      "image_id": int(self.image_ids[index]),
      "file_name": self.file_names[index],
      "height": int(self.sizes[index, 0]),
      "width": int(self.sizes[index, 1]),
      "boxes": self.boxes[span].copy(),
      "labels": self.labels[span].copy(),
      "segmentations": [json.loads(text) for text in self.segment_texts(index)],
      "crowd": self.crowd[span].copy(),
      "area": self.area[span].copy(),
      "annotation_ids": self.annotation_ids[span].copy(),
    }


def _starts(lengths: Sequence[int] | np.ndarray) -> Int64[np.ndarray, "n_plus_1"]:
  return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
