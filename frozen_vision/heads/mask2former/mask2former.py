"""Mask2Former (Cheng et al. 2022) for semantic segmentation, on the levels of a backbone.

Behaviour follows the official code, facebookresearch/Mask2Former: with the same weights, features and sampled
points, predictions, matching and losses are equal to it.
"""

from collections.abc import Sequence

from flax import nnx
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, PRNGKeyArray

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.heads.mask2former.config import Mask2FormerConfig
from frozen_vision.heads.mask2former.mask_head import MaskHead
from frozen_vision.heads.mask2former.pixel_decoder import PixelDecoder
from frozen_vision.heads.mask2former.transformer_decoder import Predictions, TransformerDecoder
from frozen_vision.ops.arrays import Array

Features = Sequence[Float[Array, "b _h _w _c"]]


class Mask2Former(MaskHead):
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

  def __call__(self, features: Features, *, rng: PRNGKeyArray | None = None) -> Predictions:
    """Backbone levels -> predictions from the initial queries and after every layer.

    Padding is not masked, as in the official recipe for semantic segmentation. Nothing is random: `rng` has
    no effect.

    Raises:
      ValueError: other levels than `feature_specs` announced.
    """
    del rng
    found = [x.shape[-1] for x in features]
    expected = [spec.channels for spec in self.feature_specs]
    if found != expected:
      raise ValueError(f"Mask2Former: got levels with channels {found}, was built for {expected}.")
    return self.transformer_decoder(self.pixel_decoder(features))
