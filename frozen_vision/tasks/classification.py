"""Supervised classification: how the shipped backbone was pretrained, and linear probes on frozen ones."""

import pathlib
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from frozen_vision.backbones import families
from frozen_vision.data import pipeline
from frozen_vision.data.classification import augment, folders
from frozen_vision.metrics import accuracy
from frozen_vision.ops import mixup
from frozen_vision.tasks import base, common


def default_config() -> ml_collections.ConfigDict:
  """All options of the task's own."""
  return ml_collections.ConfigDict(
    dict(
      train=".",  # image folder or tar archive with CLASS/IMAGE members
      validation=".",
      decoded_cache=False,  # keep all images decoded in memory; for many small ones of one size
      image_size=224,  # side that the loader gives
      crop_padding=-1,  # CIFAR-style shifted crops by up to so many pixels; -1: random resized crops
      crop_scale=(0.08, 1.0),
      rand_augment=dict(num_ops=2, magnitude=9.0, magnitude_std=0.5),  # num_ops=0: none
      erasing=0.25,
      mixup=0.8,
      cutmix=1.0,
      mix_probability=1.0,
      label_smoothing=0.1,
      # ((first step, side), ...): sides that images are resized to on the device, growing during the run.
      # Empty: as loaded. Evaluation uses the last.
      resolutions=(),
    )
  )


class Classifier(nnx.Module):
  """A backbone's pooled vector and a linear layer."""

  def __init__(self, backbone: nnx.Module, num_classes: int, *, rngs: nnx.Rngs):
    self.backbone = backbone
    self.head = nnx.Linear(
      backbone.feature_specs[-1].channels,
      num_classes,
      rngs=rngs,
      kernel_init=nnx.initializers.truncated_normal(0.02),
    )


class ClassificationTask(base.Task):
  """Images with one label each."""

  best_metric = "top1"

  def __init__(self, config: ml_collections.ConfigDict, classes: base.Classes | None = None):
    self._config = config
    self._options = options = config.classification
    self._train = self._validation = None
    self.headline = "Classification"
    if classes is None:
      self._train = self._open(options.train)
      self._validation = self._open(options.validation)
      classes = common.shared_classes(
        self._train.classes, self._validation.classes, (options.train, options.validation)
      )
      self.headline = common.headline(self.headline, self._train, self._validation, classes)
    self.classes = tuple(classes)
    self._starts = tuple(int(start) for start, _ in options.resolutions)
    self.phases = tuple(int(side) for _, side in options.resolutions) or (None,)
    if self._starts and (self._starts[0] != 0 or list(self._starts) != sorted(set(self._starts))):
      raise ValueError(
        f"classification.resolutions = {options.resolutions}: expected growing first steps from 0."
      )

  def _open(self, path: str) -> Any:
    source = folders.open_source(common.existing_path(path, "classification"))
    return folders.DecodedImages(source) if self._options.decoded_cache else source

  def phase_at(self, step: int) -> Any:
    if not self._starts:
      return None
    return self.phases[sum(start <= step for start in self._starts) - 1]

  def layer_of(self, path: str) -> int:
    return common.layer_of(path, self._config)

  def build_model(self, backbone: nnx.Module | None = None) -> Classifier:
    return Classifier(
      backbone or common.build_backbone(self._config), len(self.classes), rngs=nnx.Rngs(self._config.seed)
    )

  def train_batches(self, start_example: int) -> pipeline.BatchIterator:
    return common.train_batches(self._config, self._train, self._train_transform(), start_example)

  def blank_example(self) -> dict[str, np.ndarray]:
    side = self._options.image_size
    record = dict(image=np.zeros((side, side, 3), np.uint8), label=0)
    return self._train_transform()(record, np.random.default_rng(0))

  def _train_transform(self) -> augment.TrainTransform:
    options = self._options
    rand_augment = None
    if options.rand_augment.num_ops:
      rand_augment = augment.RandAugment(**options.rand_augment)
    return augment.TrainTransform(
      size=options.image_size,
      padding=None if options.crop_padding < 0 else options.crop_padding,
      crop_scale=tuple(options.crop_scale),
      rand_augment=rand_augment,
      erasing=options.erasing,
    )

  def eval_batches(self) -> pipeline.BatchIterator:
    return common.eval_batches(self._config, self._validation, self.eval_transform())

  def eval_transform(self) -> augment.EvalTransform:
    return augment.EvalTransform(self._options.image_size)

  def _images(self, batch: base.Batch, side: int | None) -> jax.Array:
    images = families.normalise(batch["image"])
    if side is None or images.shape[1:3] == (side, side):
      return images
    return jax.image.resize(images, (images.shape[0], side, side, 3), "cubic")

  def frozen_features(self, model: Classifier, batch: base.Batch) -> base.Features:
    return (model.backbone.embed(self._images(batch, self.phases[-1])),)

  def loss(
    self, model: Classifier, batch: base.Batch, features: base.Features, rng: jax.Array, phase: Any
  ) -> tuple[jax.Array, base.Scalars]:
    options = self._options
    labels = optax.smooth_labels(
      jax.nn.one_hot(batch["label"], model.head.out_features), options.label_smoothing
    )
    if features is None:
      mix_rng, drop_rng = jax.random.split(rng)
      images, labels = mixup.mixup_cutmix(
        self._images(batch, phase),
        labels,
        mix_rng,
        mixup_alpha=options.mixup,
        cutmix_alpha=options.cutmix,
        prob=options.mix_probability,
      )
      pooled = model.backbone.embed(images, rng=drop_rng)
    else:
      (pooled,) = features  # the pixels are behind us: mixing does not apply to frozen features
    logits = model.head(pooled).astype(jnp.float32)
    loss = jnp.mean(optax.softmax_cross_entropy(logits, labels))
    top1 = jnp.mean(jnp.argmax(logits, axis=-1) == batch["label"])
    return loss, {"top1": top1}

  def predict(self, model: Classifier, batch: base.Batch, features: base.Features) -> dict[str, jax.Array]:
    if features is None:
      features = self.frozen_features(model, batch)
    return {"logits": model.head(features[0]).astype(jnp.float32)}

  def evaluator(self) -> accuracy.AccuracyEvaluator:
    return accuracy.AccuracyEvaluator(top_k=(1, min(5, len(self.classes))))

  def pictures(self, predictions: Any, batch: base.Batch, count: int) -> dict[str, Any]:
    return {}

  def write_results(self, evaluator: Any, folder: pathlib.Path) -> None:
    """Accuracy is all there is to say; it stands in the metrics."""
