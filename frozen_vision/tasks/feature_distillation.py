"""Feature distillation (arXiv 2205.14141): a student learns the whitened last map of a frozen teacher.

What is computed follows github.com/SwinTransformer/Feature-Distillation where the paper leaves it open.
"""

from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float
import ml_collections
import numpy as np

from frozen_vision import config as config_lib
from frozen_vision.backbones.base import FinalFeatures
from frozen_vision.heads import detection_losses
from frozen_vision.layers.mlp import uniform_linear
from frozen_vision.layers.norms import NORM_EPSILON
from frozen_vision.ops.arrays import Array
from frozen_vision.tasks import base, common, feature_maps, image_data, initial_weights
from frozen_vision.tasks.feature_distillation_options import FeatureDistillationConfig


def default_config() -> ml_collections.ConfigDict:
  """Every option at its default, for a config file to change."""
  return config_lib.config_dict(FeatureDistillationConfig())


def whiten(x: Float[Array, "... c"]) -> Float[Array, "... c"]:
  """LayerNorm without scale and shift, float32: zero mean and unit variance over the channels of a token."""
  x = x.astype(jnp.float32)
  x = x - jnp.mean(x, axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + NORM_EPSILON)


class Tokens(NamedTuple):
  """What student and teacher are compared by, token by token.

  Attributes:
    map: predictions or targets of all cells, float32.
    class_token: the same of the class token; None unless both networks have one.
  """

  map: Float[Array, "b h w c"]
  class_token: Float[Array, "b c"] | None

  def sequence(self) -> Float[Array, "b n c"]:
    """All tokens, the class token first."""
    patches = self.map.reshape(self.map.shape[0], -1, self.map.shape[-1])
    if self.class_token is None:
      return patches
    return jnp.concatenate([self.class_token[:, None], patches], axis=1)


class Distilled(nnx.Module):
  """A student and its projector, a linear layer on every token; training adds the `teacher`."""

  def __init__(self, backbone: nnx.Module, channels: int, target_channels: int, *, rngs: nnx.Rngs):
    self.backbone = backbone
    # As PyTorch draws a convolution of size 1, which the released code leaves as it is.
    self.projector = uniform_linear(channels, target_channels, rngs=rngs)


