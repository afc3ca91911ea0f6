"""Counts objects that a training transform never shows: too small at any size, or too many in one image."""

from typing import Any

import numpy as np

from frozen_vision.data import findings
from frozen_vision.data.detection import coco, transforms

KINDS = {
  "object_small": findings.Kind(
    "objects smaller than min_box_size even at the largest size of their image: never trained on",
    "objects",
    advice="Train at a larger frame.",
  ),
  "object_excess": findings.Kind(
    "objects more than max_objects in an image: the smallest are not trained on",
    "objects",
    advice="Raise max_objects.",
  ),
}


def count(source: Any, transform: transforms.DetectionTrain) -> None:
  """Adds to the findings of a source what the transform leaves out of it; generated data lose nothing.

  Args:
    source: a `CocoSource`; of prepared data only the number of objects is known.
  """
  found = getattr(source, "findings", None)
  if found is None:
    return
  lost = findings.Findings(KINDS)
  per_image = source.objects_per_image()
  lost.saw("objects", int(per_image.sum()))
  small = np.zeros(len(source), np.int64)
  if isinstance(source, coco.CocoSource) and isinstance(transform.resize, transforms.Placement):
    small = _small_objects(source, transform)
    for index in np.flatnonzero(small):
      name = source.record(index)["file_name"]
      lost.add("object_small", f"{small[index]} in {name}", int(small[index]))
  excess = np.maximum(per_image - small - transform.max_objects, 0)
  for index in np.flatnonzero(excess):
    name = f"image {source.image_ids[index]}"
    lost.add("object_excess", f"{per_image[index]} in {name}", int(excess[index]))
  found.merge(lost)


def _small_objects(source: coco.CocoSource, transform: transforms.DetectionTrain) -> np.ndarray:
  """How many objects of each image are always below `min_box_size`."""
  sizes, owner, boxes = source.objects()
  scale = transform.resize.largest_scale(sizes, transform.frame)
  sides = (boxes[:, 2:] - boxes[:, :2]).min(axis=1) * scale[owner]
  # A resized side is a whole number of pixels, so a scale may be half a pixel larger.
  return np.bincount(owner[sides < transform.min_box_size * (1 - 1e-3)], minlength=len(source))
