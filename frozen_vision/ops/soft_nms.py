"""Soft non-maximum suppression (Bodla et al. 2017) with static shapes, inside jit and vmap.

A greedy loop: take the best box of what remains, lower the scores of the boxes that overlap it,
drop those that fall below `min_score`. Rules and defaults are those of mmcv 2.1.0's `soft_nms`, run
within each class, as mmdet's `multiclass_nms` does.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

from frozen_vision.ops import boxes as box_ops
from frozen_vision.ops import nms
from frozen_vision.ops.arrays import Array


def _weight(
  overlaps: Float[Array, " n"], kind: str, iou_threshold: float, sigma: float
) -> Float[Array, " n"]:
  """Factors of the scores; linear: 1 - IoU from the threshold on, gaussian: everywhere."""
  match kind:
    case "linear":
      return jnp.where(overlaps >= iou_threshold, 1.0 - overlaps, 1.0)
    case "gaussian":
      return jnp.exp(-jnp.square(overlaps) / sigma)
    case _:
      raise ValueError(f"soft_nms: kind is {kind!r}; known: linear, gaussian.")


def multiclass_soft_nms(
  boxes: Float[Array, "n k 4"],
  scores: Float[Array, "n classes"],
  *,
  kind: Literal["linear", "gaussian"] = "linear",
  iou_threshold: float = 0.5,
  sigma: float = 0.5,
  min_score: float = 1e-3,
  score_threshold: float,
  max_detections: int,
) -> dict[str, Array]:
  """Soft-NMS per class, then the best `max_detections` of all classes.

  Scores only ever fall, so the best `max_detections` are the first that one loop over all classes
  picks: nothing after them has to be computed, and no IoU matrix is kept. No gradient passes.

  Args:
    boxes: xyxy in pixels; k = 1 box for all classes, or k = classes.
    scores: one column per class, without background; -inf (or NaN) marks padding.
    kind: how the scores of overlapping boxes fall.
    iou_threshold: of "linear": boxes with at least this IoU fall.
    sigma: of "gaussian": weights are exp(-IoU^2 / sigma).
    min_score: pairs below are dropped (mmcv would keep the very best pair even then).
    score_threshold: pairs with score <= this are dropped before anything else, as mmdet does.
    max_detections: static number of rows returned.

  Returns:
    dict of boxes [max_detections, 4], scores (lowered), labels (int32), indices (int32, the row of
    `boxes`) and valid [max_detections], by falling score; invalid rows are zeros.

  Raises:
    ValueError: an unknown kind, empty arrays, or k neither 1 nor the number of classes.
  """
  boxes, scores = jax.lax.stop_gradient((jnp.asarray(boxes, jnp.float32), jnp.asarray(scores, jnp.float32)))
  count, classes = scores.shape
  if count == 0 or classes == 0 or max_detections < 1:
    raise ValueError(
      f"multiclass_soft_nms got scores of shape {scores.shape} and"
      f" max_detections={max_detections}; boxes, classes and max_detections must each be at least"
      " 1 (pad with score -inf)."
    )
  if boxes.shape not in ((count, 1, 4), (count, classes, 4)):
    raise ValueError(
      f"multiclass_soft_nms got boxes of shape {boxes.shape}; scores of shape {scores.shape}"
      f" expect ({count}, 1, 4) or ({count}, {classes}, 4)."
    )
  shared = boxes.shape[1] == 1
  by_class = boxes.swapaxes(0, 1)  # [k, n, 4]
  real = (scores > score_threshold) & (scores >= min_score)
  remaining = jnp.where(real, scores, -jnp.inf).T  # [classes, n]

  def pick(remaining, _):
    best = remaining.argmax()
    label, row = best // count, best % count
    score = remaining[label, row]
    own = by_class[0 if shared else label]
    overlaps = box_ops.pairwise_iou(own[row][None], own)[0]
    lowered = remaining[label] * _weight(overlaps, kind, iou_threshold, sigma)
    # Written so that -inf * 0 = NaN, of padding that equals the picked box, is dropped too.
    lowered = jnp.where(lowered >= min_score, lowered, -jnp.inf).at[row].set(-jnp.inf)
    return remaining.at[label].set(lowered), (own[row], score, label, row)

  _, (chosen, best, labels, rows) = jax.lax.scan(pick, remaining, length=max_detections)
  return nms.padded(chosen, best, labels, rows)