class FeatureDistillationTask(image_data.ImageData, base.Task):
  """Images without labels, and a frozen teacher's features of them."""

  head_name = "student"
  best_metric = "similarity"
  result_type = feature_maps.FeatureMap
  teacher_in_evaluation = True

  def __init__(self, config: FeatureDistillationConfig, classes: base.Classes | None = None):
    self.open_data(config, classes, "Feature distillation")

  def build_model(self, backbone: nnx.Module | None = None) -> Distilled:
    config, options = self._config, self._options
    backbone = backbone or common.build_backbone(config)
    if config.backbone.weights == "init" and options.initialisation == "fixed":
      backbone = initial_weights.rescaled(backbone, config.seed)
    channels = backbone.feature_specs[-1].channels
    target_channels = common.specs_of(options.teacher)[-1].channels
    return Distilled(backbone, channels, target_channels, rngs=nnx.Rngs(config.seed))

  def build_teacher(self) -> nnx.Module:
    return common.load_backbone(self._options.teacher, self._config.seed)

  @property
  def folds_teacher(self) -> bool:
    return self._options.teacher.fold

  @property
  def teacher_settings(self) -> dict[str, Any]:
    return {"teacher_size": self._options.teacher_size or self._options.side}

  def features(self, model: Distilled, batch: base.Batch, rng: jax.Array | None) -> base.Features:
    """The student's last map, and its class token if it has one."""
    images = model.backbone.preprocessing.normalise(batch["image"])
    options = {} if rng is None else {"rng": rng}
    final = model.backbone.final_features(images, **options)
    return (final.map,) if final.class_token is None else tuple(final)

  def _predicted(self, model: Distilled, features: base.Features) -> Tokens:
    return Tokens(*[model.projector(x).astype(jnp.float32) for x in features], *[None] * (2 - len(features)))

  def targets(self, teacher: Any, images: Float[Array, "b h w 3"], size: tuple[int, int]) -> Tokens:
    """The teacher's tokens after its own norm, whitened.

    Args:
      teacher: a frozen backbone or its program.
      images: RGB 0..255; the teacher normalises them by its own statistics.
      size: rows and columns of the student's map; a teacher's map of another size is resized to it, which is
        beyond the paper.
    """
    images = image_data.resized(images, self._options.teacher_size or images.shape[1])
    final: FinalFeatures = teacher.final_features(teacher.preprocessing.normalise(images))
    map_ = final.map.astype(jnp.float32)
    if map_.shape[1:3] != size:
      map_ = jax.image.resize(map_, (map_.shape[0], *size, map_.shape[-1]), "linear")
    token = final.class_token
    return Tokens(whiten(map_), None if token is None else whiten(token))

  def _compared(
    self, model: Distilled, batch: base.Batch, features: base.Features
  ) -> tuple[Float[Array, "b n c"], Float[Array, "b n c"]]:
    """Predictions and targets of all tokens that student and teacher share."""
    predicted = self._predicted(model, features)
    targets = self.targets(model.teacher, batch["image"], predicted.map.shape[1:3])
    if predicted.class_token is None or targets.class_token is None:
      predicted, targets = (tokens._replace(class_token=None) for tokens in (predicted, targets))
    return predicted.sequence(), targets.sequence()

  def loss(
    self, model: Distilled, batch: base.Batch, features: base.Features, rng: jax.Array, state: None
  ) -> base.Losses:
    predicted, targets = self._compared(model, batch, features)
    loss = jnp.mean(detection_losses.smooth_l1(predicted - targets, self._options.beta))
    return base.Losses({"smooth_l1": loss}, {"similarity": jnp.mean(cosine(predicted, targets))})

  def predict(self, model: Distilled, batch: base.Batch, features: base.Features) -> dict[str, jax.Array]:
    """The student's map; with a teacher also the losses of every image and the maps that are compared."""
    outputs = {"features": features[0].astype(jnp.float32)}
    if not hasattr(model, "teacher"):
      return outputs
    predicted, targets = self._compared(model, batch, features)
    losses = detection_losses.smooth_l1(predicted - targets, self._options.beta)
    shape = (*features[0].shape[:3], -1)
    cells = features[0].shape[1] * features[0].shape[2]
    return outputs | {
      "smooth_l1": jnp.mean(losses, axis=(1, 2)),
      "similarity": jnp.mean(cosine(predicted, targets), axis=1),
      "predicted": predicted[:, -cells:].reshape(shape),
      "target": targets[:, -cells:].reshape(shape),
    }

  @property
  def evaluations(self) -> dict[str, base.Evaluation]:
    return {"val": base.Evaluation(self.eval_batches, self.evaluator, pictures=_pictures)}

  def evaluator(self) -> feature_maps.MeanEvaluator:
    return feature_maps.MeanEvaluator(("smooth_l1", "similarity"))


def cosine(first: Float[Array, "b n c"], second: Float[Array, "b n c"]) -> Float[Array, "b n"]:
  """Cosine similarity of pairs of tokens; 0 where one is zero."""
  dot = jnp.sum(first * second, axis=-1)
  square = jnp.sum(first * first, axis=-1) * jnp.sum(second * second, axis=-1)
  return dot * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


def _pictures(predictions: dict[str, np.ndarray], batch: base.Batch, count: int) -> dict[str, np.ndarray]:
  """Image, teacher's target and student's prediction in rows, by the targets' principal components."""
  maps = predictions["target"], predictions["predicted"]
  return {"features": feature_maps.rows_of_pictures(batch["image"][:count], *maps)}
