"""Train steps and predictions of the heads, from the package's modules without a task, a config or data.

A step is the package's own (`make_train_step`); what a task gives to it is here as little as it needs: the
features of a batch, and the loss.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks.gpu import models
from frozen_vision.freezing import partition
from frozen_vision.heads import linear, plain_mask_decoder, video_swin, views
from frozen_vision.heads.htc import config as htc_config
from frozen_vision.heads.htc import htc
from frozen_vision.heads.mask2former import config as mask2former_config
from frozen_vision.heads.mask2former import mask2former
from frozen_vision.necks.build import build_neck
from frozen_vision.tasks import compiled
from frozen_vision.training import step as train_step

_DTYPE = jnp.bfloat16  # of the heads' products
_OBJECTS, _ROWS = 20, 100  # real objects of an image, and rows of boxes and masks


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of a workload: the configs' numbers, or toys."""

  neck_channels: int = 256
  htc: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  mask2former: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  plain_mask: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  video_swin: Mapping[str, Any] = dataclasses.field(default_factory=lambda: dict(channels=(512,)))
  detection_classes: int = 80
  segmentation_classes: int = 150
  action_classes: int = 400


TOY = Sizes(
  neck_channels=32,
  htc=dict(
    anchor_scales=(4.0,),
    rpn_channels=32,
    train_pre_nms=16,
    train_proposals=16,
    test_pre_nms=16,
    test_proposals=16,
    roi_samples=8,
    finest_scale=28.0,
    fc_channels=32,
    mask_channels=32,
    mask_convs=1,
    mask_roi_size=4,
    max_detections=8,
    stage_ious=(0.5,),
    stage_loss_weights=(1.0,),
    stage_stds=((0.1, 0.1, 0.2, 0.2),),
  ),
  mask2former=dict(
    num_queries=4,
    hidden_dim=32,
    mask_dim=32,
    num_heads=2,
    encoder_layers=1,
    encoder_ffn_dim=32,
    decoder_layers=1,
    decoder_ffn_dim=32,
    norm_groups=8,
    num_points=32,
  ),
  plain_mask=dict(num_queries=4, blocks=1, num_heads=2, num_points=32),
  video_swin=dict(channels=(32,), depths=(2,), window_size=(2, 2, 2)),
  detection_classes=3,
  segmentation_classes=3,
  action_classes=3,
)


