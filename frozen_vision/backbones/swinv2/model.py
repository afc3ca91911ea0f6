"""Swin Transformer V2 (arXiv 2111.09883) as Flax NNX modules.

The numbers follow the released code (github.com/microsoft/Swin-Transformer), where it and the paper
differ: `16 * sigmoid` on the position bias, `8 * d / (w - 1)` and `log2(8)` in its coordinates, and
an additive -100 between the regions of a shifted window are in the code only.

Random numbers are arguments: a call without `rng` is deterministic, which is what a frozen backbone is.
"""

import dataclasses
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.backbones.swinv2.windows import (
  attend_in_windows,
  cosine_attention,
  pair_bias,
  position_coordinates,
)

_PATCH_SIZE = 4
_CPB_HIDDEN = 512
NORM_EPSILON = 1e-5  # torch's default; flax's own is 1e-6.
MAX_LOGIT_SCALE = math.log(100.0)  # the learnt temperature stays above 0.01.


@dataclasses.dataclass(frozen=True)
class SwinV2Config:
  """Shape of a SwinV2.

  Attributes:
    embed_dim: channels at stride 4; they double at each of the three mergings.
    depths: blocks per stage.
    num_heads: attention heads per stage.
    window_sizes: window side per stage, in cells of that stage. A map smaller than its window is one
      window, without a shift.
    pretrained_window_sizes: per stage, the window that position coordinates are normalised by; 0 means
      the window in use. Set it to the windows of the pretraining wherever a backbone is used at another
      window or image size than it was trained at.
    extra_norm_interval: a further LayerNorm on the main branch after every so many blocks of a stage
      (6 in SwinV2-H and G, section 3.2); 0 for none.
    drop_path_rate: stochastic depth of the last block, growing linearly from 0; used only with `rng`.
    residual_norm_init: initial scale of the norms that end the residual branches. The released code
      uses 0, so that a fresh network is the identity in each block; 1 makes a random backbone a real one.
    whole_windows: refuse maps smaller than their window and images of no whole patches. Set for weights of
      torchvision, whose features are others there.
  """

  embed_dim: int
  depths: tuple[int, ...]
  num_heads: tuple[int, ...]
  window_sizes: tuple[int, ...] = (8, 8, 8, 8)
  pretrained_window_sizes: tuple[int, ...] = (0, 0, 0, 0)
  extra_norm_interval: int = 0
  mlp_ratio: int = 4
  drop_path_rate: float = 0.0
  residual_norm_init: float = 0.0
  whole_windows: bool = False

  def __post_init__(self):
    for name in ("num_heads", "window_sizes", "pretrained_window_sizes"):
      if len(getattr(self, name)) != len(self.depths):
        raise ValueError(
          f"SwinV2Config.{name} = {getattr(self, name)} has {len(getattr(self, name))} entries; "
          f"depths = {self.depths} asks for one per stage."
        )
    for stage, heads in enumerate(self.num_heads):
      if self.stage_channels(stage) % heads:
        raise ValueError(
          f"SwinV2Config.num_heads[{stage}] = {heads} does not divide the stage's "
          f"{self.stage_channels(stage)} channels."
        )

  def stage_channels(self, stage: int) -> int:
    return self.embed_dim * 2**stage


# Widths, depths and heads: T to L from the released configs; H and G from section 3.6 of the paper, H's heads
# from SwinTransformer/MIM-Depth-Estimation, G's heads by their common size of 32 (the paper gives none).
# nano is ours, for 8 MB of weights: a third of T's width, and one block at stride 4, where a block costs as
# much as three at stride 16 on small images.
VARIANTS: dict[str, SwinV2Config] = {
  "swinv2_nano": SwinV2Config(32, (1, 2, 6, 2), (1, 2, 4, 8)),
  "swinv2_t": SwinV2Config(96, (2, 2, 6, 2), (3, 6, 12, 24), drop_path_rate=0.2),
  "swinv2_s": SwinV2Config(96, (2, 2, 18, 2), (3, 6, 12, 24), drop_path_rate=0.3),
  "swinv2_b": SwinV2Config(128, (2, 2, 18, 2), (4, 8, 16, 32), drop_path_rate=0.5),
  "swinv2_l": SwinV2Config(192, (2, 2, 18, 2), (6, 12, 24, 48), drop_path_rate=0.2),
  "swinv2_h": SwinV2Config(352, (2, 2, 18, 2), (11, 22, 44, 88), extra_norm_interval=6),
  "swinv2_g": SwinV2Config(512, (2, 2, 42, 4), (16, 32, 64, 128), extra_norm_interval=6),
}


