"""Semantic branch of HTC (Chen et al. 2019): all levels fused into one map (FusedSemanticHead)."""

from collections.abc import Sequence

from flax import nnx
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, Integer
import numpy as np
import optax

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.heads.htc.config import HTCConfig
from frozen_vision.layers.convolution import MapConv
from frozen_vision.ops.arrays import Array

_KAIMING = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def _align_corners_matrix(size_in: int, size_out: int) -> np.ndarray:
  """[size_out, size_in] bilinear weights; first and last cells coincide (align_corners)."""
  position = np.arange(size_out) * ((size_in - 1) / max(size_out - 1, 1))
  low = np.minimum(np.floor(position).astype(int), size_in - 1)
  high = np.minimum(low + 1, size_in - 1)
  matrix = np.zeros((size_out, size_in), np.float32)
  rows = np.arange(size_out)
  np.add.at(matrix, (rows, low), 1 - (position - low))
  np.add.at(matrix, (rows, high), position - low)
  return matrix


def resize_align_corners(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b y x c"]:
  """Bilinear resize with align_corners=True, which `jax.image.resize` does not offer."""
  rows = jnp.asarray(_align_corners_matrix(x.shape[1], size[0]), x.dtype)
  columns = jnp.asarray(_align_corners_matrix(x.shape[2], size[1]), x.dtype)
  return jnp.einsum("xw,bywc->byxc", columns, jnp.einsum("yh,bhwc->bywc", rows, x))


class SemanticHead(nnx.Module):
  """Per level resize, 1x1 convolution, ReLU; sum; 3x3 convolutions; logits and an embedding."""

  def __init__(
    self, feature_specs: Sequence[FeatureSpec], config: HTCConfig, *, dtype: DTypeLike, rngs: nnx.Rngs
  ):
    self.config = config
    self.stride = feature_specs[config.semantic_level].stride
    channels, width = feature_specs[0].channels, config.semantic_channels

    def linear(i, o):
      return nnx.Linear(i, o, dtype=dtype, kernel_init=_KAIMING, rngs=rngs)

    self.laterals = nnx.List([linear(channels, channels) for _ in feature_specs])
    sizes = [channels] + [width] * config.semantic_convs
    self.convs = nnx.List(
      [
        MapConv(i, o, (3, 3), dtype=dtype, kernel_init=_KAIMING, rngs=rngs)
        for i, o in zip(sizes[:-1], sizes[1:])
      ]
    )
    # Added to roi features, hence the pyramid's width. The reference needs semantic_channels ==
    # channels.
    self.embedding = linear(sizes[-1], channels)
    self.logits = linear(sizes[-1], config.semantic_classes)

  def __call__(
    self, features: Sequence[Float[Array, "b _h _w c"]]
  ) -> tuple[Float[Array, "b y x k"], Float[Array, "b y x c"]]:
    """-> (logits, float32; embedding), both of the size of level `semantic_level`."""
    size = features[self.config.semantic_level].shape[1:3]
    x = 0.0
    for level, lateral in zip(features, self.laterals, strict=True):
      if level.shape[1:3] != size:
        level = resize_align_corners(level, size)
      x = x + nnx.relu(lateral(level))
    for conv in self.convs:
      x = nnx.relu(conv(x))
    return self.logits(x).astype(jnp.float32), nnx.relu(self.embedding(x))

  def loss(self, logits: Float[Array, "b y x k"], labels: Integer[Array, "b y x"]) -> Float[Array, ""]:
    """Weighted cross-entropy, the mean over all pixels, ignored ones (as zero) included, as in
    mmdet.

    Raises:
      ValueError: labels are not of the size of the logits.
    """
    if labels.shape != logits.shape[:3]:
      raise ValueError(
        f'batch["semantic"] has shape {labels.shape}, the semantic branch predicts'
        f" {logits.shape[:3]}:"
        f" give labels at stride {self.stride}, every {self.stride}th pixel of the label map."
      )
    known = labels != self.config.semantic_ignore
    # Any label that is no class counts as ignored too: inside jit a wrong index would be clamped in
    # silence.
    known &= (labels >= 0) & (labels < self.config.semantic_classes)
    loss = optax.softmax_cross_entropy_with_integer_labels(
      logits, jnp.where(known, labels, 0).astype(jnp.int32)
    )
    return self.config.semantic_loss_weight * jnp.where(known, loss, 0.0).mean()
