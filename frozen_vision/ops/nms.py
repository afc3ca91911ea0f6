"""Greedy non-maximum suppression with static shapes, inside jit and vmap.

Boxes are taken in order of falling score (ties: lower index first); a box is kept if no kept box
before it overlaps it with IoU > threshold, strictly, as torchvision and mmcv do. Boxes with score
-inf (or NaN) are padding: they are never kept and suppress nothing. No gradient passes through.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from frozen_vision.ops import boxes as box_ops
from frozen_vision.ops.arrays import Array


def nms(boxes: Float[Array, "n 4"], scores: Float[Array, " n"], threshold: float) -> Bool[Array, " n"]:
  """Which boxes survive.

  Args:
    boxes: xyxy in pixels.
    scores: any order; -inf marks padding.
    threshold: IoU above which the lower-scored box goes.
  """
  return batched_nms(boxes, scores, jnp.zeros(jnp.shape(scores), jnp.int32), threshold)


def batched_nms(
  boxes: Float[Array, "n 4"],
  scores: Float[Array, " n"],
  groups: Int[Array, " n"],
  threshold: float,
) -> Bool[Array, " n"]:
  """NMS within each group (class or pyramid level); groups never suppress each other.

  Groups enter as a mask of the IoU matrix. Moving the boxes of each group far apart, the usual
  trick, rounds their coordinates and so changes IoUs near the threshold.
  """
  boxes, scores = jax.lax.stop_gradient((jnp.asarray(boxes, jnp.float32), jnp.asarray(scores)))
  if boxes.shape[0] == 0:
    return jnp.zeros(0, bool)
  order = jnp.argsort(-scores)  # stable: ties stay in index order
  boxes, groups, real = boxes[order], jnp.asarray(groups)[order], (scores > -jnp.inf)[order]
  overlaps = box_ops.pairwise_iou(boxes, boxes) > threshold
  overlaps &= groups[:, None] == groups[None, :]
  rank = jnp.arange(boxes.shape[0])

  def visit(i, keep):
    return keep & ~(keep[i] & overlaps[i] & (rank > i))

  # A static count: ending with the last real box would, under vmap and with images on several
  # devices, make these agree on it in every iteration.
  keep = jax.lax.fori_loop(0, boxes.shape[0], visit, real)
  return jnp.zeros(boxes.shape[0], bool).at[order].set(keep)


def multiclass_nms(
  boxes: Float[Array, "n 4"],
  scores: Float[Array, "n classes"],
  *,
  iou_threshold: float,
  score_threshold: float,
  max_detections: int,
) -> dict[str, Array]:
  """NMS per class for boxes that all classes share, then the best `max_detections` of all classes.

  Equal to `batched_nms` on the n * classes (box, class) pairs, with one IoU matrix [n, n].

  Args:
    boxes: xyxy in pixels.
    scores: one column per class, without background; -inf rows are padding.
    iou_threshold: IoU above which the lower-scored box of a class goes.
    score_threshold: pairs with score <= this are dropped before NMS, as mmdet does.
    max_detections: static number of rows returned.

  Returns:
    dict of boxes [max_detections, 4], scores, labels (int32), indices (int32, the row of `boxes`)
    and valid [max_detections], by falling score; invalid rows are zeros.
  """
  boxes, scores = jax.lax.stop_gradient((jnp.asarray(boxes, jnp.float32), jnp.asarray(scores)))
  count, classes = scores.shape
  if count == 0 or classes == 0 or max_detections < 1:
    raise ValueError(
      f"multiclass_nms got scores of shape {scores.shape} and max_detections={max_detections};"
      " boxes, classes and max_detections must each be at least 1 (pad with score -inf)."
    )
  real = (scores > score_threshold) & (scores > -jnp.inf)
  masked = jnp.where(real, scores, -jnp.inf)
  overlaps = box_ops.pairwise_iou(boxes, boxes) > iou_threshold
  order = jnp.argsort(-masked, axis=0).T  # [classes, n]: the box that each class visits i-th
  each = jnp.arange(classes)
  rank = jnp.zeros((classes, count), jnp.int32).at[each[:, None], order].set(jnp.arange(count))

  def visit(i, keep):
    box = order[:, i]
    lost = keep[each, box][:, None] & overlaps[box] & (rank > i)
    return keep & ~lost

  keep = jax.lax.fori_loop(0, count, visit, real.T)
  return _best(boxes, jnp.where(keep.T, masked, -jnp.inf), max_detections)


def nms_of_best_pairs(
  boxes: Float[Array, "n k 4"],
  scores: Float[Array, "n classes"],
  *,
  iou_threshold: float,
  score_threshold: float,
  num_pairs: int,
  max_detections: int,
) -> dict[str, Array]:
  """NMS per class among the (box, class) pairs with the best scores, where all would be too many.

  NMS visits boxes by falling score, so what it keeps among the best pairs does not depend on the rest.

  Args:
    boxes: xyxy in pixels; k = 1 box for all classes, or one per class.
    scores: one column per class, without background; -inf is padding.
    iou_threshold: IoU above which the lower-scored box of a class goes.
    score_threshold: pairs with score <= this are dropped first.
    num_pairs: how many pairs enter.
    max_detections: static number of rows returned.

  Returns:
    boxes [max_detections, 4], scores, labels (int32) and valid, by falling score; invalid rows are zeros.
  """
  boxes, scores = jax.lax.stop_gradient((jnp.asarray(boxes, jnp.float32), jnp.asarray(scores)))
  count, classes = scores.shape
  scores = jnp.where(scores > score_threshold, scores, -jnp.inf).reshape(-1)
  scores, index = jax.lax.top_k(scores, min(num_pairs, count * classes))
  box = index if boxes.shape[1] == classes else index // classes
  boxes, labels = boxes.reshape(-1, 4)[box], (index % classes).astype(jnp.int32)
  keep = batched_nms(boxes, scores, labels, iou_threshold)
  best, index = jax.lax.top_k(jnp.where(keep, scores, -jnp.inf), min(max_detections, len(scores)))
  found = padded(boxes[index], best, labels[index], index)
  pad = max_detections - len(best)
  return {
    name: jnp.pad(found[name], [(0, pad)] + [(0, 0)] * (found[name].ndim - 1))
    for name in ("boxes", "scores", "labels", "valid")
  }


def _best(boxes: Array, scores: Array, count: int) -> dict[str, Array]:
  """The `count` highest (box, class) pairs of `scores` [n, classes], -inf meaning absent."""
  classes = scores.shape[1]
  flat = scores.reshape(-1)
  found = min(count, flat.shape[0])
  best, index = jax.lax.top_k(flat, found)
  best = jnp.pad(best, (0, count - found), constant_values=-jnp.inf)
  index = jnp.pad(index, (0, count - found)).astype(jnp.int32)
  return padded(boxes[index // classes], best, index % classes, index // classes)


def padded(boxes: Array, scores: Array, labels: Array, indices: Array) -> dict[str, Array]:
  """The detections that `multiclass_nms` returns; rows whose score is -inf are invalid and become zeros."""
  valid = scores > -jnp.inf
  return {
    "boxes": jnp.where(valid[:, None], boxes, 0.0),
    "scores": jnp.where(valid, scores, 0.0),
    "labels": jnp.where(valid, labels, 0).astype(jnp.int32),
    "indices": jnp.where(valid, indices, 0).astype(jnp.int32),
    "valid": valid,
  }
