"""Region proposal network (Ren et al. 2015), with the rules of mmdet 3.3's RPNHead."""

from collections.abc import Sequence
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, PRNGKeyArray
import optax

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.heads import detection_losses as loss_ops
from frozen_vision.heads import sampling
from frozen_vision.heads.htc.config import HTCConfig
from frozen_vision.layers.activations import ACTIVATIONS
from frozen_vision.layers.convolution import MapConv
from frozen_vision.ops import anchors as anchor_ops
from frozen_vision.ops import boxes as box_ops
from frozen_vision.ops import nms as nms_ops
from frozen_vision.ops import select
from frozen_vision.ops.arrays import Array

_UNIT_STDS = (1.0, 1.0, 1.0, 1.0)
_NORMAL = nnx.initializers.normal(0.01)


class Proposals(NamedTuple):
  """Boxes [b, n, 4] (xyxy, clipped to the image), scores [b, n] in falling order, valid [b, n]."""

  boxes: Float[Array, "b n 4"]
  scores: Float[Array, "b n"]
  valid: Bool[Array, "b n"]


class RPNOutput(NamedTuple):
  """Outputs of one level, in the head's dtype: logits [b, h, w, a], deltas [b, h, w, 4a]; a anchors."""

  logits: Float[Array, "b h w a"]
  deltas: Float[Array, "b h w d"]


