"""The part of a Mask2Former-style head that follows its predictions: losses, and class scores of pixels."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, PRNGKeyArray
import numpy as np

from frozen_vision.heads.base import SegmentationHead
from frozen_vision.heads.mask2former.config import MaskLossConfig
from frozen_vision.heads.mask2former.criterion import criterion, Targets
from frozen_vision.ops.arrays import Array

Features = Sequence[Float[Array, "b _h _w _c"]]
Scalars = dict[str, Float[Array, ""]]

_BAND = 64  # rows of a prediction that are in memory for all queries at once
_HEAD_STREAM = 0x68656164  # random numbers of the head itself are not those of the points


class MaskHead(SegmentationHead):
  """One class and one mask per query; a subclass makes the predictions.

  Attributes:
    config: of the matching and the losses.
  """

  config: MaskLossConfig

  @abc.abstractmethod
  def __call__(self, features: Features, *, rng: PRNGKeyArray | None = None) -> Any:
    """Feature levels -> predictions, the last of which counts; in training (with `rng`) all that have a loss.

    The result has the members of `transformer_decoder.Predictions` that `criterion` names.
    """

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
    targets = _targets(batch, type(self).__name__)
    found, _ = criterion(self(features, rng=jax.random.fold_in(rng, _HEAD_STREAM)), targets, self.config, rng)
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


def _targets(batch: Mapping[str, Array], head: str) -> Targets:
  targets = Targets(batch["labels"], batch["segment_labels"], batch["segment_valid"])
  shapes = {name: tuple(x.shape) for name, x in targets._asdict().items()}
  labels, segments = targets.labels.shape, targets.segment_labels.shape
  valid = targets.segment_valid.shape
  if len(labels) != 3 or len(segments) != 2 or labels[0] != segments[0] or valid != segments:
    raise ValueError(
      f"{head} got a batch with {shapes}; expected labels [b, H, W], segment_labels [b, s] and"
      " segment_valid [b, s]."
    )
  if not segments[1]:
    raise ValueError(
      'batch["segment_labels"] has no columns; pad it to at least one segment per image, with'
      " segment_valid=False."
    )
  return targets