class Detection:
  """HTC on an FPN."""

  patterns = ("neck/.*", "head/.*")

  def __init__(self, sizes: Sizes):
    self._sizes = sizes

  def head(self, specs: Any, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
    neck = build_neck("fpn", specs, channels=self._sizes.neck_channels, dtype=_DTYPE, rngs=rngs)
    options = htc_config.htc(num_classes=self._sizes.detection_classes, **self._sizes.htc)
    return dict(neck=neck, head=htc.HTC(neck.feature_specs, options, dtype=_DTYPE, rngs=rngs))

  def batch(self, batch: int, side: int) -> dict[str, np.ndarray]:
    """Noise with objects: sizes log-uniform from 1/48 to 1/2 of the side, masks that are ellipses."""
    rng = np.random.default_rng(0)
    size = side * np.exp(rng.uniform(np.log(1 / 48), np.log(1 / 2), (batch, _OBJECTS, 2)))
    corner = rng.uniform(0, 1, size.shape) * (side - size)
    boxes, masks = (
      np.zeros((batch, _ROWS, 4), np.float32),
      np.zeros((batch, _ROWS, side, -(-side // 8)), np.uint8),
    )
    boxes[:, :_OBJECTS] = np.concatenate([corner, corner + size], axis=-1)
    cells = np.arange(side) + 0.5
    for image, row in np.ndindex(batch, _OBJECTS):
      middle, half = corner[image, row] + size[image, row] / 2, size[image, row] / 2
      x, y = ((cells - middle[axis]) / half[axis] for axis in (0, 1))
      masks[image, row] = np.packbits(x[None] ** 2 + y[:, None] ** 2 <= 1, axis=-1)
    valid = np.broadcast_to(np.arange(_ROWS) < _OBJECTS, (batch, _ROWS))
    labels = rng.integers(0, self._sizes.detection_classes, (batch, _ROWS)) * valid
    return _images(rng, batch, side) | dict(
      boxes=boxes, labels=labels.astype(np.int32), valid=np.array(valid), masks=masks
    )

  def features(self, model: Any, batch: Mapping[str, jax.Array], rng: jax.Array | None = None) -> Any:
    return _image_features(model, batch, rng)

  def losses(self, model: Any, batch: Mapping[str, jax.Array], features: Any, rng: jax.Array) -> Any:
    return model.head.losses(model.neck(features), batch, rng)

  def predict(self, model: Any, images: jax.Array, image_size: jax.Array, features: Any) -> Any:
    return views.predict(model.head, [views.View(model.neck(features), image_size)], image_size)


class Segmentation:
  """Mask2Former."""

  patterns = ("head/.*",)

  def __init__(self, sizes: Sizes):
    self._sizes = sizes

  def head(self, specs: Any, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
    options = mask2former_config.Mask2FormerConfig(
      num_classes=self._sizes.segmentation_classes, **self._sizes.mask2former
    )
    return dict(head=mask2former.Mask2Former(specs, options, dtype=_DTYPE, rngs=rngs))

  def batch(self, batch: int, side: int) -> dict[str, np.ndarray]:
    """Noise with labels in 8 x 8 squares."""
    rng = np.random.default_rng(0)
    segments = min(64, self._sizes.segmentation_classes)
    squares = rng.integers(0, self._sizes.segmentation_classes, (batch, 8, 8))
    labels = np.repeat(np.repeat(squares, -(-side // 8), axis=1), -(-side // 8), axis=2)[:, :side, :side]
    rows = np.zeros((batch, segments), np.int32)
    valid = np.zeros((batch, segments), bool)
    for image in range(batch):
      present = np.unique(labels[image])[:segments]
      rows[image, : len(present)], valid[image, : len(present)] = present, True
    return _images(rng, batch, side) | dict(
      labels=labels.astype(np.uint8), segment_labels=rows, segment_valid=valid
    )

  def features(self, model: Any, batch: Mapping[str, jax.Array], rng: jax.Array | None = None) -> Any:
    return _image_features(model, batch, rng)

  def losses(self, model: Any, batch: Mapping[str, jax.Array], features: Any, rng: jax.Array) -> Any:
    return model.head.losses(features, batch, rng)

  def predict(self, model: Any, images: jax.Array, image_size: jax.Array, features: Any) -> Any:
    del image_size
    return jnp.argmax(model.head.predict_semantic(features, images.shape[1:3]), axis=-1).astype(jnp.uint8)


class LinearSegmentation(Segmentation):
  """A linear layer on the features, the cheapest head."""

  def head(self, specs: Any, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
    options = linear.LinearConfig(num_classes=self._sizes.segmentation_classes)
    return dict(head=linear.LinearHead(specs, options, dtype=_DTYPE, rngs=rngs))


class PlainMaskSegmentation(Segmentation):
  """PMT's decoder on the taps of a plain ViT."""

  def head(self, specs: Any, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
    options = plain_mask_decoder.PlainMaskConfig(
      num_classes=self._sizes.segmentation_classes, **self._sizes.plain_mask
    )
    return dict(head=plain_mask_decoder.PlainMaskDecoder(specs, options, dtype=_DTYPE, rngs=rngs))


class Action:
  """Video Swin on the features of every frame."""

  patterns = ("head/.*",)

  def __init__(self, sizes: Sizes, frames: int):
    self._sizes, self._frames = sizes, frames

  def head(self, specs: Any, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
    options = video_swin.VideoSwinHeadConfig(**self._sizes.video_swin)
    classes = self._sizes.action_classes
    return dict(head=video_swin.VideoSwinHead(specs, options, classes, dtype=_DTYPE, rngs=rngs))

  def batch(self, batch: int, side: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    clip = rng.integers(0, 256, (batch, self._frames, side, side, 3), np.uint8)
    return dict(clip=clip, label=rng.integers(0, self._sizes.action_classes, batch).astype(np.int32))

  def features(self, model: Any, batch: Mapping[str, jax.Array], rng: jax.Array | None = None) -> Any:
    clip = batch["clip"]
    images = model.backbone.preprocessing.normalise(clip.reshape(-1, *clip.shape[2:]))
    found = model.backbone(images) if rng is None else model.backbone(images, rng=rng)
    return tuple(
      found[level].reshape(*clip.shape[:2], *found[level].shape[1:]) for level in model.head.levels
    )

  def losses(self, model: Any, batch: Mapping[str, jax.Array], features: Any, rng: jax.Array) -> Any:
    logits = model.head(features, rng)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return dict(loss_ce=jnp.mean(loss)), {}


Workload = Detection | Segmentation | Action


class _Task:
  """As much of a task as the train step asks for."""

  def __init__(self, workload: Workload):
    self._workload = workload

  def prepare(self, batch: compiled.Batch, rng: jax.Array | None, phase: None) -> compiled.Batch:
    return batch

  def features(self, model: Any, batch: compiled.Batch, rng: jax.Array | None) -> compiled.Features:
    return self._workload.features(model, batch, rng)

  def loss(
    self, model: Any, batch: compiled.Batch, features: compiled.Features, rng: jax.Array, state: Any
  ) -> compiled.Losses:
    return compiled.Losses(*self._workload.losses(model, batch, features, rng))


class Model(nnx.Module):
  """A backbone with what trains on it."""

  def __init__(self, backbone: Any, parts: Mapping[str, nnx.Module]):
    self.backbone = backbone if isinstance(backbone, nnx.Module) else nnx.data(backbone)
    for name, part in parts.items():
      setattr(self, name, part)


@dataclasses.dataclass(frozen=True)
class TrainStep:
  """A train step and its arguments but for the batch.

  Attributes:
    step: (state, frozen, batch) -> (state, scalars).
    make_state: the first state, on the device; every call makes a new one, because a step donates it.
  """

  step: Callable[[Any, Any, Any], Any]
  make_state: Callable[[], Any]
  frozen: nnx.State


def build_head(workload: Workload, feature_specs: Any) -> dict[str, nnx.Module]:
  """The trainable modules, initialised."""
  return models.initialised(lambda: nnx.Dict(workload.head(feature_specs, nnx.Rngs(0))))


def build_train_step(workload: Workload, backbone: Any, *, everything: bool = False) -> TrainStep:
  """A train step with AdamW.

  Args:
    backbone: folded, or a module where `everything` trains.
  """
  model = Model(backbone, build_head(workload, backbone.feature_specs))
  graphdef, trainable, frozen = partition.partition(model, (".*",) if everything else workload.patterns)
  tx = optax.adamw(1e-4, weight_decay=0.05)
  step = train_step.make_train_step(_Task(workload), graphdef, tx, frozen_pass=not everything)
  make = jax.jit(lambda leaves: train_step.init_state(jax.tree.map(jnp.copy, leaves), tx, seed=0, ema=False))
  return TrainStep(step, lambda: make(trainable), frozen)


def _images(rng: np.random.Generator, batch: int, side: int) -> dict[str, np.ndarray]:
  return dict(
    image=rng.integers(0, 256, (batch, side, side, 3), np.uint8),
    image_size=np.full((batch, 2), side, np.int32),
  )


def _image_features(model: Any, batch: Mapping[str, jax.Array], rng: jax.Array | None) -> Any:
  images = model.backbone.preprocessing.normalise(batch["image"], batch["image_size"])
  return model.backbone(images) if rng is None else model.backbone(images, rng=rng)
