"""Surface normals and depth of every pixel, from the logits of a linear head or of UPerNet.

Normals are classified among codewords and decoded softly, as the benchmark of 2011.13377 does
(`data.dense.codewords`). Depth is the mean of evenly spaced bins, weighted by their probabilities, trained by
the scale-invariant error in logarithms of AdaBins (Bhat et al. 2021).
"""

from collections.abc import Mapping, Sequence
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float
import numpy as np

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.heads import linear, pixel_classification, upernet
from frozen_vision.heads.detection_losses import masked_mean
from frozen_vision.ops import resize
from frozen_vision.ops.arrays import Array

Features = Sequence[Float[Array, "b _h _w _c"]]

_LEAST_DEPTH = 1e-3  # metres, in logarithms
_MEAN_WEIGHT = 0.85  # AdaBins' lambda: how much of a wrong scale is forgiven


@dataclasses.dataclass(frozen=True)
class DepthBins:
  """Evenly spaced depths, between which a head chooses.

  Attributes:
    count: bins.
    nearest, farthest: centres of the first and the last bin in metres.
    weight: of the loss of depth beside that of normals.
  """

  count: int
  nearest: float
  farthest: float
  weight: float = 1.0


class DenseRegressionHead(nnx.Module):
  """Logits of codewords and of depth bins from one head, decoded to vectors and metres."""

  def __init__(
    self,
    feature_specs: Sequence[FeatureSpec],
    config: linear.LinearConfig | upernet.UPerNetConfig,
    *,
    codewords: Float[np.ndarray, "k 3"] | None,
    depth: DepthBins | None,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Builds the head.

    Args:
      config: of the logits; its number of classes is replaced.
      codewords: unit vectors, 255 at most; None predicts no normals.
      depth: None predicts no depth.

    Raises:
      ValueError: nothing to predict, too many codewords, or an auxiliary loss, which there is not.
    """
    words = 0 if codewords is None else len(codewords)
    if not words and depth is None or words > pixel_classification.IGNORE:
      raise ValueError(
        f"{words} codewords and depth bins {depth}; expected some of either, 255 codewords at most."
      )
    if getattr(config, "auxiliary_weight", 0):
      raise ValueError(
        f"The head has auxiliary_weight={config.auxiliary_weight}; normals and depth have no auxiliary loss, "
        "set it to 0."
      )
    self.codewords = () if codewords is None else tuple(tuple(map(float, word)) for word in codewords)
    self.depth = depth
    outputs = words + (depth.count if depth else 0)
    make_logits = upernet.UPerNet if isinstance(config, upernet.UPerNetConfig) else linear.LinearHead
    config = dataclasses.replace(config, num_classes=outputs)
    self.logits = make_logits(feature_specs, config, dtype=dtype, rngs=rngs)
    self.stride = self.logits.strides[0] if isinstance(config, upernet.UPerNetConfig) else self.logits.stride

  def _split(
    self, features: Features, rng: jax.Array | None
  ) -> tuple[Float[Array, "b h w k"], Float[Array, "b h w bins"]]:
    """(logits of codewords, logits of depth bins) at `stride`; either may have no channel."""
    has_dropout = isinstance(self.logits, upernet.UPerNet)
    logits = self.logits(features, rng=rng) if has_dropout else self.logits(features)
    return logits[..., : len(self.codewords)], logits[..., len(self.codewords) :]

  def _metres(self, logits: Float[Array, "b h w bins"], size: tuple[int, int]) -> Float[Array, "b y x"]:
    """Depth at `size`; the means are taken at the head's stride, and are resized."""
    centres = jnp.linspace(self.depth.nearest, self.depth.farthest, self.depth.count)
    depth = jnp.sum(jax.nn.softmax(logits, axis=-1) * centres, axis=-1, keepdims=True)
    return resize.upsample(depth, self.stride, size)[..., 0]

  def losses(
    self, features: Features, batch: Mapping[str, Array], rng: jax.Array | None
  ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """({"normals", "depth"}, {"codeword_accuracy", "abs_rel"}), each as far as it is predicted.

    Args:
      batch: as `data.batches.DenseTrainBatch`.
      rng: of dropout; None for none.
    """
    words, bins = self._split(features, rng)
    terms, metrics = {}, {}
    if self.codewords:
      labels = nearest_codeword(batch["normals"], jnp.asarray(self.codewords))
      terms["normals"], metrics["codeword_accuracy"] = pixel_classification.cross_entropy(
        words, labels, stride=self.stride
      )
    if self.depth:
      true = batch["depth"]
      depth = self._metres(bins, true.shape[1:])
      terms["depth"] = self.depth.weight * scale_invariant_error(depth, true)
      metrics["abs_rel"] = masked_mean(jnp.abs(depth - true) / jnp.where(true > 0, true, 1), true > 0)
    return terms, metrics

  def predict(self, features: Features, size: tuple[int, int]) -> dict[str, Float[Array, "b y x c"]]:
    """Maps of the padded input of `size` (height, width).

    Returns:
      `normals`, c = 3: the codewords' means weighted by their probabilities, of length 1 at most; `depth`,
      c = 1, in metres.
    """
    words, bins = self._split(features, None)
    found = {}
    if self.codewords:
      probabilities = pixel_classification.probabilities(words, size, stride=self.stride)
      found["normals"] = jnp.matmul(
        probabilities, jnp.asarray(self.codewords), precision=jax.lax.Precision.HIGHEST
      )
    if self.depth:
      found["depth"] = self._metres(bins, size)[..., None]
    return found


def nearest_codeword(normals: Float[Array, "b h w 3"], codewords: Float[Array, "k 3"]) -> jax.Array:
  """Index of the codeword at the smallest angle to every pixel's normal, int32; `IGNORE` where it is zero."""
  nearest = jnp.argmax(jnp.matmul(normals, codewords.T, precision=jax.lax.Precision.HIGHEST), axis=-1).astype(
    jnp.int32
  )
  return jnp.where(jnp.any(normals != 0, axis=-1), nearest, pixel_classification.IGNORE)


def scale_invariant_error(predicted: Float[Array, "b h w"], true: Float[Array, "b h w"]) -> Float[Array, ""]:
  """sqrt(mean g^2 - 0.85 (mean g)^2), g = ln p - ln t, over the pixels with a true depth above 0.

  AdaBins, equation 4, without its factor of 10; 0 where no pixel has a depth.
  """
  known = true > 0
  g = jnp.log(jnp.maximum(predicted, _LEAST_DEPTH)) - jnp.log(jnp.where(known, true, 1.0))
  mean, square = masked_mean(g, known), masked_mean(g * g, known)
  # The root has no gradient at zero.
  return jnp.sqrt(jnp.maximum(square - _MEAN_WEIGHT * mean**2, 1e-12))
