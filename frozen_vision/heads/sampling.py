"""Which anchors and rois are positive, and which of them a loss sees. All shapes are static.

Rules of mmdet 3.3's MaxIoUAssigner and RandomSampler. All functions but `truth_of` work on
one image; `jax.vmap` adds the batch.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from frozen_vision.ops import boxes as box_ops
from frozen_vision.ops import select
from frozen_vision.ops.arrays import Array

NEGATIVE = -1
IGNORED = -2


def truth_of(batch: Mapping[str, Array]) -> dict[str, Array]:
  """Boxes, labels and valid of a training batch; objects without an area are no longer valid.

  Raises:
    ValueError: boxes without rows.
  """
  boxes = jnp.asarray(batch["boxes"], jnp.float32)
  if boxes.shape[1] == 0:
    raise ValueError('batch["boxes"] has no rows; pad it to at least one row per image, with valid=False.')
  valid = batch["valid"] & box_ops.is_valid_size(boxes)
  return {
    "boxes": jnp.where(valid[..., None], boxes, 0.0),
    "labels": batch["labels"].astype(jnp.int32),
    "valid": valid,
  }


def assign_max_iou(
  boxes: Float[Array, "n 4"],
  valid: Bool[Array, "n"],
  gt_boxes: Float[Array, "g 4"],
  gt_valid: Bool[Array, "g"],
  *,
  positive_iou: float,
  negative_iou: float,
  min_positive_iou: float,
  match_low_quality: bool,
) -> Int[Array, "n"]:
  """Assigns each box to an object by IoU.

  Args:
    boxes: anchors or rois, xyxy. Those not `valid` are IGNORED and claim no object.
    gt_boxes: objects, xyxy, padded; `gt_valid` tells which exist.
    positive_iou: boxes at or above it belong to the object which they overlap most.
    negative_iou: boxes below it are background; those between are ignored.
    match_low_quality: then also every box that has an object's largest IoU belongs to that object,
      if that IoU is at least `min_positive_iou`; later objects win over earlier ones and over the
      rule above.

  Returns:
    Index of the object, NEGATIVE or IGNORED. Without any object every valid box is NEGATIVE.
  """
  overlaps = box_ops.pairwise_iou(boxes, gt_boxes)
  overlaps = jnp.where(valid[:, None] & gt_valid[None, :], overlaps, -1.0)
  # Kept in memory: computed twice, in differently fused loops, the two results differ in the last
  # bit, and the equality below would miss an object's best box.
  overlaps = jax.lax.optimization_barrier(overlaps)
  best = overlaps.max(axis=1)
  assigned = jnp.where(best < negative_iou, NEGATIVE, IGNORED)
  assigned = jnp.where(best >= positive_iou, overlaps.argmax(axis=1), assigned)
  if match_low_quality:
    gt_best = overlaps.max(axis=0)
    claims = (overlaps == gt_best[None, :]) & (gt_best >= min_positive_iou)[None, :]
    claims &= valid[:, None] & gt_valid[None, :]
    last = jnp.where(claims, jnp.arange(gt_boxes.shape[0])[None, :], -1).max(axis=1)
    assigned = jnp.where(last >= 0, last, assigned)
  return jnp.where(valid, assigned, IGNORED).astype(jnp.int32)


def random_subset(key: PRNGKeyArray, mask: Bool[Array, "n"], count: Int[Array, ""] | int) -> Bool[Array, "n"]:
  """A uniformly random subset of `mask` with min(count, sum(mask)) members."""
  # Those outside of the mask come after all others.
  order = jnp.where(mask, jax.random.uniform(key, mask.shape), jnp.inf)
  return mask & select.smallest(order, count)


def sample(
  key: PRNGKeyArray, assigned: Int[Array, "n"], *, num: int, positive_fraction: float
) -> tuple[Bool[Array, "n"], Bool[Array, "n"]]:
  """(positive, negative): at most num * positive_fraction positives; negatives fill up to `num`."""
  positive_key, negative_key = jax.random.split(key)
  max_positive = int(num * positive_fraction)
  positive = random_subset(positive_key, assigned >= 0, max_positive)
  negative = random_subset(negative_key, assigned == NEGATIVE, num - positive.sum())
  return positive, negative


class RoiSamples(NamedTuple):
  """Sampled rois of one image (or a batch); all positives come first.

  Attributes:
    boxes: [s, 4], xyxy; zeros where not valid.
    valid: [s], the slot is in use.
    positive: [s], the roi belongs to an object.
    is_gt: [s], the roi is a ground-truth box itself.
    gt_index: [s], index of the object; 0 where not positive.
  """

  boxes: Float[Array, "s 4"]
  valid: Bool[Array, "s"]
  positive: Bool[Array, "s"]
  is_gt: Bool[Array, "s"]
  gt_index: Int[Array, "s"]


def sample_rois(
  key: PRNGKeyArray,
  boxes: Float[Array, "n 4"],
  valid: Bool[Array, "n"],
  gt_boxes: Float[Array, "g 4"],
  gt_valid: Bool[Array, "g"],
  *,
  iou: float,
  match_low_quality: bool,
  num: int,
  positive_fraction: float,
) -> RoiSamples:
  """Assigns rois at `iou`, adds the ground truth as rois, and samples min(num, g + n) of all."""
  assigned = assign_max_iou(
    boxes,
    valid,
    gt_boxes,
    gt_valid,
    positive_iou=iou,
    negative_iou=iou,
    min_positive_iou=iou,
    match_low_quality=match_low_quality,
  )
  count = gt_boxes.shape[0]
  own = jnp.where(gt_valid, jnp.arange(count), IGNORED).astype(jnp.int32)
  assigned = jnp.concatenate([own, assigned])
  candidates = jnp.concatenate([gt_boxes, boxes])
  is_gt = jnp.arange(candidates.shape[0]) < count
  positive, negative = sample(key, assigned, num=num, positive_fraction=positive_fraction)
  # Positives, then negatives, then the rest, each in the order that they have.
  kind = jnp.where(positive, 2, jnp.where(negative, 1, 0))
  order = select.inverse(select.falling_rank(kind))[: min(num, candidates.shape[0])]
  used = positive[order] | negative[order]
  return RoiSamples(
    boxes=jnp.where(used[:, None], candidates[order], 0.0),
    valid=used,
    positive=positive[order],
    is_gt=is_gt[order] & used,
    gt_index=jnp.where(positive[order], assigned[order], 0),
  )
