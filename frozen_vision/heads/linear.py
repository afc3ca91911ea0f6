"""Linear semantic segmentation: one linear layer on the features of each pixel, the smallest head."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.heads import pixel_classification
from frozen_vision.heads.base import SegmentationHead
from frozen_vision.layers import norms
from frozen_vision.ops import resize
from frozen_vision.ops.arrays import Array
from frozen_vision.options import from_data, Natural


@dataclasses.dataclass(frozen=True)
class LinearConfig:
  """Options of a linear head.

  Attributes:
    num_classes: classes.
    levels: which feature levels are read, 0 the finest; empty for all.
    input_norm: a trainable LayerNorm over the channels of every level first. Our frozen backbones end without
      a norm per level, as public checkpoints do; this is that norm.
  """

  num_classes: int = from_data(150)
  name: Literal["linear"] = "linear"
  levels: tuple[Natural, ...] = ()
  input_norm: bool = True


class LinearHead(SegmentationHead):
  """Logits of the finest chosen level's stride from all chosen levels, upsampled and concatenated.

  The levels' layers are applied before upsampling and their results added: both are linear, so it is the same
  function of the same parameters, at a fraction of the work.

  Attributes:
    stride: input pixels per cell of the logits.
  """

  def __init__(
    self,
    feature_specs: Sequence[FeatureSpec],
    config: LinearConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Builds the head.

    Raises:
      ValueError: levels that do not exist.
    """
    levels = config.levels or tuple(range(len(feature_specs)))
    if not set(levels) <= set(range(len(feature_specs))) or len(set(levels)) != len(levels):
      raise ValueError(
        f"The linear head reads levels {levels}; expected different ones of 0 to {len(feature_specs) - 1}."
      )
    self.config = config
    self.levels = tuple(sorted(levels))
    specs = [feature_specs[level] for level in self.levels]
    self.stride = specs[0].stride
    self.factors = tuple(spec.stride // self.stride for spec in specs)
    self.norms = norms.level_norms(
      [spec.channels for spec in specs],
      functools.partial(nnx.LayerNorm, dtype=dtype, rngs=rngs),
      enabled=config.input_norm,
    )
    # Initialised as one layer on the concatenation would be.
    width = sum(spec.channels for spec in specs)
    init = nnx.initializers.normal(width**-0.5)
    self.layers = nnx.List(
      [
        nnx.Linear(
          spec.channels, config.num_classes, use_bias=i == 0, kernel_init=init, dtype=dtype, rngs=rngs
        )
        for i, spec in enumerate(specs)
      ]
    )

  def __call__(self, features: Sequence[Float[Array, "b _h _w _c"]]) -> Float[Array, "b h w k"]:
    """Feature levels, fine to coarse -> float32 logits at `stride`."""
    features = [features[level] for level in self.levels]
    finest = features[0].shape[1:3]
    features = norms.normed(self.norms, features)
    logits = [
      resize.upsample(layer(x).astype(jnp.float32), factor, finest)
      for x, factor, layer in zip(features, self.factors, self.layers)
    ]
    return sum(logits)

  def losses(
    self, features: Sequence[Float[Array, "b _h _w _c"]], batch: Mapping[str, Array], rng: jax.Array
  ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """({"loss_ce"}, {"pixel_accuracy"}) of `batch["labels"]`; `rng` is not used."""
    del rng
    loss, accuracy = pixel_classification.cross_entropy(self(features), batch["labels"], stride=self.stride)
    return {"loss_ce": loss}, {"pixel_accuracy": accuracy}

  def predict_semantic(
    self, features: Sequence[Float[Array, "b _h _w _c"]], size: tuple[int, int]
  ) -> Float[Array, "b y x k"]:
    """Class probabilities of every pixel of the padded input of `size` (height, width)."""
    return pixel_classification.probabilities(self(features), size, stride=self.stride)