def linear(inputs: int, outputs: int, *, use_bias: bool = True, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
  return nnx.Linear(
    inputs,
    outputs,
    use_bias=use_bias,
    dtype=dtype,
    rngs=rngs,
    kernel_init=nnx.initializers.truncated_normal(0.02),
  )


class LayerNorm(nnx.LayerNorm):
  """LayerNorm in float32 whatever comes in, returned in the input's dtype."""

  def __init__(self, channels: int, *, scale: float = 1.0, rngs: nnx.Rngs):
    super().__init__(
      channels,
      epsilon=NORM_EPSILON,
      use_fast_variance=False,
      dtype=jnp.float32,
      scale_init=nnx.initializers.constant(scale),
      rngs=rngs,
    )

  def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
    return super().__call__(x).astype(x.dtype)


class PositionBias(nnx.Module):
  """Continuous relative position bias: a two-layer MLP on log-spaced coordinates (section 3.3)."""

  def __init__(self, num_heads: int, *, rngs: nnx.Rngs):
    self.fc1 = linear(2, _CPB_HIDDEN, dtype=jnp.float32, rngs=rngs)
    self.fc2 = linear(_CPB_HIDDEN, num_heads, use_bias=False, dtype=jnp.float32, rngs=rngs)

  def table(self, window: tuple[int, int], pretrained: int) -> Float[Array, "offsets heads"]:
    """The bias of every relative position, float32, in the order of `position_coordinates`."""
    return position_table(**self.weights(), window=window, pretrained=pretrained)

  def weights(self) -> dict[str, Array]:
    """Arguments of `position_table`, float32."""
    leaves = dict(kernel1=self.fc1.kernel, bias1=self.fc1.bias, kernel2=self.fc2.kernel)
    return {name: leaf[...].astype(jnp.float32) for name, leaf in leaves.items()}

  def __call__(self, window: tuple[int, int], pretrained: int) -> Float[Array, "heads _ _"]:
    """What `cosine_attention` adds to its logits, float32; see `pair_bias`."""
    return pair_bias(self.table(window, pretrained), window)


def position_table(
  kernel1: Float[Array, "2 hidden"],
  bias1: Float[Array, "hidden"],
  kernel2: Float[Array, "hidden heads"],
  *,
  window: tuple[int, int],
  pretrained: int,
) -> Float[Array, "offsets heads"]:
  """The bias of every relative position of a window, in the order of `position_coordinates`."""
  hidden = jax.nn.relu(jnp.asarray(position_coordinates(window, pretrained)) @ kernel1 + bias1)
  return 16 * jax.nn.sigmoid(hidden @ kernel2)


class WindowAttention(nnx.Module):
  """Multi-head attention inside windows with scaled cosine similarity (section 3.2)."""

  def __init__(self, channels: int, num_heads: int, *, dtype: Any, rngs: nnx.Rngs):
    self.num_heads = num_heads
    self.qkv = linear(channels, 3 * channels, use_bias=False, dtype=dtype, rngs=rngs)
    # Keys have no bias. With normalised keys a bias would not cancel in the softmax.
    self.q_bias = nnx.Param(jnp.zeros(channels))
    self.v_bias = nnx.Param(jnp.zeros(channels))
    self.logit_scale = nnx.Param(jnp.full((num_heads,), math.log(10.0)))
    self.position_bias = PositionBias(num_heads, rngs=rngs)
    self.proj = linear(channels, channels, dtype=dtype, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, "b h w c"],
    window: tuple[int, int],
    pretrained: int,
    regions: Array | np.ndarray | None,
  ) -> Float[Array, "b h w c"]:
    q_bias, v_bias = self.q_bias[...], self.v_bias[...]
    qkv_bias = jnp.concatenate([q_bias, jnp.zeros_like(v_bias), v_bias]).astype(x.dtype)
    scale = jnp.exp(jnp.minimum(self.logit_scale[...].astype(jnp.float32), MAX_LOGIT_SCALE))
    bias = self.position_bias(window, pretrained)
    return self.proj(cosine_attention(self.qkv(x) + qkv_bias, window, scale, bias, regions))


