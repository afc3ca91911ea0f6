"""Masked image modeling as SimMIM does it (arXiv 2111.09886): pixels of masked patches are predicted.

The numbers follow the released code, github.com/microsoft/SimMIM, and SwinV2's version of it in
github.com/microsoft/Swin-Transformer.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float
import ml_collections
import numpy as np

from frozen_vision import config as config_lib
from frozen_vision.backbones.base import Preprocessing
from frozen_vision.data import batches, pipeline
from frozen_vision.data.classification import augment
from frozen_vision.layers.mlp import uniform_linear
from frozen_vision.metrics import reconstruction
from frozen_vision.ops import masking
from frozen_vision.ops.arrays import Array
from frozen_vision.tasks import base, common, image_data, initial_weights, reconstructions
from frozen_vision.tasks.masked_image_modeling_options import MaskedImageModelingConfig


def default_config() -> ml_collections.ConfigDict:
  """Every option at its default, for a config file to change."""
  return config_lib.config_dict(MaskedImageModelingConfig())


class _Numbered:
  """A source whose records say their position in it, as `number`."""

  def __init__(self, source: pipeline.Source):
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {**self._source[index], "number": index}


@dataclasses.dataclass(frozen=True)
class NumberedEval(augment.EvalTransform):
  """`augment.EvalTransform` that keeps the record's number, by which its mask is drawn."""

  def __call__(self, record: Mapping[str, Any]) -> batches.NumberedBatch:
    return {**super().__call__(record), "number": np.int32(record.get("number", 0))}


class MaskedModel(nnx.Module):
  """A backbone, the token that stands for masked cells of its stem, and a linear decoder of pixels."""

  def __init__(self, backbone: nnx.Module, *, rngs: nnx.Rngs):
    """Makes token and decoder.

    Raises:
      ValueError: a backbone without a patch embedding that could be masked.
    """
    if backbone.stem_channels is None:
      raise ValueError(
        f"config.backbone is a {type(backbone).__name__}, which has no patch embedding that could be masked; "
        "take a SwinV2 or a plain ViT."
      )
    self.backbone = backbone
    self.stride = backbone.feature_specs[-1].stride
    draw = nnx.initializers.truncated_normal(0.02)
    self.mask_token = nnx.Param(draw(rngs.params(), (backbone.stem_channels,)))
    self.decoder = uniform_linear(backbone.feature_specs[-1].channels, 3 * self.stride**2, rngs=rngs)

  def encode(
    self,
    images: Float[Array, "b h w 3"],
    mask: Bool[Array, "b rows columns"],
    rng: jax.Array | None = None,
  ) -> Float[Array, "b _h _w c"]:
    """The last map, after the final norm, of images whose masked patches the stem does not show.

    Args:
      images: normalised.
      mask: True where a patch is masked.
      rng: key of stochastic depth; None is deterministic.
    """

    def edit_stem(x: Float[Array, "b rows columns c"]) -> Float[Array, "b rows columns c"]:
      cells = masking.enlarged(mask, x.shape[1:3])
      return jnp.where(cells[..., None], self.mask_token[...].astype(x.dtype), x)

    return self.backbone.final_features(images, rng=rng, edit_stem=edit_stem).map

  def decode(self, map_: Float[Array, "b rows columns c"]) -> Float[Array, "b h w 3"]:
    """Pixels, float32: every cell predicts its square of stride x stride."""
    pixels = self.decoder(map_).astype(jnp.float32)
    b, rows, columns, _ = pixels.shape
    pixels = pixels.reshape(b, rows, columns, self.stride, self.stride, 3)
    return pixels.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows * self.stride, columns * self.stride, 3)


