"""Average precision of boxes as PASCAL VOC measures it, beside COCO's.

Detections of a class are taken in the order of their scores. Each belongs to the object of its image that it
overlaps most; it is right if the IoU is above the threshold and the object has not been found before, it does
not count if that object is difficult, and is wrong otherwise. The average precision is that of VOC 2007, the
mean of the highest precision at recall 0, 0.1, ..., 1 or more, or the area below the curve of falling
precision, from 2010 on. Classes without an object that is not difficult have none.

`voc_AP50` is VOC's own number, `voc_AP` the mean over IoU 0.5, 0.55, ..., 0.95: AP50, AP75 and AP as
2011.13377 reports them, by detectron2's evaluator. Neither scores nor boxes are rounded for it here.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxtyping import Bool, Float
import numpy as np

from frozen_vision.data.detection import voc
from frozen_vision.metrics import coco_ap

THRESHOLDS = tuple(percent / 100 for percent in range(50, 100, 5))


def measured_by(ground_truth: Mapping[str, Any]) -> voc.AveragePrecision | None:
  """How VOC measures a data set; None of one that is not VOC's."""
  info = ground_truth.get("info")
  found = info.get(voc.AP_KEY) if isinstance(info, Mapping) else None
  return found if found in ("11_points", "area") else None


class VocEvaluator(coco_ap.CocoEvaluator):
  """Collects detections and measures boxes by COCO's metrics and by VOC's."""

  def __init__(self, ground_truth: Mapping[str, Any]):
    """Starts empty.

    Args:
      ground_truth: content of a COCO annotation file, with `difficult` in annotations; its `info` says how
        the average precision is measured (`measured_by`).
    """
    super().__init__(ground_truth, ("bbox",))
    self._voc_truth = ground_truth

  def result(self) -> dict[str, float]:
    """COCO's numbers, and `voc_AP`, `voc_AP50`, `voc_AP75` in 0..1. Every process must call it."""
    found = super().result()
    if not found:
      return found
    measure = measured_by(self._voc_truth) or "area"
    return found | average_precision(self._voc_truth, self.detections(), measure)


def average_precision(
  ground_truth: Mapping[str, Any], detections: Iterable[Mapping[str, Any]], measure: voc.AveragePrecision
) -> dict[str, float]:
  """`voc_AP`, `voc_AP50` and `voc_AP75`: means over the classes; -1 without any object.

  Args:
    ground_truth: as `VocEvaluator` takes it.
    detections: rows of COCO's results format.
  """
  objects = collections.defaultdict(lambda: collections.defaultdict(list))
  found = collections.defaultdict(list)
  for row in ground_truth["annotations"]:
    difficult = bool(row.get("difficult", row.get("iscrowd", 0)))
    objects[row["category_id"]][row["image_id"]].append((row["bbox"], difficult))
  for row in detections:
    found[row["category_id"]].append(row)
  per_class = []
  for category in ground_truth["categories"]:
    of_class = objects[category["id"]]
    count = sum(not difficult for rows in of_class.values() for _, difficult in rows)
    if count:
      matched = _overlaps(of_class, found[category["id"]])
      per_class.append([_ap(_right(matched, threshold), count, measure) for threshold in THRESHOLDS])
  if not per_class:
    return {"voc_AP": -1.0, "voc_AP50": -1.0, "voc_AP75": -1.0}
  means = np.mean(per_class, axis=0)
  return {
    "voc_AP": float(means.mean()),
    "voc_AP50": float(means[0]),
    "voc_AP75": float(means[THRESHOLDS.index(0.75)]),
  }


def _overlaps(
  objects: Mapping[int, Sequence[tuple[Sequence[float], bool]]], detections: list[Mapping[str, Any]]
) -> tuple[Float[np.ndarray, "n"], Bool[np.ndarray, "n"], list[tuple[int, int]]]:
  """Of the detections of a class, the best score first: the largest IoU, and the object it is with.

  Equal scores keep their order.

  Returns:
    (IoU, whether the object is difficult, what identifies the object).
  """
  order = np.argsort([-row["score"] for row in detections], kind="stable")
  ious, difficult, keys = np.zeros(len(order)), np.zeros(len(order), bool), []
  for place, index in enumerate(order):
    row = detections[index]
    there = objects.get(row["image_id"], ())
    best = 0
    if there:
      each = _iou(np.asarray(row["bbox"], np.float64), np.asarray([box for box, _ in there], np.float64))
      best = int(np.argmax(each))
      ious[place], difficult[place] = each[best], there[best][1]
    keys.append((row["image_id"], best))
  return ious, difficult, keys


def _iou(box: Float[np.ndarray, "4"], others: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n"]:
  """Of boxes xywh. VOC's inclusive boxes with widths of xmax - xmin + 1 are the same areas."""
  low = np.maximum(box[:2], others[:, :2])
  high = np.minimum(box[:2] + box[2:], others[:, :2] + others[:, 2:])
  both = np.prod(np.maximum(high - low, 0), axis=1)
  union = np.prod(box[2:]) + np.prod(others[:, 2:], axis=1) - both
  return np.divide(both, union, out=np.zeros(len(others)), where=union > 0)


def _right(
  matched: tuple[np.ndarray, np.ndarray, list[tuple[int, int]]], threshold: float
) -> Bool[np.ndarray, "m"]:
  """Whether each detection that counts is right, the best score first."""
  ious, difficult, keys = matched
  right, seen = [], set()
  for iou, hard, key in zip(ious.tolist(), difficult.tolist(), keys):
    if iou <= threshold:
      right.append(False)
    elif not hard:
      right.append(key not in seen)
      seen.add(key)
  return np.asarray(right, bool)


def _ap(right: Bool[np.ndarray, "m"], count: int, measure: voc.AveragePrecision) -> float:
  """The average precision of detections in order, of which `right` are, for `count` objects."""
  hits = np.cumsum(right)
  precision = hits / np.arange(1, len(hits) + 1)
  # From the end: the highest precision at this recall or more.
  envelope = np.maximum.accumulate(precision[::-1])[::-1]
  if measure == "11_points":
    # Whether recall has reached a point is decided in integers.
    first = [int(np.searchsorted(10 * hits, point * count)) for point in range(11)]
    return float(np.mean([envelope[i] if i < len(envelope) else 0.0 for i in first]))
  return float(envelope[right].sum() / count)
