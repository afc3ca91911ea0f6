"""Arithmetic of axis-aligned boxes: areas, IoU, clipping, and the delta parametrisation.

Boxes are `xyxy` in continuous input pixels: a box that covers exactly one pixel has x2 - x1 = 1 (no
"+1" convention anywhere). All results are float32.
"""

from collections.abc import Sequence
import math

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from frozen_vision.ops.arrays import Array

# Floor of widths and heights where a division or logarithm needs one. Coordinates near 1000 have a
# float32 spacing of 6e-5, so a box this narrow carries no information.
_SMALLEST_SIDE = 1e-3
_IOU_EPSILON = 1e-6  # mmdet's floor of the union


def area(boxes: Float[Array, "*shape 4"]) -> Float[Array, "*shape"]:
  """Areas in square pixels; an inverted box has area zero."""
  boxes = jnp.asarray(boxes, jnp.float32)
  width = jnp.maximum(boxes[..., 2] - boxes[..., 0], 0.0)
  height = jnp.maximum(boxes[..., 3] - boxes[..., 1], 0.0)
  return width * height


def pairwise_iou(a: Float[Array, "*shape n 4"], b: Float[Array, "*shape m 4"]) -> Float[Array, "*shape n m"]:
  """Intersection over union of each box of `a` with each box of `b`; zero where both are empty."""
  a = jnp.asarray(a, jnp.float32)
  b = jnp.asarray(b, jnp.float32)
  ax1, ay1, ax2, ay2 = (a[..., :, None, i] for i in range(4))
  bx1, by1, bx2, by2 = (b[..., None, :, i] for i in range(4))
  width = jnp.maximum(jnp.minimum(ax2, bx2) - jnp.maximum(ax1, bx1), 0.0)
  height = jnp.maximum(jnp.minimum(ay2, by2) - jnp.maximum(ay1, by1), 0.0)
  intersection = width * height
  union = area(a)[..., :, None] + area(b)[..., None, :] - intersection
  return intersection / jnp.maximum(union, _IOU_EPSILON)


def clip(boxes: Float[Array, "*shape 4"], image_size: Int[Array, "*leading 2"]) -> Float[Array, "*shape 4"]:
  """Moves coordinates into [0, width] x [0, height].

  Args:
    boxes: xyxy in pixels.
    image_size: (height, width) in pixels; its leading axes are the first axes of `boxes`, so sizes
      [b, 2] go with boxes [b, n, 4] or [b, levels, n, 4].
  """
  boxes = jnp.asarray(boxes, jnp.float32)
  high = _image_bounds(boxes, image_size)
  return jnp.clip(boxes, 0.0, high)


def is_valid_size(boxes: Float[Array, "*shape 4"], smallest_side: float = 0.0) -> Bool[Array, "*shape"]:
  """Whether both sides exceed `smallest_side` pixels (mmdet's `min_bbox_size`, strict)."""
  boxes = jnp.asarray(boxes, jnp.float32)
  return jnp.all(boxes[..., 2:] - boxes[..., :2] > smallest_side, axis=-1)


def encode_deltas(
  rois: Float[Array, "*shape 4"],
  targets: Float[Array, "*shape 4"],
  stds: Sequence[float],
) -> Float[Array, "*shape 4"]:
  """Regression targets that move `rois` onto `targets`: (dx, dy, dw, dh) / stds.

  Centre offsets are relative to the roi's sides, sizes are log ratios (R-CNN, appendix C; as mmdet
  3.x `DeltaXYWHBBoxCoder` with zero means). Empty rois or targets give large finite values instead
  of infinities.
  """
  roi_center, roi_sides = _center_and_sides(rois)
  target_center, target_sides = _center_and_sides(targets)
  roi_sides = jnp.maximum(roi_sides, _SMALLEST_SIDE)
  target_sides = jnp.maximum(target_sides, _SMALLEST_SIDE)
  offset = (target_center - roi_center) / roi_sides
  log_ratio = jnp.log(target_sides / roi_sides)
  return jnp.concatenate([offset, log_ratio], axis=-1) / jnp.asarray(stds, jnp.float32)


def decode_deltas(
  rois: Float[Array, "*#shape 4"],
  deltas: Float[Array, "*#shape 4"],
  stds: Sequence[float],
  image_size: Int[Array, "*leading 2"] | None = None,
  max_ratio: float = 16 / 1000,
) -> Float[Array, "*#shape 4"]:
  """Inverse of `encode_deltas`, as mmdet 3.x `DeltaXYWHBBoxCoder` with zero means.

  Args:
    rois: xyxy in pixels.
    deltas: predictions in units of `stds`; leading axes broadcast against `rois`.
    stds: standard deviations the deltas were divided by, four of them.
    image_size: (height, width) to clip to, as in `clip`; None leaves boxes unclipped.
    max_ratio: |dw| and |dh| are limited to |log(max_ratio)|, so that the exponential stays finite.
  """
  center, sides = _center_and_sides(rois)
  deltas = jnp.asarray(deltas, jnp.float32) * jnp.asarray(stds, jnp.float32)
  limit = abs(math.log(max_ratio))
  new_center = center + sides * deltas[..., :2]
  half = 0.5 * sides * jnp.exp(jnp.clip(deltas[..., 2:], -limit, limit))
  boxes = jnp.concatenate([new_center - half, new_center + half], axis=-1)
  return boxes if image_size is None else clip(boxes, image_size)


def _center_and_sides(boxes: Array) -> tuple[Array, Array]:
  boxes = jnp.asarray(boxes, jnp.float32)
  low, high = boxes[..., :2], boxes[..., 2:]
  return 0.5 * (low + high), high - low


def _image_bounds(boxes: Array, image_size: Array) -> Array:
  image_size = jnp.asarray(image_size, jnp.float32)
  if image_size.shape[-1:] != (2,) or image_size.ndim > boxes.ndim:
    raise ValueError(
      f"image_size has shape {image_size.shape}, boxes have {boxes.shape}; expected image_size"
      " [..., 2] as (height, width) whose leading axes are the first axes of the boxes."
    )
  high = jnp.concatenate([image_size[..., ::-1], image_size[..., ::-1]], axis=-1)
  between = (1,) * (boxes.ndim - image_size.ndim)
  return high.reshape(*image_size.shape[:-1], *between, 4)
