"""RetinaNet (Lin et al., arXiv 1708.02002): dense detection by focal loss, on any pyramid.

The values are those of TensorFlow's Model Garden, which "Proper Reuse" (arXiv 2204.00484) trains on frozen
classifiers; anchors lie as in mmdet and in the region proposal network here (`ops.anchors`).
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, PRNGKeyArray
import optax

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.heads import detection_losses, sampling
from frozen_vision.heads.base import DetectionHead, DetectionHeadConfig, Features, Scalars
from frozen_vision.layers.activations import ACTIVATIONS
from frozen_vision.layers.convolution import BatchNorm, MapConv
from frozen_vision.ops import anchors as anchor_ops
from frozen_vision.ops import boxes as box_ops
from frozen_vision.ops import nms as nms_ops
from frozen_vision.ops import select
from frozen_vision.ops.arrays import Array
from frozen_vision.options import Count, Fraction, from_data, Natural, NonNegative, Positive

_STDS = (1.0, 1.0, 1.0, 1.0)
_NORMAL = nnx.initializers.normal(0.01)
_SMALLEST_IOU = 1e-6  # an object that no anchor touches claims none


@dataclasses.dataclass(frozen=True)
class RetinaNetConfig(DetectionHeadConfig):
  """Every choice of the head; defaults are Model Garden's `retinanet_resnetfpn_coco`.

  Attributes:
    num_classes: foreground classes; an anchor is background by having none of them.
    anchor_scales: anchor sides in strides; anchor_ratios: height over width.
    channels, convs: of the 3x3 convolutions before the classifier, and before the boxes.
    norm: "batch": a BatchNorm behind each of them, of its own for each level, as released; or "none", as in
      the paper.
    activation: of these convolutions, `relu` or `swish`.
    prior: probability of every class of every anchor before training.
    positive_iou, negative_iou: anchors at or above are positive, below negative, between ignored. An object's
      best anchors are positive in any case.
    focal_alpha, focal_gamma: of the focal loss.
    huber_delta, box_loss_weight: of the loss of the boxes, a mean over the four numbers.
    score_threshold, nms_iou, max_detections: of the final detections.
    pre_nms: anchors per level, those with the best scores, that leave the head for NMS.
    pre_nms_detections: (anchor, class) pairs of all levels, those with the best scores, that enter it: a
      static bound; exact as long as max_detections of them survive.
  """

  num_classes: int = from_data(80)
  with_masks: bool = from_data(False)
  semantic_classes: int = from_data(0)
  semantic_level: int = from_data(0)
  name: Literal["retinanet"] = "retinanet"

  anchor_scales: tuple[Positive, ...] = (4.0, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3))
  anchor_ratios: tuple[Positive, ...] = (0.5, 1.0, 2.0)
  channels: Count = 256
  convs: Natural = 4
  norm: Literal["batch", "none"] = "batch"
  activation: Literal["relu", "swish"] = "relu"
  prior: Fraction = 0.01

  positive_iou: Fraction = 0.5
  negative_iou: Fraction = 0.4
  focal_alpha: Fraction = 0.25
  focal_gamma: NonNegative = 1.5
  huber_delta: Positive = 0.1
  box_loss_weight: NonNegative = 50.0

  score_threshold: Fraction = 0.05
  nms_iou: Fraction = 0.5
  max_detections: Count = 100
  pre_nms: Count = 1000
  pre_nms_detections: Count = 1000

  def __post_init__(self):
    if not 0 < self.prior < 1:
      raise ValueError(f"RetinaNetConfig.prior is {self.prior}; expected a number between 0 and 1.")


class Tower(nnx.Module):
  """3x3 convolutions that all levels share, each with a norm for each level, and one more for the outputs."""

  def __init__(
    self,
    channels: int,
    outputs: int,
    config: RetinaNetConfig,
    *,
    levels: int,
    bias: float = 0.0,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    """Builds the convolutions.

    Args:
      channels: of the pyramid.
      outputs: numbers per cell.
      bias: of the outputs, at first.
    """
    self.activation = ACTIVATIONS[config.activation]
    has_norm = config.norm == "batch"

    def conv(inputs: int, outputs: int, *, use_bias: bool = True, bias: float = 0.0) -> MapConv:
      return MapConv(
        inputs,
        outputs,
        (3, 3),
        use_bias=use_bias,
        kernel_init=_NORMAL,
        bias_init=nnx.initializers.constant(bias),
        dtype=dtype,
        rngs=rngs,
      )

    widths = [channels, *[config.channels] * config.convs]
    self.convs = nnx.List(
      [conv(a, b, use_bias=not has_norm) for a, b in zip(widths[:-1], widths[1:], strict=True)]
    )
    self.norms = nnx.List(
      [
        nnx.List(
          [
            BatchNorm(config.channels, epsilon=1e-3, momentum=0.01, rngs=rngs)
            for _ in range(levels if has_norm else 0)
          ]
        )
        for _ in range(config.convs)
      ]
    )
    self.outputs = conv(widths[-1], outputs, bias=bias)

  def __call__(self, x: Float[Array, "b h w c"], level: int) -> Float[Array, "b h w k"]:
    """The outputs of one level, in the head's dtype."""
    for conv, norms in zip(self.convs, self.norms, strict=True):
      x = conv(x)
      x = self.activation(norms[level](x) if norms else x)
    return self.outputs(x)