class Mlp(nnx.Module):
  def __init__(self, channels: int, hidden: int, *, dtype: Any, rngs: nnx.Rngs):
    self.fc1 = linear(channels, hidden, dtype=dtype, rngs=rngs)
    self.fc2 = linear(hidden, channels, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
    return self.fc2(gelu(self.fc1(x)))


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """x times the normal distribution's cumulative, exact, by erf as in PyTorch and in float32 as there.

  `jax.nn.gelu` takes erfc, which costs an exponential more for every number.
  """
  y = x.astype(jnp.float32)
  return (y * (0.5 + 0.5 * jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


def drop_path(x: Float[Array, "b ..."], rate: float, key: Array | None) -> Float[Array, "b ..."]:
  """Drops whole residual branches per example (arXiv 1603.09382), none without a key; the mean stays."""
  if key is None or not rate:
    return x
  keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
  return jnp.where(keep, x / (1 - rate), 0)


class Block(nnx.Module):
  """x + norm(attention(x)), then x + norm(mlp(x)): residual post-norm (section 3.2)."""

  def __init__(
    self, config: SwinV2Config, stage: int, index: int, drop_path: float, *, dtype: Any, rngs: nnx.Rngs
  ):
    channels = config.stage_channels(stage)
    self.window_size = config.window_sizes[stage]
    self.pretrained_window_size = config.pretrained_window_sizes[stage]
    self.whole_windows = config.whole_windows
    self.shifted = index % 2 == 1
    self.drop_path = drop_path
    self.attn = WindowAttention(channels, config.num_heads[stage], dtype=dtype, rngs=rngs)
    self.norm1 = LayerNorm(channels, scale=config.residual_norm_init, rngs=rngs)
    self.mlp = Mlp(channels, config.mlp_ratio * channels, dtype=dtype, rngs=rngs)
    self.norm2 = LayerNorm(channels, scale=config.residual_norm_init, rngs=rngs)
    interval = config.extra_norm_interval
    self.extra_norm = LayerNorm(channels, rngs=rngs) if interval and (index + 1) % interval == 0 else None

  def __call__(self, x: Float[Array, "b h w c"], rng: Array | None = None) -> Float[Array, "b h w c"]:
    keys = [None, None]
    if rng is not None and self.drop_path:
      keys = list(jax.random.split(rng))
    for key, norm, branch in zip(keys, (self.norm1, self.norm2), (self._attend, self.mlp)):
      x = x + drop_path(norm(branch(x)), self.drop_path, key)
    return x if self.extra_norm is None else self.extra_norm(x)

  def _attend(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    if self.whole_windows:
      check_map(x.shape[1:3], self.window_size)
    return attend_in_windows(
      x,
      self.window_size,
      self.shifted,
      lambda x, window, regions: self.attn(x, window, self.pretrained_window_size, regions),
      self.attn.num_heads,
    )


def check_map(size: tuple[int, int], window_size: int) -> None:
  """Refuses, with `whole_windows`, a map smaller than its window."""
  if min(size) < window_size:
    raise ValueError(
      f"A map of {size[0]} x {size[1]} is smaller than its window of {window_size}; torchvision, whose "
      "weights these are, computes something else there. Give larger images, or load the weights with "
      "whole_windows=False to use them as SwinV2's."
    )


def check_patches(size: tuple[int, int]) -> None:
  """Refuses, with `whole_windows`, images of no whole patches."""
  if any(side % _PATCH_SIZE for side in size):
    raise ValueError(
      f"Images of {size}: torchvision, whose weights these are, cuts what is no whole patch of "
      "4 x 4. Pad the images, or load the weights with whole_windows=False to have them padded here."
    )


class PatchMerging(nnx.Module):
  """Joins 2 x 2 neighbours, halves their channels, then norms (SwinV1 norms first)."""

  def __init__(self, channels: int, *, dtype: Any, rngs: nnx.Rngs):
    self.reduction = linear(4 * channels, 2 * channels, use_bias=False, dtype=dtype, rngs=rngs)
    self.norm = LayerNorm(2 * channels, rngs=rngs)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    return self.norm(self.reduction(join_neighbours(x)))


def join_neighbours(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 4c"]:
  x = _pad_to_multiple(x, 2)
  b, height, width, c = x.shape
  x = x.reshape(b, height // 2, 2, width // 2, 2, c)
  # Order of the released code: (0,0), (1,0), (0,1), (1,1), so the column offset is the slower one.
  return x.transpose(0, 1, 3, 4, 2, 5).reshape(b, height // 2, width // 2, 4 * c)


class PatchEmbedding(nnx.Module):
  """A 4 x 4 convolution of stride 4, written as the matrix product it is, and a norm."""

  def __init__(self, channels: int, *, dtype: Any, rngs: nnx.Rngs):
    self.proj = linear(_PATCH_SIZE * _PATCH_SIZE * 3, channels, dtype=dtype, rngs=rngs)
    self.norm = LayerNorm(channels, rngs=rngs)

  def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b h4 w4 c"]:
    return self.norm(self.proj(patches(images)))


def patches(images: Float[Array, "b h w 3"]) -> Float[Array, "b h4 w4 48"]:
  x = _pad_to_multiple(images, _PATCH_SIZE)
  b, height, width, c = x.shape
  rows, columns = height // _PATCH_SIZE, width // _PATCH_SIZE
  x = x.reshape(b, rows, _PATCH_SIZE, columns, _PATCH_SIZE, c).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, rows, columns, -1)


def _pad_to_multiple(x: Float[Array, "b h w c"], multiple: int) -> Float[Array, "b h2 w2 c"]:
  bottom, right = -x.shape[1] % multiple, -x.shape[2] % multiple
  return jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0))) if bottom or right else x


class Stage(nnx.Module):
  """Blocks at one stride, and the merging that leads to the next."""

  def __init__(
    self, config: SwinV2Config, stage: int, drop_paths: list[float], *, dtype: Any, rngs: nnx.Rngs
  ):
    self.blocks = nnx.List(
      [
        Block(config, stage, index, drop_path, dtype=dtype, rngs=rngs)
        for index, drop_path in enumerate(drop_paths)
      ]
    )
    last = stage == len(config.depths) - 1
    self.downsample = None if last else PatchMerging(config.stage_channels(stage), dtype=dtype, rngs=rngs)


class SwinV2(nnx.Module):
  """SwinV2 backbone: what public checkpoints hold, without the classifier.

  Calling it gives the raw output of every stage, before the next merging and without a norm: norms per
  level are new parameters, so they belong to the neck, and train. `embed` gives the pooled vector that
  classifiers read.
  """

  def __init__(self, config: SwinV2Config, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
    self.config = config
    self.dtype = dtype
    self.patch_embed = PatchEmbedding(config.embed_dim, dtype=dtype, rngs=rngs)
    rates = np.linspace(0, config.drop_path_rate, sum(config.depths)).tolist()
    starts = np.cumsum((0,) + config.depths)
    self.stages = nnx.List(
      [
        Stage(config, stage, rates[starts[stage] : starts[stage + 1]], dtype=dtype, rngs=rngs)
        for stage in range(len(config.depths))
      ]
    )
    self.norm = LayerNorm(self.feature_specs[-1].channels, rngs=rngs)

  @property
  def feature_specs(self) -> tuple[FeatureSpec, ...]:
    return tuple(
      FeatureSpec(_PATCH_SIZE * 2**stage, self.config.stage_channels(stage))
      for stage in range(len(self.config.depths))
    )

  def __call__(
    self, images: Float[Array, "b h w 3"], *, rng: Array | None = None
  ) -> tuple[Float[Array, "b hs ws cs"], ...]:
    """Features of every stage.

    Args:
      images: normalised, any height and width; padded right and bottom with zeros where needed.
      rng: key of stochastic depth while the backbone itself trains; None is deterministic.

    Returns:
      One [b, ceil(h / s), ceil(w / s), c] for each of `feature_specs`.
    """
    if self.config.whole_windows:
      check_patches(images.shape[1:3])
    x = self.patch_embed(images.astype(self.dtype))
    features = []
    index = 0
    for stage in self.stages:
      for block in stage.blocks:
        x = block(x, None if rng is None else jax.random.fold_in(rng, index))
        index += 1
      features.append(x)
      if stage.downsample is not None:
        x = stage.downsample(x)
    return tuple(features)

  def embed(self, images: Float[Array, "b h w 3"], *, rng: Array | None = None) -> Float[Array, "b c"]:
    """The final norm's output, averaged over positions."""
    return jnp.mean(self.norm(self(images, rng=rng)[-1]), axis=(1, 2))
