"""Tasks that learn from augmented views of an image: their views on the device, and their evaluation."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from frozen_vision.data import batches
from frozen_vision.metrics import neighbours
from frozen_vision.ops.arrays import Array
from frozen_vision.tasks import base, feature_maps, image_data


def momentum_at(step: Array, steps: int, first: float) -> Float[Array, ""]:
  """The momentum of an average of networks at a step: from `first` to 1 along half a cosine over `steps`."""
  return 1 - 0.5 * (1 + jnp.cos(jnp.pi * step / steps)) * (1 - first)


class ViewData(image_data.ImageData):
  """The part of such a task that is the same for all; put it before `base.Task` among the base classes.

  Evaluation asks for the classes of nearest neighbours among the validation images, by `Backbone.embed`.
  """

  head_name = "embed"
  best_metric = "knn"
  result_type = feature_maps.FeatureMap

  def prepare(self, batch: batches.TwoViewBatch, rng: jax.Array | None, phase: None) -> base.Batch:
    """Both views as float32 in 0..255, at the side that the network sees."""
    batch = super().prepare(batch, rng, phase)
    if "second_image" not in batch:
      return batch
    second = image_data.resized(batch["second_image"].astype(jnp.float32), self._options.side)
    return batch | {"second_image": second}

  def evaluated_features(self, model: Any, batch: base.Batch) -> base.Features:
    """The embedding of an image, and its last map."""
    images = model.backbone.preprocessing.normalise(batch["image"])
    return model.backbone.embed(images), model.backbone.final_features(images).map

  def predict(self, model: Any, batch: base.Batch, features: base.Features) -> dict[str, jax.Array]:
    embedding, map_ = features
    return {"embedding": embedding.astype(jnp.float32), "features": map_.astype(jnp.float32)}

  @property
  def evaluations(self) -> dict[str, base.Evaluation]:
    return {"val": base.Evaluation(self.eval_batches, neighbours.NeighbourEvaluator, pictures=_pictures)}


def _pictures(predictions: dict[str, np.ndarray], batch: base.Batch, count: int) -> dict[str, np.ndarray]:
  """Images beside their last maps, in colours of the maps' principal components."""
  return {"features": feature_maps.rows_of_pictures(batch["image"][:count], predictions["features"])}
