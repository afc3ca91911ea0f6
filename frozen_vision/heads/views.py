"""Detection from several views of each image: other scales, mirrored (test-time augmentation).

Boxes are predicted per view, moved into the first view's pixels, filtered by the size of the object, and
merged by one NMS; masks are predicted again in every view, for the merged boxes, and averaged. One view alone
is plain prediction, bit for bit.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from frozen_vision.heads.base import DetectionHead, Features
from frozen_vision.ops import boxes as box_ops
from frozen_vision.ops.arrays import Array

# COCO's object sizes: areas in pixels of the original image, from the first number up to below the second.
AREAS = {"s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, math.inf)}


class View(NamedTuple):
  """One view of a batch of images.

  Attributes:
    features: of the neck, on the view.
    image_size: (h, w) of each image's content, in pixels of the view.
    mirrored: the content is mirrored left to right, as `ops.mirror` does.
    sizes: letters of `AREAS`: detections of other sizes do not count in this view.
  """

  features: Features
  image_size: Int[Array, "b 2"]
  mirrored: bool = False
  sizes: str = "sml"


def predict(
  head: DetectionHead,
  views: Sequence[View],
  original_size: Int[Array, "b 2"],
  *,
  max_detections: int | None = None,
) -> dict[str, Array]:
  """Detections of all views together, in pixels of the first view.

  The recipe of ViT-Adapter's multi-scale HTC++: candidates of all views go into one (soft-)NMS of the head's
  own kind.

  Args:
    head: decides by its `select` what a detection is.
    views: at least one; with several scales and sizes, large objects are usually taken from small scales.
    original_size: (h, w) of the images as they were annotated, which is what sizes refer to.
    max_detections: rows of the result; None: the head's.

  Returns:
    As `DetectionHead.select`; of heads with masks also masks [b, d, m, m], as `DetectionHead.predict_masks`.
  """
  reference = views[0].image_size
  boxes, scores, valid = [], [], []
  for view in views:
    found, probabilities, real = head.score_boxes(view.features, view.image_size)
    found = box_ops.clip(_from_view(found, view, reference), reference)
    counts = _has_size(found, reference, original_size, view.sizes)
    boxes.append(found)
    scores.append(jnp.where(counts, probabilities, -jnp.inf))
    valid.append(real)
  merged = [jnp.concatenate(parts, axis=1) for parts in (boxes, scores, valid)]
  detections = head.select(*merged, num_views=len(views), max_detections=max_detections)
  if head.config.with_masks:
    total = 0.0
    for view in views:
      own = _to_view(detections["boxes"], view, reference)
      masks = head.predict_masks(view.features, own, detections["labels"])
      total = total + (masks[..., ::-1] if view.mirrored else masks)
    detections["masks"] = total / len(views)
  return detections


def _per_image(values: Array, boxes: Array) -> Array:
  """values [b, ...] with axes of one for those of boxes [b, ..., 4] in between."""
  return values.reshape(values.shape[0], *(1,) * (boxes.ndim - values.ndim), *values.shape[1:])


def _scaled(boxes: Array, to: Array, of: Array) -> Array:
  """Boxes in images of size `of` as boxes in the same images at size `to`."""
  # If both sizes are the same, this multiplies by exactly one.
  factors = to.astype(jnp.float32) / of.astype(jnp.float32)
  return boxes * _per_image(factors[:, jnp.asarray([1, 0, 1, 0])], boxes)


def _mirrored(boxes: Array, image_size: Array) -> Array:
  width = _per_image(image_size[:, 1:].astype(jnp.float32), boxes)
  x1, y1, x2, y2 = jnp.split(boxes, 4, axis=-1)
  return jnp.concatenate([width - x2, y1, width - x1, y2], axis=-1)


def _from_view(boxes: Float[Array, "b *n 4"], view: View, reference: Array) -> Array:
  boxes = _mirrored(boxes, view.image_size) if view.mirrored else boxes
  return _scaled(boxes, reference, view.image_size)


def _to_view(boxes: Float[Array, "b *n 4"], view: View, reference: Array) -> Array:
  boxes = _scaled(boxes, view.image_size, reference)
  return _mirrored(boxes, view.image_size) if view.mirrored else boxes


def _has_size(
  boxes: Float[Array, "b n k 4"], reference: Array, original_size: Array, sizes: str
) -> Bool[Array, "b n k"]:
  """Whether the area of each box, in pixels of the original image, is of one of the sizes."""
  if set(sizes) == set(AREAS):
    return jnp.ones(boxes.shape[:-1], bool)
  area = box_ops.area(_scaled(boxes, original_size, reference))
  ranges = [AREAS[letter] for letter in sizes]
  return jnp.stack([(area >= low) & (area < high) for low, high in ranges]).any(axis=0)
