"""UPerNet (Xiao et al. 2018): pyramid pooling on the coarsest level, a feature pyramid, all levels fused.

The layout is mmseg's UPerHead with its auxiliary FCNHead. Where those normalise by batch statistics, this
normalises by groups of channels: a batch here may be a few images, and running averages are state that no
gradient reaches.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math
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
from frozen_vision.layers.convolution import MapConv
from frozen_vision.ops import resize
from frozen_vision.ops.arrays import Array
from frozen_vision.options import Count, Fraction, from_data, NonNegative

_KAIMING = nnx.initializers.variance_scaling(2.0, "fan_in", "uniform")
_CLASSIFIER = nnx.initializers.normal(0.01)  # mmseg's, so that training starts at equal probabilities


@dataclasses.dataclass(frozen=True)
class UPerNetConfig:
  """Options of the head; the values are mmseg's, `input_norm` is ours.

  Attributes:
    num_classes: classes.
    channels: of every map inside the head.
    pool_scales: sides of the pyramid pooling's grids.
    norm_groups: most groups of the group norms.
    dropout: fraction of the channels that are dropped before a classifier.
    auxiliary_weight: of the loss of a second, small head on level `auxiliary_level`; 0 for none.
    auxiliary_level: which feature level that head reads; negative ones count from the coarsest.
    auxiliary_channels: its width.
    input_norm: a trainable LayerNorm over the channels of every level first. Our frozen backbones end without
      a norm per level, as public checkpoints do; this is that norm.
  """

  num_classes: int = from_data(150)
  name: Literal["upernet"] = "upernet"
  channels: Count = 512
  pool_scales: tuple[Count, ...] = (1, 2, 3, 6)
  norm_groups: Count = 32
  dropout: Fraction = 0.1
  auxiliary_weight: NonNegative = 0.4
  auxiliary_level: int = -2
  auxiliary_channels: Count = 256
  input_norm: bool = True


class ConvNorm(nnx.Module):
  """Convolution without bias, group norm, ReLU."""

  def __init__(
    self, channels_in: int, channels_out: int, kernel: int, *, groups: int, dtype: DTypeLike, rngs: nnx.Rngs
  ):
    self.conv = MapConv(
      channels_in,
      channels_out,
      (kernel, kernel),
      use_bias=False,
      kernel_init=_KAIMING,
      dtype=dtype,
      rngs=rngs,
    )
    self.norm = nnx.GroupNorm(
      channels_out, num_groups=math.gcd(channels_out, groups), epsilon=1e-5, dtype=dtype, rngs=rngs
    )

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    return nnx.relu(self.norm(self.conv(x)))


class UPerNet(SegmentationHead):
  """Logits at the finest level's stride."""

  def __init__(
    self,
    feature_specs: Sequence[FeatureSpec],
    config: UPerNetConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Builds the head.

    Raises:
      ValueError: fewer than two levels, or an auxiliary level that does not exist.
    """
    specs = tuple(feature_specs)
    if len(specs) < 2 or not -len(specs) <= config.auxiliary_level < len(specs):
      raise ValueError(
        f"UPerNet on {len(specs)} levels with the auxiliary head on level {config.auxiliary_level}; "
        "expected at least two levels, and one of them."
      )
    self.config = config
    self.dtype = dtype
    self.strides = tuple(spec.stride for spec in specs)
    self.norms = norms.level_norms(
      [spec.channels for spec in specs],
      functools.partial(nnx.LayerNorm, dtype=dtype, rngs=rngs),
      enabled=config.input_norm,
    )
    width, count = config.channels, len(config.pool_scales)

    def make(channels_in, channels_out, kernel):
      return ConvNorm(channels_in, channels_out, kernel, groups=config.norm_groups, dtype=dtype, rngs=rngs)

    def classifier(channels):
      return nnx.Linear(channels, config.num_classes, kernel_init=_CLASSIFIER, dtype=dtype, rngs=rngs)

    self.pools = nnx.List([make(specs[-1].channels, width, 1) for _ in range(count)])
    self.bottleneck = make(specs[-1].channels + count * width, width, 3)
    self.laterals = nnx.List([make(spec.channels, width, 1) for spec in specs[:-1]])
    self.outputs = nnx.List([make(width, width, 3) for _ in specs[:-1]])
    self.fusion = make(len(specs) * width, width, 3)
    self.classifier = classifier(width)
    if config.auxiliary_weight:
      self.auxiliary = make(specs[config.auxiliary_level].channels, config.auxiliary_channels, 3)
      self.auxiliary_classifier = classifier(config.auxiliary_channels)

  def __call__(
    self, features: Sequence[Float[Array, "b _h _w _c"]], *, rng: jax.Array | None = None
  ) -> Float[Array, "b h w k"]:
    """Feature levels, fine to coarse -> float32 logits at the finest level's stride.

    Args:
      rng: for dropout; None for none.
    """
    features = self._normed(features)
    maps = [lateral(x) for lateral, x in zip(self.laterals, features[:-1])] + [self._pool(features[-1])]
    for i in range(len(maps) - 1, 0, -1):
      maps[i - 1] = maps[i - 1] + self._upsample(maps[i], i, i - 1, maps[i - 1].shape[1:3])
    outputs = [output(x) for output, x in zip(self.outputs, maps)] + [maps[-1]]
    finest = outputs[0].shape[1:3]
    outputs = [self._upsample(x, i, 0, finest) for i, x in enumerate(outputs)]
    x = self.fusion(jnp.concatenate(outputs, axis=-1))
    return self.classifier(self._drop(x, rng)).astype(jnp.float32)

  def auxiliary_logits(
    self, features: Sequence[Float[Array, "b _h _w _c"]], *, rng: jax.Array | None = None
  ) -> Float[Array, "b h w k"]:
    """Logits of the auxiliary head at its level's stride, float32."""
    x = self.auxiliary(self._normed(features)[self.config.auxiliary_level])
    return self.auxiliary_classifier(self._drop(x, rng)).astype(jnp.float32)

  def _normed(self, features: Sequence[jax.Array]) -> list[jax.Array]:
    features = [jnp.asarray(x, self.dtype) for x in features]
    return norms.normed(self.norms, features)

  def _pool(self, x: jax.Array) -> jax.Array:
    pooled = [
      resize.resize_bilinear(pool(resize.adaptive_average_pool(x, (scale, scale))), x.shape[1:3])
      for scale, pool in zip(self.config.pool_scales, self.pools)
    ]
    return self.bottleneck(jnp.concatenate([x, *pooled], axis=-1))

  def _upsample(self, x: jax.Array, level: int, to: int, size: tuple[int, int]) -> jax.Array:
    return resize.upsample(x, self.strides[level] // self.strides[to], size)

  def _drop(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
    """Dropout of whole channels (PyTorch's Dropout2d)."""
    rate = self.config.dropout
    if rng is None or not rate:
      return x
    kept = jax.random.bernoulli(rng, 1 - rate, (x.shape[0], 1, 1, x.shape[3]))
    return jnp.where(kept, x / (1 - rate), 0)

  def losses(
    self, features: Sequence[Float[Array, "b _h _w _c"]], batch: Mapping[str, Array], rng: jax.Array
  ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """({"loss_ce" and "loss_auxiliary"}, {"pixel_accuracy"}) of `batch["labels"]`."""
    rng, auxiliary_rng = jax.random.split(rng)
    loss, accuracy = pixel_classification.cross_entropy(
      self(features, rng=rng), batch["labels"], stride=self.strides[0]
    )
    losses = {"loss_ce": loss}
    if self.config.auxiliary_weight:
      loss, _ = pixel_classification.cross_entropy(
        self.auxiliary_logits(features, rng=auxiliary_rng),
        batch["labels"],
        stride=self.strides[self.config.auxiliary_level],
      )
      losses["loss_auxiliary"] = self.config.auxiliary_weight * loss
    return losses, {"pixel_accuracy": accuracy}

  def predict_semantic(
    self, features: Sequence[Float[Array, "b _h _w _c"]], size: tuple[int, int]
  ) -> Float[Array, "b y x k"]:
    """Class probabilities of every pixel of the padded input of `size` (height, width)."""
    return pixel_classification.probabilities(self(features), size, stride=self.strides[0])
