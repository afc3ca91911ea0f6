"""VOC's average precision against a loop over detections in exact fractions."""

from fractions import Fraction

import numpy as np
import pytest

from frozen_vision.metrics import voc_ap


def _overlap(a, b):
  """IoU of boxes xywh as VOC's files would have them: inclusive pixels, widths of xmax - xmin + 1."""
  a, b = ([Fraction(x) for x in box] for box in (a, b))
  (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = ((x + 1, y + 1, x + w, y + h) for x, y, w, h in (a, b))
  wide, high = min(ax2, bx2) - max(ax1, bx1) + 1, min(ay2, by2) - max(ay1, by1) + 1
  if wide <= 0 or high <= 0:
    return Fraction(0)
  areas = (ax2 - ax1 + 1) * (ay2 - ay1 + 1) + (bx2 - bx1 + 1) * (by2 - by1 + 1)
  return wide * high / (areas - wide * high)


def looped_ap(truth, detections, category, threshold, measure):
  """AP of a class at an IoU threshold, exactly; None without an object."""
  objects = {}
  for row in truth["annotations"]:
    if row["category_id"] == category:
      objects.setdefault(row["image_id"], []).append([row["bbox"], row["difficult"], False])
  count = sum(not one[1] for rows in objects.values() for one in rows)
  if not count:
    return None
  points, hits, total = [], 0, 0
  for row in sorted((r for r in detections if r["category_id"] == category), key=lambda r: -r["score"]):
    best, overlap = None, Fraction(-1)
    for one in objects.get(row["image_id"], []):
      if _overlap(row["bbox"], one[0]) > overlap:
        best, overlap = one, _overlap(row["bbox"], one[0])
    if overlap > threshold:
      if best[1]:
        continue
      hits += not best[2]
      best[2] = True
    total += 1
    points.append((Fraction(hits, count), Fraction(hits, total)))
  if measure == "11_points":
    levels = [Fraction(i, 10) for i in range(11)]
    return sum(max((p for r, p in points if r >= level), default=Fraction(0)) for level in levels) / 11
  area, reached = Fraction(0), Fraction(0)
  for recall in sorted({r for r, _ in points}):
    area += (recall - reached) * max(p for r, p in points if r >= recall)
    reached = recall
  return area


def looped(truth, detections, measure):
  """The means over classes of (all thresholds, 0.5, 0.75)."""
  rows = []
  for category in truth["categories"]:
    each = [
      looped_ap(truth, detections, category["id"], Fraction(percent, 100), measure)
      for percent in range(50, 100, 5)
    ]
    if each[0] is not None:
      rows.append(each)
  means = [sum(column) / len(rows) for column in zip(*rows)]
  return [float(sum(means) / len(means)), float(means[0]), float(means[5])]


def _case(seed):
  """Boxes with many equal overlaps and scores, difficult objects, empty images, classes without objects."""
  rng = np.random.default_rng(seed)
  annotations, detections = [], []
  for image in range(12):
    for _ in range(rng.integers(0, 5)):
      box = [int(x) for x in (*rng.integers(0, 20, 2), *rng.integers(4, 21, 2))]
      difficult = int(rng.random() < 0.25)
      annotations.append(
        dict(
          image_id=image,
          category_id=int(rng.integers(1, 4)),
          bbox=box,
          difficult=difficult,
          iscrowd=difficult,
        )
      )
    annotations += annotations[-1:] * int(rng.random() < 0.2)  # two objects in one place
  annotations.append(dict(image_id=0, category_id=4, bbox=[0, 0, 9, 9], difficult=1, iscrowd=1))
  for row in annotations:
    for _ in range(rng.integers(0, 4)):
      moved = [float(x) for x in np.array(row["bbox"]) + rng.choice([0, 0, 0, 1, 2, -1], 4)]
      score = float(rng.choice([0.1, 0.25, 0.5, 0.5, 0.9]))
      detections.append({**{k: row[k] for k in ("image_id", "category_id")}, "bbox": moved, "score": score})
  for _ in range(8):
    box = [float(x) for x in (*rng.integers(0, 20, 2), 8, 8)]
    detections.append(
      dict(image_id=int(rng.integers(12)), category_id=int(rng.integers(1, 6)), bbox=box, score=0.5)
    )
  categories = [{"id": i, "name": str(i)} for i in range(1, 6)]
  rng.shuffle(detections)
  return {"annotations": annotations, "categories": categories}, detections


@pytest.mark.parametrize("measure", ["11_points", "area"])
@pytest.mark.parametrize("seed", range(8))
def test_equals_the_loop(seed, measure):
  truth, detections = _case(seed)
  found = voc_ap.average_precision(truth, detections, measure)
  wanted = looped(truth, detections, measure)
  np.testing.assert_allclose(list(found.values()), wanted, rtol=0, atol=1e-9)
  assert 0.1 < found["voc_AP50"] < 0.95 and found["voc_AP75"] < found["voc_AP50"]


def _one(detections, *boxes, difficult=()):
  truth = {
    "annotations": [
      dict(image_id=1, category_id=1, bbox=box, difficult=int(i in difficult)) for i, box in enumerate(boxes)
    ],
    "categories": [{"id": 1, "name": "a"}],
  }
  rows = [dict(image_id=1, category_id=1, bbox=box, score=score) for box, score in detections]
  return voc_ap.average_precision(truth, rows, "area")["voc_AP50"]


def test_rules_by_hand():
  box, other = [0, 0, 10, 10], [50, 50, 10, 10]
  assert _one([(box, 0.9)], box) == 1.0
  assert _one([([0, 0, 10, 5], 0.9)], box) == 0.0  # an IoU of exactly one half is not above it
  assert _one([(box, 0.9), (box, 0.8)], box) == 1.0  # found twice: wrong, but after all recall
  assert _one([(other, 0.9), (box, 0.8)], box) == 0.5
  assert _one([(other, 0.9), (other, 0.85), (box, 0.8)], box, other, difficult=(1,)) == 1.0  # do not count
  assert _one([], box) == 0.0
  assert _one([(box, 0.9)], box, difficult=(0,)) == -1.0


def test_data_that_are_not_of_voc():
  assert voc_ap.measured_by({"info": {}}) is None and voc_ap.measured_by({}) is None
  assert voc_ap.measured_by({"info": {"average_precision": "area"}}) == "area"
