"""The contracts of heads: what a task calls. A head that keeps its contract needs no change of the task."""

import abc
from collections.abc import Mapping, Sequence

from flax import nnx
import jax
from jaxtyping import Bool, Float, Int

from frozen_vision.ops.arrays import Array

Features = Sequence[Float[Array, "b _h _w _c"]]
Scalars = dict[str, Float[Array, ""]]


class DetectionHeadConfig:
  """Options that the detection task reads; the dataclass of a head's options inherits it.

  Attributes:
    num_classes: classes, without background.
    with_masks: the head also predicts masks, and trains on them.
    semantic_classes: classes of label maps that the head trains on beside objects; 0 for none.
    semantic_level: feature level at whose stride these label maps are made.
    reads_class_lists: the loss reads which classes an image was searched for (`negative`, `not_exhaustive`).
    reads_class_counts: the loss reads `class_images` and `class_objects`.
  """

  num_classes: int = 80
  with_masks: bool = False
  semantic_classes: int = 0
  semantic_level: int = 0
  reads_class_lists: bool = False
  reads_class_counts: bool = False


class DetectionHead(nnx.Module):
  """A detection head: built as `Head(feature_specs, config, dtype=..., rngs=...)` on the neck's levels.

  Predicting takes three steps, so that candidates of several views can be merged and masks be predicted for
  merged boxes: `score_boxes`, `select`, `predict_masks`.

  Attributes:
    config: the head's options.
  """

  config: DetectionHeadConfig

  @abc.abstractmethod
  def losses(self, features: Features, batch: Mapping[str, Array], rng: jax.Array) -> tuple[Scalars, Scalars]:
    """(terms, metrics): terms are weighted already, their sum is the loss; metrics are logged beside it.

    Args:
      features: of the neck.
      batch: as `data.batches.DetectionTrainBatch`. Images without objects are welcome. For a config with
        `reads_class_counts` also `class_images` and `class_objects`, float32 [classes]: how many training
        images, and objects in them, have each class.
      rng: for what is sampled.
    """

  @abc.abstractmethod
  def score_boxes(
    self, features: Features, image_size: Int[Array, "b 2"]
  ) -> tuple[Float[Array, "b n k 4"], Float[Array, "b n c"], Bool[Array, "b n"]]:
    """Candidates before NMS.

    Args:
      features: of the neck, on one view of the images.
      image_size: (height, width) of each image's content.

    Returns:
      Boxes, xyxy in pixels of the view (k = 1 for all classes, or one per class); probabilities of the
      foreground classes; valid.
    """

  @abc.abstractmethod
  def select(
    self,
    boxes: Float[Array, "b n k 4"],
    probabilities: Float[Array, "b n c"],
    valid: Bool[Array, "b n"],
    *,
    num_views: int = 1,
    max_detections: int | None = None,
  ) -> dict[str, Array]:
    """The detections among candidates, by the head's own NMS.

    Args:
      boxes, probabilities, valid: as `score_boxes` gives them, perhaps of several views, one after the other.
      num_views: how many views the candidates are of.
      max_detections: rows of the result; None: the head's own.

    Returns:
      boxes [b, d, 4], scores [b, d] in falling order, labels int32 [b, d], valid [b, d].
    """

  def predict_masks(
    self, features: Features, boxes: Float[Array, "b d 4"], labels: Int[Array, "b d"]
  ) -> Float[Array, "b d m m"]:
    """Mask probabilities of the given class, inside each box; of heads whose config has `with_masks`.

    Raises:
      TypeError: a head that predicts no masks, which its config must say.
    """
    raise TypeError(f"{type(self).__name__} predicts no masks, but its config has with_masks=True.")


class SegmentationHead(nnx.Module):
  """A segmentation head: built as `Head(feature_specs, config, dtype=..., rngs=...)` on a backbone."""

  @abc.abstractmethod
  def losses(self, features: Features, batch: Mapping[str, Array], rng: jax.Array) -> tuple[Scalars, Scalars]:
    """(terms, metrics): terms are weighted already, their sum is the loss; metrics are logged beside it.

    Args:
      features: of the backbone, fine to coarse.
      batch: as `data.batches.SegmentationTrainBatch`.
      rng: for what is sampled.
    """

  @abc.abstractmethod
  def predict_semantic(self, features: Features, size: tuple[int, int]) -> Float[Array, "b y x k"]:
    """Class scores of every pixel of the padded input of `size` (height, width), such as probabilities."""


class ClipHead(nnx.Module):
  """A head that recognises actions from features of all frames of a clip.

  Attributes:
    levels: feature levels that it reads.
  """

  levels: tuple[int, ...]

  @abc.abstractmethod
  def __call__(
    self, features: Sequence[Float[Array, "b t _h _w _c"]], rng: jax.Array | None = None
  ) -> Float[Array, "b classes"]:
    """Logits, float32.

    Args:
      features: a map for each of `levels`.
      rng: key of dropout and stochastic depth in training; None is deterministic.
    """