class RPN(nnx.Module):
  """One 3x3 convolution, then objectness and box deltas per anchor; shared by all levels."""

  def __init__(
    self, feature_specs: Sequence[FeatureSpec], config: HTCConfig, *, dtype: DTypeLike, rngs: nnx.Rngs
  ):
    self.strides = tuple(spec.stride for spec in feature_specs)
    self.config = config
    anchors = len(config.anchor_scales) * len(config.anchor_ratios)
    channels = config.rpn_channels
    self.conv = MapConv(
      feature_specs[0].channels, channels, (3, 3), dtype=dtype, kernel_init=_NORMAL, rngs=rngs
    )
    self.objectness = nnx.Linear(channels, anchors, dtype=dtype, kernel_init=_NORMAL, rngs=rngs)
    self.deltas = nnx.Linear(channels, 4 * anchors, dtype=dtype, kernel_init=_NORMAL, rngs=rngs)

  def __call__(self, features: Sequence[Float[Array, "b _h _w c"]]) -> list[RPNOutput]:
    outputs = []
    for x in features:
      x = ACTIVATIONS[self.config.activation](self.conv(x))
      outputs.append(RPNOutput(self.objectness(x), self.deltas(x)))
    return outputs

  def _flat(self, outputs: Sequence[RPNOutput]) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """Per level float32 logits [b, n], deltas [b, n, 4], anchors [n, 4], by row, column, anchor."""
    flat = []
    for (logits, deltas), stride in zip(outputs, self.strides, strict=True):
      batch, height, width, _ = logits.shape
      anchors = anchor_ops.grid_anchors(
        height, width, stride, self.config.anchor_scales, self.config.anchor_ratios
      )
      flat.append(
        (
          logits.reshape(batch, -1).astype(jnp.float32),
          deltas.reshape(batch, -1, 4).astype(jnp.float32),
          anchors,
        )
      )
    return flat

  def losses(
    self,
    outputs: Sequence[RPNOutput],
    gt_boxes: Float[Array, "b g 4"],
    gt_valid: Bool[Array, "b g"],
    image_size: Int[Array, "b 2"],
    rng: PRNGKeyArray,
  ) -> tuple[dict[str, Float[Array, ""]], dict[str, Float[Array, ""]]]:
    """Losses rpn_class and rpn_box, then metrics.

    Both losses are divided by the number of samples in the whole batch, as in mmdet.
    """
    config = self.config
    logits, deltas, anchors = (
      jnp.concatenate(x, axis=-2 if i else -1) for i, x in enumerate(zip(*self._flat(outputs)))
    )
    usable = anchor_ops.inside_flags(anchors, image_size, config.allowed_border)
    if config.allowed_border < 0:
      usable &= anchor_ops.center_inside(anchors, image_size)  # nothing to learn in the padding

    def targets_of(key, usable, gt_boxes, gt_valid):
      assigned = sampling.assign_max_iou(
        anchors,
        usable,
        gt_boxes,
        gt_valid,
        positive_iou=config.rpn_positive_iou,
        negative_iou=config.rpn_negative_iou,
        min_positive_iou=config.rpn_min_positive_iou,
        match_low_quality=True,
      )
      positive, negative = sampling.sample(
        key, assigned, num=config.rpn_samples, positive_fraction=config.rpn_positive_fraction
      )
      targets = box_ops.encode_deltas(anchors, gt_boxes[jnp.maximum(assigned, 0)], _UNIT_STDS)
      return positive, negative, jnp.where(positive[:, None], targets, 0.0)

    keys = jax.random.split(rng, logits.shape[0])
    positive, negative, targets = jax.vmap(targets_of)(keys, usable, gt_boxes, gt_valid)
    # An image without positives (or negatives) still counts one.
    samples = (jnp.maximum(positive.sum(1), 1) + jnp.maximum(negative.sum(1), 1)).sum()
    class_loss = optax.sigmoid_binary_cross_entropy(logits, positive.astype(jnp.float32))
    box_loss = loss_ops.smooth_l1(deltas - targets, config.rpn_box_beta).sum(-1)
    losses = {
      "rpn_class": loss_ops.masked_mean(class_loss, positive | negative, samples),
      "rpn_box": loss_ops.masked_mean(box_loss, positive, samples),
    }
    return losses, {"positives/rpn": positive.sum(1).mean(dtype=jnp.float32)}

  def proposals(
    self, outputs: Sequence[RPNOutput], image_size: Int[Array, "b 2"], *, pre_nms: int, count: int
  ) -> Proposals:
    """The best boxes after NMS within each level; no gradient passes.

    Args:
      outputs: of `__call__`.
      image_size: (h, w) of each image's content; boxes are clipped to it.
      pre_nms: anchors per level that enter NMS.
      count: boxes per image that leave it (fewer slots if there are fewer anchors).
    """
    config = self.config
    levels = [jax.lax.stop_gradient(level) for level in self._flat(outputs)]
    sizes = [min(pre_nms, level[0].shape[1]) for level in levels]
    boxes, scores = [], []
    for (logits, deltas, anchors), size in zip(levels, sizes):
      level_scores = jax.nn.sigmoid(logits)
      index = select.indices(select.largest(level_scores, size), size)
      level_scores = jnp.take_along_axis(level_scores, index, axis=1)
      level_boxes = box_ops.decode_deltas(
        anchors[index],
        jnp.take_along_axis(deltas, index[..., None], axis=1),
        _UNIT_STDS,
        image_size,
      )
      large = box_ops.is_valid_size(level_boxes, config.min_proposal_size)
      level_scores = jnp.where(large, level_scores, -jnp.inf)
      # Levels are padded to one size, so that one loop of NMS serves all levels and images at once.
      padding = max(sizes) - size
      boxes.append(jnp.pad(level_boxes, ((0, 0), (0, padding), (0, 0))))
      scores.append(jnp.pad(level_scores, ((0, 0), (0, padding)), constant_values=-jnp.inf))
    boxes, scores = jnp.stack(boxes, 1), jnp.stack(scores, 1)

    def suppress(boxes, scores):
      return nms_ops.nms(boxes, scores, config.proposal_nms_iou)

    keep = jax.vmap(jax.vmap(suppress))(boxes, scores)
    scores = jnp.where(keep, scores, -jnp.inf).reshape(scores.shape[0], -1)
    scores, index = jax.lax.top_k(scores, min(count, sum(sizes)))
    valid = scores > -jnp.inf
    boxes = jnp.take_along_axis(boxes.reshape(boxes.shape[0], -1, 4), index[..., None], axis=1)
    return Proposals(jnp.where(valid[..., None], boxes, 0.0), jnp.where(valid, scores, 0.0), valid)
