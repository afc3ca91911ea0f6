"""Supervised classification: how the shipped backbone was pretrained, and linear probes on frozen ones."""

import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from frozen_vision import config as config_lib
from frozen_vision.data import batches
from frozen_vision.data.classification import augment, benchmarks, folders, listed, splits
from frozen_vision.data.generated import shape_images
from frozen_vision.metrics import accuracy, average_precision
from frozen_vision.ops import mixup
from frozen_vision.tasks import base, common, image_data, results
from frozen_vision.tasks.classification_options import ClassificationConfig, ClassificationOptions


def default_config() -> ml_collections.ConfigDict:
  """The task's section, for a config file to change."""
  return config_lib.config_dict(ClassificationOptions())


class Classifier(nnx.Module):
  """A backbone's pooled vector and a linear layer."""

  def __init__(self, backbone: nnx.Module, num_classes: int, *, rngs: nnx.Rngs):
    self.backbone = backbone
    self.head = nnx.Linear(
      backbone.embed_dim,
      num_classes,
      rngs=rngs,
      kernel_init=nnx.initializers.truncated_normal(0.02),
    )


class ClassificationTask(image_data.SquareImages, base.Task):
  """Images with one label each, or with several where the data set has several.

  Attributes:
    parts: records of "train", "validation" and perhaps "test" as they are given; a published set may lack
      "validation". Probes read these.
    sources: what a run trains on and evaluates on, "train" and "validation", and "test" where there is one.
  """

  nominal_classes = 1000  # ImageNet-1K's
  head_name = "classify"
  best_metric = "top1"
  result_type = results.ClassProbabilities

  def __init__(self, config: ClassificationConfig, classes: base.Classes | None = None):
    self._config = config
    self._options = options = config.classification
    self.best_metric = options.score
    self.parts: dict[str, Any] = {}
    self.sources = {}
    self.headline = "Classification"
    if classes is None:
      opened = {"shapes": self._open_shapes, "files": self._open_files, "benchmark": self._open_benchmark}
      self.parts = opened[options.data]()
      self.sources = self._divided(self.parts)
      train, validation = self.sources["train"], self.sources["validation"]
      classes = common.shared_classes(train.classes, validation.classes, (options.train, options.validation))
      if "test" in self.sources:
        common.shared_classes(train.classes, self.sources["test"].classes, (options.train, options.test))
      self.headline = common.headline(self.headline, train, validation, classes)
    self.classes = tuple(classes)
    self._starts = tuple(int(start) for start, _ in options.resolutions)
    self.phases = tuple(int(side) for _, side in options.resolutions) or (None,)

  def _open_shapes(self) -> dict[str, Any]:
    options = self._options.shapes
    counts = dict(train=options.train_images, validation=options.validation_images, test=options.test_images)
    return {
      split: shape_images.ShapeImages(count, options.image_size, options.seed, split)
      for split, count in counts.items()
      if count
    }

  def _open_files(self) -> dict[str, Any]:
    options = self._options
    paths = {name: getattr(options, name) for name in ("train", "validation", "test")}
    if options.validation_fraction:
      del paths["validation"]
    sources = {name: self._open(path) for name, path in paths.items() if path}
    if options.validation_fraction:
      sources["train"], sources["validation"] = folders.hold_out(
        sources["train"], options.validation_fraction
      )
    if options.decoded_cache:
      sources = {name: folders.DecodedImages(source) for name, source in sources.items()}
    return sources

  def _open_benchmark(self) -> dict[str, Any]:
    options = self._options
    root = common.existing_path(options.benchmark.root, self._config.task)
    sources = benchmarks.open_benchmark(options.benchmark.name, root)
    if self._config.data.check:
      for source in sources.values():
        source.check()
    if options.decoded_cache:
      sources = {name: folders.DecodedImages(source) for name, source in sources.items()}
    return sources

  def _divided(self, parts: dict[str, Any]) -> dict[str, Any]:
    """Sources to train and evaluate on: a part held out where none is, and joined again for `refit`."""
    if self._options.refit:
      if "test" not in parts:
        raise ValueError(
          "config.classification.refit trains on all data but those for testing, and there are none; give "
          "--config.classification.test=FOLDER, or leave it False."
        )
      train = [parts[name] for name in ("train", "validation") if name in parts]
      return {
        "train": listed.Joined(*train) if len(train) > 1 else train[0],
        "validation": parts["test"],
      }
    if "validation" in parts:
      return dict(parts)
    train = parts["train"]
    try:
      kept, held = splits.split(
        train.labels, fraction=self._options.benchmark.held_out, seed=self._config.seed
      )
    except ValueError as error:
      raise ValueError(f"config.classification.benchmark.held_out: {error}") from error
    divided = {"train": folders.Part(train, kept), "validation": folders.Part(train, held)}
    divided["train"].findings = train.findings
    return divided | {"test": parts["test"]}

  def blank_example(self) -> batches.ClassificationBatch | batches.MultiLabelBatch:
    example = super().blank_example()
    if self._options.has_several_labels:
      example = example | {"label": np.zeros(len(self.classes), np.int32)}
    return example

  def phase_at(self, step: int) -> Any:
    if not self._starts:
      return None
    return self.phases[sum(start <= step for start in self._starts) - 1]

  def build_model(self, backbone: nnx.Module | None = None) -> Classifier:
    return Classifier(
      backbone or common.build_backbone(self._config), len(self.classes), rngs=nnx.Rngs(self._config.seed)
    )

  def _train_transform(self) -> augment.TrainTransform:
    options = self._options
    return dataclasses.replace(
      super()._train_transform(),
      rand_augment=common.rand_augment(options.rand_augment),
      erasing=options.erasing,
    )

  @property
  def view(self) -> dict[str, Any]:
    side = self._options.image_size
    return {"central square": side, "resized to": self.phases[-1] or side, "pooled": True}

  def prepare(
    self, batch: batches.ClassificationBatch, rng: jax.Array | None, phase: int | None
  ) -> base.Batch:
    """Images at the side of the phase; in training mixed, with `target`, a distribution over classes."""
    images, options = batch["image"].astype(jnp.float32), self._options
    if phase is not None:
      images = image_data.resized(images, phase)
    if rng is None:
      return batch | {"image": images}
    if options.has_several_labels:
      target = batch["label"].astype(jnp.float32)
    else:
      target = optax.smooth_labels(jax.nn.one_hot(batch["label"], len(self.classes)), options.label_smoothing)
    images, target = mixup.mixup_cutmix(
      images,
      target,
      rng,
      mixup_alpha=options.mixup,
      cutmix_alpha=options.cutmix,
      prob=options.mix_probability,
    )
    return batch | {"image": images, "target": target}

  def features(
    self, model: Classifier, batch: batches.ClassificationBatch, rng: jax.Array | None
  ) -> base.Features:
    return (model.backbone.embed(model.backbone.preprocessing.normalise(batch["image"]), rng=rng),)

  def loss(
    self,
    model: Classifier,
    batch: batches.ClassificationBatch,
    features: base.Features,
    rng: jax.Array,
    state: None,
  ) -> base.Losses:
    logits = model.head(features[0]).astype(jnp.float32)
    if self._options.has_several_labels:
      loss = jnp.mean(optax.sigmoid_binary_cross_entropy(logits, batch["target"]))
      return base.Losses({"cross_entropy": loss}, {})
    loss = jnp.mean(optax.softmax_cross_entropy(logits, batch["target"]))
    top1 = jnp.mean(jnp.argmax(logits, axis=-1) == batch["label"])
    return base.Losses({"cross_entropy": loss}, {"top1": top1})

  def predict(
    self, model: Classifier, batch: batches.ClassificationBatch, features: base.Features
  ) -> dict[str, jax.Array]:
    logits = model.head(features[0]).astype(jnp.float32)
    to_probabilities = jax.nn.sigmoid if self._options.has_several_labels else jax.nn.softmax
    return {"logits": logits, "probabilities": to_probabilities(logits)}

  @property
  def evaluations(self) -> dict[str, base.Evaluation]:
    return {"val": base.Evaluation(self.eval_batches, self.evaluator)}

  def evaluator(self) -> accuracy.AccuracyEvaluator | average_precision.ElevenPointEvaluator:
    if self._options.has_several_labels:
      return average_precision.ElevenPointEvaluator()
    return accuracy.AccuracyEvaluator(
      top_k=(1, min(5, len(self.classes))), per_class=self._options.score == "mean_per_class"
    )
