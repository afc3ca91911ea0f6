"""What heads say about one image or one video, in its own coordinates, as NumPy arrays."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from jaxtyping import Bool, Float, Int, UInt8
import numpy as np
from pycocotools import mask as mask_utils

from frozen_vision.metrics import coco_ap

Classes = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Detections:
  """Objects in an image, the most confident first.

  Attributes:
    size: (height, width) of the image.
    boxes: xyxy in pixels of the image.
    scores: confidence in 0..1.
    labels: index of each object's class in `class_names`.
    segmentations: each object's mask as COCO's compressed RLE; None of a detector without masks. `masks`
      decodes them: all bitmaps of a large photograph at once are gigabytes.
    class_names: by index.
  """

  size: tuple[int, int]
  boxes: Float[np.ndarray, "n 4"]
  scores: Float[np.ndarray, "n"]
  labels: Int[np.ndarray, "n"]
  segmentations: tuple[dict[str, Any], ...] | None
  class_names: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.scores)

  @property
  def names(self) -> list[str]:
    """The class of each object."""
    return [self.class_names[label] for label in self.labels]

  def masks(self) -> Bool[np.ndarray, "n h w"] | None:
    """Bitmaps of the whole image; None of a detector without masks."""
    if self.segmentations is None:
      return None
    masks = np.zeros((len(self), *self.size), bool)
    for mask, segmentation in zip(masks, self.segmentations):
      mask[:] = mask_utils.decode(segmentation)
    return masks

  def above(self, score: float) -> "Detections":
    """Those with at least this score."""
    kept = np.flatnonzero(self.scores >= score)
    segmentations = self.segmentations and tuple(self.segmentations[i] for i in kept)
    return dataclasses.replace(
      self,
      boxes=self.boxes[kept],
      scores=self.scores[kept],
      labels=self.labels[kept],
      segmentations=segmentations,
    )

  def coco_rows(self, image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Entries of COCO's results format: boxes are xywh there.

    Args:
      category_ids: by class index.
    """
    corners = self.boxes[:, :2]
    # `boxes` have three decimals; a difference of two of them has more only by rounding in binary.
    xywh = np.round(np.concatenate([corners, self.boxes[:, 2:] - corners], axis=1), 3).tolist()
    rows = [
      {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
      for label, box, score in zip(self.labels, xywh, self.scores.tolist())
    ]
    for row, segmentation in zip(rows, self.segmentations or ()):
      row["segmentation"] = segmentation
    return rows


@dataclasses.dataclass(frozen=True)
class LabelMap:
  """The class of every pixel of an image.

  Attributes:
    labels: index into `class_names`, at the image's own size.
    class_names: by index.
  """

  labels: UInt8[np.ndarray, "h w"]
  class_names: tuple[str, ...]

  def shares(self) -> dict[str, float]:
    """{class: its share of the pixels}, of the classes that occur, the largest first."""
    counts = np.bincount(self.labels.ravel(), minlength=len(self.class_names))
    order = np.argsort(-counts, kind="stable")
    return {self.class_names[i]: float(counts[i] / self.labels.size) for i in order if counts[i]}


@dataclasses.dataclass(frozen=True)
class ClassProbabilities:
  """One class for a whole image or video.

  Attributes:
    probabilities: of every class; their sum is 1.
    class_names: by index.
  """

  probabilities: Float[np.ndarray, "classes"]
  class_names: tuple[str, ...]

  def top(self, k: int = 5) -> list[tuple[str, float]]:
    """The k likeliest classes with their probabilities."""
    order = np.argsort(-self.probabilities, kind="stable")[:k]
    return [(self.class_names[i], float(self.probabilities[i])) for i in order]


Result = Detections | LabelMap | ClassProbabilities


def class_names(classes: Classes) -> tuple[str, ...]:
  return tuple(str(category["name"]) for category in classes)


def detections(
  outputs: Mapping[str, np.ndarray],
  batch: Mapping[str, np.ndarray],
  count: int,
  classes: Classes,
) -> list[Detections]:
  """The detections of the first `count` examples of a batch, exactly as evaluation would write them.

  Args:
    outputs: of a detector, in input pixels; see `coco_ap.CocoEvaluator.update`.
    batch: `image_size` and `original_size`, (h, w) of the content and of the source image.
  """
  sizes = np.asarray(batch["original_size"])[:count].tolist()
  evaluator = coco_ap.CocoEvaluator(
    {
      "images": [{"id": i, "height": h, "width": w} for i, (h, w) in enumerate(sizes)],
      "categories": [{"id": label} for label in range(len(classes))],
    },
    ("bbox", "segm") if "masks" in outputs else ("bbox",),
  )
  ids = np.arange(len(batch["original_size"]))
  evaluator.update(
    outputs,
    {
      "image_size": batch["image_size"],
      "original_size": batch["original_size"],
      "image_id": ids,
      "example_valid": ids < count,
    },
  )
  rows: list[list[dict[str, Any]]] = [[] for _ in sizes]
  for row in evaluator.detections():
    rows[row["image_id"]].append(row)
  names = class_names(classes)
  result = []
  for size, found in zip(sizes, rows):
    xywh = np.array([row["bbox"] for row in found], np.float64).reshape(-1, 4)
    corners = xywh[:, :2]
    result.append(
      Detections(
        tuple(size),
        np.round(np.concatenate([corners, corners + xywh[:, 2:]], axis=1), 3),
        np.array([row["score"] for row in found], np.float64),
        np.array([row["category_id"] for row in found], np.int64),
        tuple(row["segmentation"] for row in found) if "masks" in outputs else None,
        names,
      )
    )
  return result
