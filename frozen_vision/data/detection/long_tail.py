"""Long-tailed classes: how many images and objects each has, and how often images of rare ones are shown."""

import dataclasses
from typing import Any

from jaxtyping import Float64, Int64, Integer
import numpy as np


@dataclasses.dataclass(frozen=True)
class ClassCounts:
  """What training data hold of every class.

  Attributes:
    images: with an object of the class.
    objects: of the class.
  """

  images: Int64[np.ndarray, "c"]
  objects: Int64[np.ndarray, "c"]


def labelled_objects(source: Any) -> tuple[Integer[np.ndarray, "a"], Integer[np.ndarray, "a"]]:
  """(position of the image, label) of every object of a detection source that is no crowd.

  A source without `labelled_objects` of its own tells by its `ground_truth`; generated scenes are all painted
  for that, milliseconds each.
  """
  if hasattr(source, "labelled_objects"):
    return source.labelled_objects()
  truth = source.ground_truth
  positions = {image["id"]: position for position, image in enumerate(truth["images"])}
  labels = {category["id"]: label for label, category in enumerate(source.categories)}
  rows = [
    (positions[row["image_id"]], labels[row["category_id"]])
    for row in truth["annotations"]
    if not row.get("iscrowd")
  ]
  table = np.array(rows, np.int64).reshape(-1, 2)
  return table[:, 0], table[:, 1]


def count_classes(
  image_of: Integer[np.ndarray, "a"], labels: Integer[np.ndarray, "a"], num_classes: int
) -> ClassCounts:
  """Counts images and objects of every class.

  Args:
    image_of, labels: of every object, as `labelled_objects` gives them.
  """
  pairs = np.unique(np.stack([image_of, labels], axis=1), axis=0)
  return ClassCounts(
    np.bincount(pairs[:, 1], minlength=num_classes).astype(np.int64),
    np.bincount(labels, minlength=num_classes).astype(np.int64),
  )


def measure(source: Any, threshold: float) -> tuple[ClassCounts, Float64[np.ndarray, "m"] | None]:
  """(what a detection source holds of every class, `repeat_factors` of its images; None for no threshold)."""
  image_of, labels = labelled_objects(source)
  counts = count_classes(image_of, labels, len(source.categories))
  return counts, repeat_factors(image_of, labels, len(source), threshold) if threshold else None


def repeat_factors(
  image_of: Integer[np.ndarray, "a"], labels: Integer[np.ndarray, "a"], num_images: int, threshold: float
) -> Float64[np.ndarray, "m"]:
  """How often a pass over the data shows each image, on average (LVIS, arXiv 1908.03195, appendix B).

  A class in a fraction f of the images asks for max(1, sqrt(threshold / f)); an image is shown as often as
  the class in it that asks for most.

  Args:
    image_of, labels: of every object, as `labelled_objects` gives them.
    num_images: of the source; those without an object are shown once.
    threshold: the fraction below which classes are repeated; 0.001 in LVIS's release.
  """
  factors = np.ones(num_images)
  if not len(labels):
    return factors
  counts = count_classes(image_of, labels, int(labels.max()) + 1).images
  asked = np.maximum(1, np.sqrt(threshold * num_images / np.maximum(counts, 1)))
  np.maximum.at(factors, image_of, asked[labels])
  return factors
