"""Scored boxes -> final detections with static shapes."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from frozen_vision.heads.htc.config import HTCConfig
from frozen_vision.ops import nms as nms_ops
from frozen_vision.ops import soft_nms
from frozen_vision.ops.arrays import Array


def select_detections(
  boxes: Float[Array, "b n k 4"],
  probabilities: Float[Array, "b n c"],
  valid: Bool[Array, "b n"],
  config: HTCConfig,
) -> dict[str, Array]:
  """Score threshold, NMS or soft-NMS within each class, best `config.max_detections` per image.

  Args:
    boxes: xyxy; k = 1 box for all classes, or one per class.
    probabilities: per foreground class (c = config.num_classes).
    valid: rois in use.

  Returns:
    boxes [b, d, 4], scores [b, d] in falling order, labels int32 [b, d], valid [b, d]; zeros where
    not valid. Soft-NMS lowers scores, also below the score threshold.
  """
  scores = jnp.where(valid[..., None], probabilities.astype(jnp.float32), -jnp.inf)
  if config.nms_kind != "hard":
    detect = _soft
  else:
    detect = _shared_boxes if boxes.shape[2] == 1 else _boxes_per_class
  return jax.vmap(lambda boxes, scores: detect(boxes, scores, config))(boxes, scores)


def _soft(boxes: Array, scores: Array, config: HTCConfig) -> dict[str, Array]:
  found = soft_nms.multiclass_soft_nms(
    boxes,
    scores,
    kind=config.nms_kind.removeprefix("soft_"),
    iou_threshold=config.nms_iou,
    sigma=config.soft_nms_sigma,
    min_score=config.soft_nms_min_score,
    score_threshold=config.score_threshold,
    max_detections=config.max_detections,
  )
  return {name: found[name] for name in ("boxes", "scores", "labels", "valid")}


def _shared_boxes(boxes: Array, scores: Array, config: HTCConfig) -> dict[str, Array]:
  found = nms_ops.multiclass_nms(
    boxes[:, 0],
    scores,
    iou_threshold=config.nms_iou,
    score_threshold=config.score_threshold,
    max_detections=config.max_detections,
  )
  return {name: found[name] for name in ("boxes", "scores", "labels", "valid")}


def _boxes_per_class(boxes: Array, scores: Array, config: HTCConfig) -> dict[str, Array]:
  return nms_ops.nms_of_best_pairs(
    boxes,
    scores,
    iou_threshold=config.nms_iou,
    score_threshold=config.score_threshold,
    num_pairs=config.pre_nms_detections,
    max_detections=config.max_detections,
  )