class MaskedImageModelingTask(image_data.ImageData, base.Task):
  """Images without labels."""

  head_name = "reconstruct"
  best_metric = "r2"
  result_type = reconstructions.Reconstruction

  def __init__(self, config: MaskedImageModelingConfig, classes: base.Classes | None = None):
    self.open_data(config, classes, "Masked image modeling")

  def build_model(self, backbone: nnx.Module | None = None) -> MaskedModel:
    config, options = self._config, self._options
    backbone = backbone or common.build_backbone(config)
    stride = backbone.feature_specs[0].stride
    if options.mask_patch % stride:
      raise ValueError(
        f"config.masked_image_modeling.mask_patch is {options.mask_patch}, and {config.backbone.name} embeds "
        f"patches of {stride} pixels; expected a multiple of {stride}."
      )
    if config.backbone.weights == "init" and options.initialisation == "fixed":
      backbone = initial_weights.rescaled(backbone, config.seed)
    return MaskedModel(backbone, rngs=nnx.Rngs(config.seed))

  @property
  def view(self) -> dict[str, Any]:
    options = self._options
    return super().view | {"mask": [options.mask_patch, options.mask_ratio]}

  def eval_batches(self) -> pipeline.BatchIterator:
    return common.eval_batches(self._config, _Numbered(self.sources["validation"]), self.eval_transform())

  def eval_transform(self) -> NumberedEval:
    return NumberedEval(self._options.image_size)

  def prepare(self, batch: base.Batch, rng: jax.Array | None, phase: None) -> base.Batch:
    """Adds `mask`: random in training; by the image's number in evaluation; of all predictions the same."""
    batch = super().prepare(batch, rng, phase)
    options = self._options
    cells = options.side // options.mask_patch
    if rng is None:
      key, numbers = jax.random.key(0), batch.get("number", jnp.zeros(batch["image"].shape[0], jnp.int32))
    else:
      key, numbers = rng, jnp.arange(batch["image"].shape[0])
    mask = masking.random_masks(key, numbers, (cells, cells), options.mask_ratio)
    return batch | {"mask": mask}

  def features(self, model: MaskedModel, batch: base.Batch, rng: jax.Array | None) -> base.Features:
    common.check_backbone_trains(model.backbone, self._config)
    images = model.backbone.preprocessing.normalise(batch["image"])
    return (model.encode(images, batch["mask"], rng),)

  def _compared(
    self, model: MaskedModel, batch: base.Batch, features: base.Features
  ) -> tuple[Float[Array, "b h w 3"], Float[Array, "b h w 3"], Float[Array, "b h w 1"]]:
    """(predicted pixels, target pixels, 1 where they count and 0 elsewhere)."""
    predicted = model.decode(features[0])
    target = model.backbone.preprocessing.normalise(batch["image"])
    if self._options.target_window:
      mean, deviation = masking.local_statistics(target, self._options.target_window)
      target = (target - mean) / deviation
    mask = masking.enlarged(batch["mask"], target.shape[1:3])[..., None]
    return predicted[:, : target.shape[1], : target.shape[2]], target, mask.astype(jnp.float32)

  def loss(
    self, model: MaskedModel, batch: base.Batch, features: base.Features, rng: jax.Array, state: None
  ) -> base.Losses:
    predicted, target, mask = self._compared(model, batch, features)
    loss = jnp.sum(jnp.abs(predicted - target) * mask) / (jnp.sum(mask) + 1e-5) / 3
    return base.Losses({"l1": loss}, {})

  def predict(self, model: MaskedModel, batch: base.Batch, features: base.Features) -> dict[str, jax.Array]:
    """Sums of errors of every image, and the image with its masked patches predicted."""
    predicted, target, mask = self._compared(model, batch, features)

    def total(values: Float[Array, "b h w 3"]) -> Float[Array, "b"]:
      return jnp.sum(values * mask, axis=(1, 2, 3))

    return {
      "count": total(jnp.ones_like(target)),
      "absolute_error": total(jnp.abs(predicted - target)),
      "squared_error": total((predicted - target) ** 2),
      "target": total(target),
      "squared_target": total(target**2),
      "reconstruction": self._filled(batch["image"], predicted, mask, model.backbone.preprocessing),
      "pixel_mask": mask[..., 0] > 0,
    }

  def _filled(
    self,
    images: Float[Array, "b h w 3"],
    predicted: Float[Array, "b h w 3"],
    mask: Float[Array, "b h w 1"],
    preprocessing: Preprocessing,
  ) -> Any:
    """uint8 images with predictions where they are masked.

    Predictions of normalised pixels are given the mean and deviation of the true image's windows, which the
    network does not know: these pictures flatter it.
    """
    if self._options.target_window:
      mean, deviation = masking.local_statistics(preprocessing.normalise(images), self._options.target_window)
      predicted = predicted * deviation + mean
    filled = jnp.where(mask > 0, preprocessing.denormalise(predicted), images)
    return jnp.round(jnp.clip(filled, 0, 255)).astype(jnp.uint8)

  @property
  def evaluations(self) -> dict[str, base.Evaluation]:
    return {
      "val": base.Evaluation(
        self.eval_batches, reconstruction.ReconstructionEvaluator, pictures=self._pictures
      )
    }

  def _pictures(
    self, predictions: dict[str, np.ndarray], batch: base.Batch, count: int
  ) -> dict[str, np.ndarray]:
    """Image, what the network sees of it, and reconstruction, in rows."""
    found = reconstructions.Reconstruction.from_outputs(predictions, batch, count, ())
    rows = [one.draw(image) for one, image in zip(found, batch["image"])]
    return {"reconstructions": np.concatenate(rows)}