class RetinaNet(DetectionHead):
  """One stage: a tower for classes, one for boxes."""

  config: RetinaNetConfig

  def __init__(
    self,
    feature_specs: Sequence[FeatureSpec],
    config: RetinaNetConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Builds the head.

    Args:
      feature_specs: levels of the neck, all of one width; strides 8 to 128 in the paper.
      config: its options.
      dtype: of the computation; parameters, norm statistics and losses are float32.
      rngs: for the weights.

    Raises:
      ValueError: no levels, or levels of several widths.
    """
    widths = {spec.channels for spec in feature_specs}
    if len(widths) != 1:
      raise ValueError(
        f"RetinaNet got levels {tuple(feature_specs)}; expected levels with one number of channels, as an "
        "FPN gives them."
      )
    self.config = config
    self.strides = tuple(spec.stride for spec in feature_specs)
    anchors = len(config.anchor_scales) * len(config.anchor_ratios)
    shared = dict(levels=len(self.strides), dtype=dtype, rngs=rngs)
    self.classes = Tower(
      widths.pop(),
      anchors * config.num_classes,
      config,
      bias=-math.log((1 - config.prior) / config.prior),
      **shared,
    )
    self.boxes = Tower(feature_specs[0].channels, 4 * anchors, config, **shared)

  def __call__(
    self, features: Features
  ) -> list[tuple[Float[Array, "b n c"], Float[Array, "b n 4"], Float[Array, "n 4"]]]:
    """Class logits, deltas and anchors of every level, float32; by row, column, ratio and scale."""
    found = []
    for level, (x, stride) in enumerate(zip(features, self.strides, strict=True)):
      batch, height, width, _ = x.shape
      logits, deltas = self.classes(x, level), self.boxes(x, level)
      anchors = anchor_ops.grid_anchors(
        height, width, stride, self.config.anchor_scales, self.config.anchor_ratios
      )
      found.append(
        (
          logits.reshape(batch, -1, self.config.num_classes).astype(jnp.float32),
          deltas.reshape(batch, -1, 4).astype(jnp.float32),
          anchors,
        )
      )
    return found

  def losses(
    self, features: Features, batch: Mapping[str, Array], rng: PRNGKeyArray
  ) -> tuple[Scalars, Scalars]:
    """Losses `class` and `box`; see `DetectionHead.losses`.

    Both are sums over anchors, divided by one more than the positive anchors of the whole batch. Anchors
    whose cell begins outside of the image are left out.
    """
    config = self.config
    levels = self(features)
    logits, deltas = (jnp.concatenate([level[i] for level in levels], axis=1) for i in (0, 1))
    anchors = jnp.concatenate([anchors for _, _, anchors in levels])
    usable = anchor_ops.center_inside(anchors, batch["image_size"])
    truth = sampling.truth_of(batch)

    def targets(usable, boxes, labels, valid):
      assigned = sampling.assign_max_iou(
        anchors,
        usable,
        boxes,
        valid,
        positive_iou=config.positive_iou,
        negative_iou=config.negative_iou,
        min_positive_iou=_SMALLEST_IOU,
        match_low_quality=True,
      )
      own = jnp.maximum(assigned, 0)
      return assigned, labels[own], box_ops.encode_deltas(anchors, boxes[own], _STDS)

    assigned, labels, wanted = jax.vmap(targets)(usable, truth["boxes"], truth["labels"], truth["valid"])
    positive = assigned >= 0
    count = positive.sum() + 1
    is_class = positive[..., None] & (labels[..., None] == jnp.arange(config.num_classes))
    focal = optax.sigmoid_focal_loss(
      logits, is_class.astype(jnp.float32), alpha=config.focal_alpha, gamma=config.focal_gamma
    ).sum(-1)
    huber = optax.huber_loss(
      deltas, jnp.where(positive[..., None], wanted, 0.0), delta=config.huber_delta
    ).mean(-1)
    losses = {
      "class": detection_losses.masked_mean(focal, assigned != sampling.IGNORED, count),
      "box": config.box_loss_weight * detection_losses.masked_mean(huber, positive, count),
    }
    return losses, {"positives": positive.sum(1).mean(dtype=jnp.float32)}

  def score_boxes(
    self, features: Features, image_size: Int[Array, "b 2"]
  ) -> tuple[Float[Array, "b n 1 4"], Float[Array, "b n c"], Bool[Array, "b n"]]:
    """The `pre_nms` best anchors of every level; see `DetectionHead.score_boxes`."""
    boxes, scores = [], []
    for logits, deltas, anchors in self(features):
      size = min(self.config.pre_nms, logits.shape[1])
      index = select.indices(select.largest(logits.max(-1), size), size)
      boxes.append(
        box_ops.decode_deltas(
          anchors[index], jnp.take_along_axis(deltas, index[..., None], axis=1), _STDS, image_size
        )
      )
      scores.append(jax.nn.sigmoid(jnp.take_along_axis(logits, index[..., None], axis=1)))
    found = jnp.concatenate(boxes, axis=1)
    return found[:, :, None], jnp.concatenate(scores, axis=1), box_ops.is_valid_size(found)

  def select(
    self,
    boxes: Float[Array, "b n k 4"],
    probabilities: Float[Array, "b n c"],
    valid: Bool[Array, "b n"],
    *,
    num_views: int = 1,
    max_detections: int | None = None,
  ) -> dict[str, Array]:
    """NMS within each class among the best pairs; see `DetectionHead.select`."""
    scores = jnp.where(valid[..., None], probabilities.astype(jnp.float32), -jnp.inf)

    def detect(boxes, scores):
      return nms_ops.nms_of_best_pairs(
        boxes,
        scores,
        iou_threshold=self.config.nms_iou,
        score_threshold=self.config.score_threshold,
        num_pairs=num_views * self.config.pre_nms_detections,
        max_detections=max_detections or self.config.max_detections,
      )

    return jax.vmap(detect)(boxes, scores)
