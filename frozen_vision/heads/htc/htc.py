"""Hybrid Task Cascade (Chen et al. 2019), and the simpler cascades that it contains.

Behaviour follows mmdet 3.3's HybridTaskCascadeRoIHead, CascadeRoIHead and StandardRoIHead; with
samplers so wide that nothing is left to chance, losses and predictions are equal to theirs.
"""

from collections.abc import Mapping, Sequence
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, PRNGKeyArray
import optax

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.heads import base, sampling
from frozen_vision.heads import detection_losses as loss_ops
from frozen_vision.heads.base import Features, Scalars
from frozen_vision.heads.htc.box_head import BoxHead, BoxOutput
from frozen_vision.heads.htc.config import HTCConfig
from frozen_vision.heads.htc.detections import select_detections
from frozen_vision.heads.htc.mask_head import mask_flow, MaskHead
from frozen_vision.heads.htc.rpn import Proposals, RPN
from frozen_vision.heads.htc.semantic_head import SemanticHead
from frozen_vision.ops import masks as mask_ops
from frozen_vision.ops import roi_align as roi_ops
from frozen_vision.ops.arrays import Array

_CLASS_STREAM = 0x636C7373  # what a class loss draws is not what samples rois


class HTC(base.DetectionHead):
  """Proposals, box stages, mask stages and an optional semantic branch on one feature pyramid.

  `predict_boxes` is `score_boxes` and `select` for one view.
  """

  def __init__(
    self,
    feature_specs: Sequence[FeatureSpec],
    config: HTCConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Builds the head.

    Args:
      feature_specs: of the neck's outputs, fine to coarse, all with the same number of channels.
      config: see HTCConfig.
      dtype: of the convolutions and matrix products. Parameters, softmax, box decoding, NMS and
        losses are float32.
      rngs: for the weights.

    Raises:
      ValueError: levels differ in channels, or there are too few for `config`.
    """
    feature_specs = tuple(feature_specs)
    widths = {spec.channels for spec in feature_specs}
    levels = max(config.roi_levels, config.semantic_level + 1 if config.semantic_classes else 1)
    if len(widths) != 1 or len(feature_specs) < levels:
      raise ValueError(
        f"HTC got levels {feature_specs}; expected at least {levels} levels with one number of"
        " channels, as an FPN"
        " gives them."
      )
    channels = widths.pop()
    self.config = config
    self.feature_specs = feature_specs
    self.roi_strides = tuple(spec.stride for spec in feature_specs[: config.roi_levels])
    self.rpn = RPN(feature_specs, config, dtype=dtype, rngs=rngs)
    self.box_heads = nnx.List(
      [BoxHead(channels, config, stds, dtype=dtype, rngs=rngs) for stds in config.stage_stds]
    )
    self.mask_heads = nnx.List(
      [
        MaskHead(channels, config, flow=config.mask_info_flow and stage > 0, dtype=dtype, rngs=rngs)
        for stage in range(config.num_stages if config.with_masks else 0)
      ]
    )
    self.semantic_head = (
      SemanticHead(feature_specs, config, dtype=dtype, rngs=rngs) if config.semantic_classes else None
    )

  # Features of rois.

  def semantic(self, features: Features) -> tuple[jax.Array | None, jax.Array | None]:
    """(logits, embedding) of the semantic branch; (None, None) where there is none."""
    return self.semantic_head(features) if self.semantic_head is not None else (None, None)

  def _roi_features(
    self, features: Features, embedding: Array | None, rois: Float[Array, "b n 4"], size: int
  ) -> Float[Array, "b n s s c"]:
    config = self.config
    x = roi_ops.roi_align(
      tuple(features[: config.roi_levels]),
      rois,
      strides=self.roi_strides,
      output_size=size,
      sampling_ratio=config.sampling_ratio,
      levels=roi_ops.assign_levels(rois, config.roi_levels, config.finest_scale),
    )
    if embedding is None:
      return x
    # Always cropped at the masks' resolution, then pooled to the boxes' (mmdet).
    y = roi_ops.roi_align(
      (embedding,),
      rois,
      strides=(self.semantic_head.stride,),
      output_size=config.mask_roi_size,
      sampling_ratio=config.sampling_ratio,
    )
    factor = config.mask_roi_size // size
    y = y.reshape(*y.shape[:2], size, factor, size, factor, y.shape[-1]).mean(axis=(3, 5))
    return x + y

  def box_outputs(
    self,
    stage: int,
    features: Features,
    rois: Float[Array, "b n 4"],
    embedding: Array | None = None,
  ) -> BoxOutput:
    """Class logits and deltas of one stage for given rois; `embedding` from `semantic`."""
    return self.box_heads[stage](self._roi_features(features, embedding, rois, self.config.box_roi_size))

  def _mask_features(
    self, stage: int, features: Features, rois: Float[Array, "b n 4"], embedding: Array | None
  ) -> list[Float[Array, "r s s c"]]:
    x = self._roi_features(features, embedding, rois, self.config.mask_roi_size)
    return mask_flow(self.mask_heads, stage, x.reshape(-1, *x.shape[2:]), self.config.mask_info_flow)

  def mask_logits(
    self,
    stage: int,
    features: Features,
    rois: Float[Array, "b n 4"],
    labels: Int[Array, "b n"] | None = None,
    embedding: Array | None = None,
  ) -> Float[Array, "b n m m *k"]:
    """Mask logits of one stage, of the class `labels` or (last axis) of all classes."""
    if self.config.mask_info_flow:
      x = self._mask_features(stage, features, rois, embedding)[-1]
    else:  # the heads before this one have no say
      x = self._roi_features(features, embedding, rois, self.config.mask_roi_size)
      x = self.mask_heads[stage].features(x.reshape(-1, *x.shape[2:]))
    logits = self.mask_heads[stage].predict(x, None if labels is None else labels.reshape(-1))
    return logits.reshape(*rois.shape[:2], *logits.shape[1:])

  # Training.

  def losses(
    self, features: Features, batch: Mapping[str, Array], rng: PRNGKeyArray
  ) -> tuple[Scalars, Scalars]:
    """All losses of the head.

    Args:
      features: of the neck.
      batch: image_size int [b, 2]; boxes float [b, n, 4]; labels int [b, n]; valid bool [b, n];
        with masks also masks uint8 [b, n, H, ceil(W/8)]; with the semantic branch also semantic int
        [b, h/8, w/8]. Objects without an area are left out. Images without objects are welcome.
      rng: for sampling anchors and rois.

    Returns:
      Losses, already weighted: their sum is the loss. Then metrics, which must not be added:
      accuracy/stage* in percent, positives/* per image.
    """
    truth = sampling.truth_of(batch)
    rpn_key, roi_key = jax.random.split(rng)
    outputs = self.rpn(features)
    losses, metrics = self.rpn.losses(outputs, truth["boxes"], truth["valid"], batch["image_size"], rpn_key)
    proposals = self.rpn.proposals(
      outputs,
      batch["image_size"],
      pre_nms=self.config.train_pre_nms,
      count=self.config.train_proposals,
    )
    roi_losses, roi_metrics = self.roi_losses(features, proposals.boxes, proposals.valid, batch, roi_key)
    return losses | roi_losses, metrics | roi_metrics

  def roi_losses(
    self,
    features: Features,
    boxes: Float[Array, "b n 4"],
    valid: Bool[Array, "b n"],
    batch: Mapping[str, Array],
    rng: PRNGKeyArray,
  ) -> tuple[Scalars, Scalars]:
    """Losses of all stages (and of the semantic branch) from given proposals; else as `losses`."""
    config = self.config
    truth = sampling.truth_of(batch)
    losses, metrics = {}, {}
    logits, embedding = self.semantic(features)
    if logits is not None:
      losses["semantic"] = self.semantic_head.loss(logits, batch["semantic"])
    for stage, (head, weight) in enumerate(zip(self.box_heads, config.stage_loss_weights)):
      box_key, mask_key = jax.random.split(jax.random.fold_in(rng, stage))
      samples = self._sample(box_key, stage, boxes, valid, truth)
      labels, targets = self._targets(samples, truth)
      output = self.box_outputs(stage, features, samples.boxes, embedding)
      class_loss, box_loss, accuracy = head.losses(
        output,
        samples.boxes,
        labels,
        targets,
        samples.positive,
        samples.valid,
        batch,
        jax.random.fold_in(box_key, _CLASS_STREAM),
      )
      losses[f"stage{stage}_class"] = weight * class_loss
      losses[f"stage{stage}_box"] = weight * box_loss
      metrics[f"accuracy/stage{stage}"] = accuracy
      metrics[f"positives/stage{stage}"] = samples.positive.sum(1).mean(dtype=jnp.float32)
      # The next stage begins with these; the ground truth among them would teach it nothing.
      boxes = head.refine(output, samples.boxes, batch["image_size"], labels)
      valid = samples.valid & ~samples.is_gt
      if config.with_masks:
        if config.interleaved:
          samples = self._sample(mask_key, stage, boxes, valid, truth)
        losses[f"stage{stage}_mask"] = weight * self._mask_loss(
          stage, features, embedding, samples, truth, batch
        )
        metrics[f"positives/stage{stage}_mask"] = samples.positive.sum(1).mean(dtype=jnp.float32)
    return losses, metrics

  def _sample(
    self, key: PRNGKeyArray, stage: int, boxes: Array, valid: Array, truth: Mapping[str, Array]
  ) -> sampling.RoiSamples:
    config = self.config

    def sample(key, *arrays):
      return sampling.sample_rois(
        key,
        *arrays,
        iou=config.stage_ious[stage],
        match_low_quality=config.match_low_quality,
        num=config.roi_samples,
        positive_fraction=config.roi_positive_fraction,
      )

    keys = jax.random.split(key, boxes.shape[0])
    samples = jax.vmap(sample)(keys, boxes, valid, truth["boxes"], truth["valid"])
    return jax.lax.stop_gradient(samples)

  def _targets(self, samples: sampling.RoiSamples, truth: Mapping[str, Array]) -> tuple[jax.Array, jax.Array]:
    """Class of each roi (background where not positive) and box of its object."""
    labels = jnp.take_along_axis(truth["labels"], samples.gt_index, axis=1)
    boxes = jnp.take_along_axis(truth["boxes"], samples.gt_index[..., None], axis=1)
    return jnp.where(samples.positive, labels, self.config.num_classes), boxes

  def _mask_loss(
    self,
    stage: int,
    features: Features,
    embedding: Array | None,
    samples: sampling.RoiSamples,
    truth: Mapping[str, Array],
    batch: Mapping[str, Array],
  ) -> Float[Array, ""]:
    """Binary cross-entropy of the object's class, the mean over all cells of the positive rois."""
    config = self.config
    slots = int(config.roi_samples * config.roi_positive_fraction)  # positives come first: no more can be
    samples = jax.tree.map(lambda x: x[:, :slots], samples)
    labels, _ = self._targets(samples, truth)
    labels = jnp.where(samples.positive, labels, 0)
    logits = self.mask_logits(stage, features, samples.boxes, labels, embedding)
    targets = mask_ops.crop_masks(batch["masks"], samples.gt_index, samples.boxes, config.mask_size)
    loss = optax.sigmoid_binary_cross_entropy(logits, targets.astype(jnp.float32)).mean(axis=(-2, -1))
    return loss_ops.masked_mean(loss, samples.positive)

  # Prediction.

  def propose(self, features: Features, image_size: Int[Array, "b 2"]) -> Proposals:
    """The `config.test_proposals` best boxes of each image, xyxy, clipped to the image."""
    return self.rpn.proposals(
      self.rpn(features),
      image_size,
      pre_nms=self.config.test_pre_nms,
      count=self.config.test_proposals,
    )

  def score_boxes(
    self, features: Features, image_size: Int[Array, "b 2"], proposals: Proposals | None = None
  ) -> tuple[Float[Array, "b n k 4"], Float[Array, "b n c"], Bool[Array, "b n"]]:
    """Boxes and class probabilities before NMS, which multi-scale testing merges.

    Boxes are the last stage's. Class logits are averaged over the stages before the softmax, as in
    mmdet, or probabilities (`config.class_average`).

    Returns:
      Boxes (k = 1, or one per class), probabilities of the foreground classes, valid.
    """
    proposals = self.propose(features, image_size) if proposals is None else proposals
    _, embedding = self.semantic(features)
    rois, of_logits, total = proposals.boxes, self.config.class_average == "logits", 0.0
    for stage, head in enumerate(self.box_heads):
      output = self.box_outputs(stage, features, rois, embedding)
      total = total + (output.logits if of_logits else head.probabilities(output.logits))
      if stage + 1 < self.config.num_stages:
        rois = head.refine(output, rois, image_size)
    mean = total / self.config.num_stages
    probabilities = (self.box_heads[0].probabilities(mean) if of_logits else mean)[..., :-1]
    return head.decode(output, rois, image_size), probabilities, proposals.valid

  def predict_boxes(
    self, features: Features, image_size: Int[Array, "b 2"], proposals: Proposals | None = None
  ) -> dict[str, Array]:
    """Detections of each image, `config.max_detections` rows.

    Args:
      features: of the neck.
      image_size: (h, w) of each image's content; boxes are clipped to it.
      proposals: instead of `propose`'s.

    Returns:
      boxes [b, d, 4] xyxy in input pixels, scores [b, d] in falling order, labels int32 [b, d],
      valid [b, d].
    """
    return self.select(*self.score_boxes(features, image_size, proposals))

  def select(
    self,
    boxes: Float[Array, "b n k 4"],
    probabilities: Float[Array, "b n c"],
    valid: Bool[Array, "b n"],
    *,
    num_views: int = 1,
    max_detections: int | None = None,
  ) -> dict[str, Array]:
    """NMS within each class over the candidates of all views; see `detections.select_detections`."""
    # Every view brings its own candidates of an object, and the bound before a hard NMS must leave room for
    # them.
    config = dataclasses.replace(
      self.config,
      max_detections=max_detections or self.config.max_detections,
      pre_nms_detections=num_views * self.config.pre_nms_detections,
    )
    return select_detections(boxes, probabilities, valid, config)

  def predict_masks(
    self, features: Features, boxes: Float[Array, "b d 4"], labels: Int[Array, "b d"]
  ) -> Float[Array, "b d m m"]:
    """Mask probabilities of the given class, inside each box, `config.mask_size` cells per side.

    Raises:
      ValueError: the head was built without masks.
    """
    config = self.config
    if not config.with_masks:
      raise ValueError("HTC.predict_masks: this head was built with with_masks=False.")
    _, embedding = self.semantic(features)
    last = config.num_stages - 1
    if config.mask_average == "last":
      return jax.nn.sigmoid(self.mask_logits(last, features, boxes, labels, embedding))
    states = self._mask_features(last, features, boxes, embedding)
    masks = [jax.nn.sigmoid(head.predict(x, labels.reshape(-1))) for head, x in zip(self.mask_heads, states)]
    mean = sum(masks) / len(masks)
    return mean.reshape(*boxes.shape[:2], *mean.shape[1:])
