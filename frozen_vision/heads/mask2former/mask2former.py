"""Mask2Former (Cheng et al. 2022) for semantic segmentation, on the levels of a backbone.

Behaviour follows the official code, facebookresearch/Mask2Former: with the same weights, features and sampled
points, predictions, matching and losses are equal to it.
"""

from collections.abc import Mapping, Sequence

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, PRNGKeyArray
import numpy as np

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.heads.base import SegmentationHead
from frozen_vision.heads.mask2former.config import Mask2FormerConfig
from frozen_vision.heads.mask2former.criterion import criterion, Targets
from frozen_vision.heads.mask2former.pixel_decoder import PixelDecoder
from frozen_vision.heads.mask2former.transformer_decoder import Predictions, TransformerDecoder
from frozen_vision.ops.arrays import Array

Features = Sequence[Float[Array, "b _h _w _c"]]
Scalars = dict[str, Float[Array, ""]]

_BAND = 64  # rows of a prediction that are in memory for all queries at once


class Mask2Former(SegmentationHead):
  """Pixel decoder, transformer decoder, one class and one mask per query."""

  def __init__(
    self,
    feature_specs: Sequence[FeatureSpec],
    config: Mask2FormerConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Builds the head.

    Args:
      feature_specs: of the backbone's levels, fine to coarse. The last `config.encoder_levels` go through the
        deformable attention, the others join by an FPN step each; masks have the size of the first.
      config: see Mask2FormerConfig.
      dtype: of the convolutions and matrix products. Parameters, softmax, sampling, matching and losses are
        float32.
      rngs: for the weights.

    Raises:
      ValueError: fewer levels than `config.encoder_levels`, or not ordered fine to coarse.
    """
    feature_specs = tuple(feature_specs)
    strides = [spec.stride for spec in feature_specs]
    if len(strides) < config.encoder_levels or strides != sorted(strides):
      raise ValueError(
        f"Mask2Former got levels {feature_specs}; expected at least {config.encoder_levels}"
        " (encoder_levels), fine to coarse."
      )
    self.config = config
    self.feature_specs = feature_specs
    self.pixel_decoder = PixelDecoder(feature_specs, config, dtype=dtype, rngs=rngs)
    self.transformer_decoder = TransformerDecoder(config, dtype=dtype, rngs=rngs)

  def __call__(self, features: Features) -> Predictions:
    """Backbone levels -> predictions from the initial queries and after every layer.

    Padding is not masked, as in the official recipe for semantic segmentation.

    Raises:
      ValueError: other levels than `feature_specs` announced.
    """
    found = [x.shape[-1] for x in features]
    expected = [spec.channels for spec in self.feature_specs]
    if found != expected:
      raise ValueError(f"Mask2Former: got levels with channels {found}, was built for {expected}.")
    return self.transformer_decoder(self.pixel_decoder(features))

  def losses(
    self, features: Features, batch: Mapping[str, Array], rng: PRNGKeyArray
  ) -> tuple[Scalars, Scalars]:
    """All losses of the head.

    Args:
      features: of the backbone.
      batch: labels int [b, H, W], the class of every pixel; what belongs to none of the image's segments
        (ignored pixels, padding) counts as outside of every mask. segment_labels int [b, s], the classes
        present, and segment_valid bool [b, s]. Images without segments are welcome.
      rng: for the points at which masks are compared.

    Returns:
      Losses, already weighted: their sum is the loss. `class`, `mask` and `dice` are the last prediction's,
      `class_earlier` and so on the sum over those before. Then metrics, which must not be added:
      accuracy/matched, of the classes of the last prediction's matched queries in percent; segments per
      image.

    Raises:
      ValueError: the batch has no rows for segments, or its arrays do not fit together.
    """
    targets = _targets(batch)
    found, _ = criterion(self(features), targets, self.config, rng)
    losses = {}
    for name in ("class", "mask", "dice"):
      losses[name] = found[name][-1]
      losses[f"{name}_earlier"] = found[name][:-1].sum()
    segments = targets.segment_valid.sum(axis=1).mean(dtype=jnp.float32)
    return losses, {"accuracy/matched": found["accuracy"][-1], "segments": segments}

  def predict_semantic(self, features: Features, size: tuple[int, int]) -> Float[Array, "b y x k"]:
    """Class scores of every pixel of the padded frame.

    The probability of each class summed over the queries, each weighted by its mask (the official code's
    `semantic_inference`); not a distribution.

    Args:
      features: of the backbone.
      size: (height, width) of the frame that was given to the backbone, to which masks are resized.
    """
    predictions = self(features)
    classes = jax.nn.softmax(predictions.class_logits[-1], axis=-1)[..., :-1]
    masks = predictions.mask_logits(-1)
    b, queries, height, _ = masks.shape
    masks = jax.image.resize(masks, (b, queries, height, size[1]), "linear", antialias=False)

    def band(rows):
      low, high, fraction = rows
      fraction = fraction[:, None]
      logits = masks[:, :, low] * (1 - fraction) + masks[:, :, high] * fraction
      return jnp.einsum("bqk,bqyx->byxk", classes, jax.nn.sigmoid(logits), preferred_element_type=jnp.float32)

    scores = jax.lax.map(band, _row_bands(height, size[0]))
    scores = jnp.moveaxis(scores, 0, 1)
    return scores.reshape(b, -1, *scores.shape[3:])[:, : size[0]]


def _row_bands(height: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """For `size` rows out of `height`, in bands: the rows above and below, and the weight of the lower one."""
  rows = min(_BAND, size)
  position = (np.arange(-(-size // rows) * rows) + 0.5) * (height / size) - 0.5
  position = np.clip(position, 0, height - 1)
  low = np.floor(position).astype(np.int32)
  high = np.minimum(low + 1, height - 1)
  fraction = (position - low).astype(np.float32)
  return tuple(x.reshape(-1, rows) for x in (low, high, fraction))


def _targets(batch: Mapping[str, Array]) -> Targets:
  targets = Targets(batch["labels"], batch["segment_labels"], batch["segment_valid"])
  shapes = {name: tuple(x.shape) for name, x in targets._asdict().items()}
  labels, segments = targets.labels.shape, targets.segment_labels.shape
  valid = targets.segment_valid.shape
  if len(labels) != 3 or len(segments) != 2 or labels[0] != segments[0] or valid != segments:
    raise ValueError(
      f"Mask2Former got a batch with {shapes}; expected labels [b, H, W], segment_labels [b, s] and"
      " segment_valid [b, s]."
    )
  if not segments[1]:
    raise ValueError(
      'batch["segment_labels"] has no columns; pad it to at least one segment per image, with'
      " segment_valid=False."
    )
  return targets
