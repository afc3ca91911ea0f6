"""Video Swin Transformer (arXiv 2106.13230) as Flax NNX modules.

SwinV1's blocks with windows of space and time; time is halved once, by the patch embedding. The numbers
follow the released code. `Block` takes any map [b, t, h, w, c], so that heads are built of it too.

Random numbers are arguments: a call without `rng` is deterministic.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.backbones.video_swin import windows as windows3d
from frozen_vision.layers import stages
from frozen_vision.layers.mlp import linear, Mlp
from frozen_vision.layers.norms import LayerNorm
from frozen_vision.layers.patches import join_neighbours
from frozen_vision.layers.residual import drop_path
from frozen_vision.ops.arrays import Array

PATCH_SIZE = (2, 4, 4)


@dataclasses.dataclass(frozen=True)
class VideoSwinConfig:
  """Shape of a Video Swin.

  Attributes:
    embed_dim: channels at stride 4; they double at each merging.
    depths: blocks per stage.
    num_heads: attention heads per stage.
    window_size: (frames, rows, columns) in cells. An axis of a map that fits into its window is one window,
      without a shift.
    drop_path_rate: stochastic depth of the last block, growing linearly from 0; used only with `rng`.
  """

  embed_dim: int
  depths: tuple[int, ...]
  num_heads: tuple[int, ...]
  window_size: windows3d.Size = (8, 7, 7)
  mlp_ratio: int = 4
  drop_path_rate: float = 0.1

  def __post_init__(self):
    if len(self.num_heads) != len(self.depths):
      raise ValueError(
        f"VideoSwinConfig.num_heads = {self.num_heads} has {len(self.num_heads)} entries; depths = "
        f"{self.depths} asks for one per stage."
      )
    for stage, heads in enumerate(self.num_heads):
      if self.stage_channels(stage) % heads:
        raise ValueError(
          f"VideoSwinConfig.num_heads[{stage}] = {heads} does not divide the stage's "
          f"{self.stage_channels(stage)} channels."
        )

  def stage_channels(self, stage: int) -> int:
    return self.embed_dim * 2**stage


# The released configs for Kinetics-400, drop path included (0.2 for B pretrained on ImageNet-22K). Those for
# Something-Something v2 have the window (16, 7, 7).
VARIANTS: dict[str, VideoSwinConfig] = {
  "video_swin_t": VideoSwinConfig(96, (2, 2, 6, 2), (3, 6, 12, 24)),
  "video_swin_s": VideoSwinConfig(96, (2, 2, 18, 2), (3, 6, 12, 24)),
  "video_swin_b": VideoSwinConfig(128, (2, 2, 18, 2), (4, 8, 16, 32), drop_path_rate=0.3),
}


class WindowAttention(nnx.Module):
  """Multi-head attention inside windows with a learned bias per relative position."""

  def __init__(
    self, channels: int, num_heads: int, window_size: windows3d.Size, *, dtype: Any, rngs: nnx.Rngs
  ):
    self.num_heads = num_heads
    self.window_size = window_size
    self.qkv = linear(channels, 3 * channels, dtype=dtype, rngs=rngs)
    self.position_bias = nnx.Param(
      nnx.initializers.truncated_normal(0.02)(rngs.params(), (windows3d.table_rows(window_size), num_heads))
    )
    self.proj = linear(channels, channels, dtype=dtype, rngs=rngs)

  def __call__(
    self, x: Float[Array, "b windows n c"], window: windows3d.Size, regions: np.ndarray | None
  ) -> Float[Array, "b windows n c"]:
    # The first n positions of the whole window, as in the released code: in a window that is smaller in space
    # than the table's, a pair gets the bias of another offset than its own, and weights were trained so.
    n = int(np.prod(window))
    index = windows3d.position_index(self.window_size)[:n, :n]
    bias = jnp.moveaxis(self.position_bias[...][index], -1, 0)
    return self.proj(windows3d.attention(self.qkv(x), self.num_heads, bias, regions))


class Block(nnx.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)); windows are shifted by half in every second block."""

  def __init__(
    self,
    channels: int,
    num_heads: int,
    window_size: windows3d.Size,
    *,
    shifted: bool,
    mlp_ratio: int = 4,
    drop_path: float = 0.0,
    dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.window_size = window_size
    self.shifted = shifted
    self.drop_path = drop_path
    self.norm1 = LayerNorm(channels, rngs=rngs)
    self.attn = WindowAttention(channels, num_heads, window_size, dtype=dtype, rngs=rngs)
    self.norm2 = LayerNorm(channels, rngs=rngs)
    self.mlp = Mlp(channels, mlp_ratio * channels, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "b t h w c"], rng: Array | None = None) -> Float[Array, "b t h w c"]:
    keys = (None, None) if rng is None else jax.random.split(rng)
    # Padding comes after the norm: padded cells are zeros there, and their keys the bias alone.
    update = windows3d.attend_in_windows(self.norm1(x), self.window_size, self.shifted, self.attn)
    x = x + drop_path(update, self.drop_path, keys[0])
    return x + drop_path(self.mlp(self.norm2(x)), self.drop_path, keys[1])


class PatchMerging(nnx.Module):
  """Joins 2 x 2 neighbours of every frame, norms, and halves their channels."""

  def __init__(self, channels: int, *, outputs: int | None = None, dtype: Any, rngs: nnx.Rngs):
    self.norm = LayerNorm(4 * channels, rngs=rngs)
    self.reduction = linear(4 * channels, outputs or 2 * channels, use_bias=False, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h2 w2 d"]:
    joined = join_neighbours(x.reshape(-1, *x.shape[2:]))
    return self.reduction(self.norm(joined.reshape(*x.shape[:2], *joined.shape[1:])))


class PatchEmbedding(nnx.Module):
  """A 2 x 4 x 4 convolution of that stride, written as the matrix product it is, and a norm."""

  def __init__(self, channels: int, *, dtype: Any, rngs: nnx.Rngs):
    self.proj = linear(int(np.prod(PATCH_SIZE)) * 3, channels, dtype=dtype, rngs=rngs)
    self.norm = LayerNorm(channels, rngs=rngs)

  def __call__(self, clips: Float[Array, "b t h w 3"]) -> Float[Array, "b t2 h4 w4 c"]:
    padding = [(0, -length % side) for length, side in zip(clips.shape[1:4], PATCH_SIZE)]
    x = jnp.pad(clips, ((0, 0), *padding, (0, 0)))
    counts = [length // side for length, side in zip(x.shape[1:4], PATCH_SIZE)]
    x = x.reshape(x.shape[0], counts[0], PATCH_SIZE[0], counts[1], PATCH_SIZE[1], counts[2], PATCH_SIZE[2], 3)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(x.shape[0], *counts, -1)
    return self.norm(self.proj(x))


def make_blocks(
  channels: int,
  num_heads: int,
  config: Any,
  drop_paths: Sequence[float],
  *,
  dtype: Any,
  rngs: nnx.Rngs,
) -> nnx.List:
  """Blocks at one stride, every second one with shifted windows.

  Args:
    config: has `window_size` and `mlp_ratio`.
    drop_paths: rate of stochastic depth of each block.
  """
  blocks = []
  for index, rate in enumerate(drop_paths):
    blocks.append(
      Block(
        channels,
        num_heads,
        config.window_size,
        shifted=index % 2 == 1,
        mlp_ratio=config.mlp_ratio,
        drop_path=rate,
        dtype=dtype,
        rngs=rngs,
      )
    )
  return nnx.List(blocks)


class Stage(nnx.Module):
  """Blocks at one stride, and the merging that leads to the next."""

  def __init__(
    self, config: VideoSwinConfig, stage: int, drop_paths: list[float], *, dtype: Any, rngs: nnx.Rngs
  ):
    channels = config.stage_channels(stage)
    self.blocks = make_blocks(channels, config.num_heads[stage], config, drop_paths, dtype=dtype, rngs=rngs)
    last = stage == len(config.depths) - 1
    self.downsample = None if last else PatchMerging(channels, dtype=dtype, rngs=rngs)


class VideoSwin(nnx.Module):
  """Video Swin without the classifier.

  Calling it gives the raw output of every stage, before the next merging and without a norm; `embed` gives
  the pooled vector that classifiers read.
  """

  def __init__(self, config: VideoSwinConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
    self.config = config
    self.dtype = dtype
    self.patch_embed = PatchEmbedding(config.embed_dim, dtype=dtype, rngs=rngs)
    self.stages = stages.build(Stage, config, dtype=dtype, rngs=rngs)
    self.norm = LayerNorm(config.stage_channels(len(config.depths) - 1), rngs=rngs)

  @property
  def feature_specs(self) -> tuple[FeatureSpec, ...]:
    """Strides in space; in time every level has stride 2."""
    return tuple(
      FeatureSpec(PATCH_SIZE[1] * 2**stage, self.config.stage_channels(stage))
      for stage in range(len(self.config.depths))
    )

  def __call__(
    self, clips: Float[Array, "b t h w 3"], *, rng: Array | None = None
  ) -> tuple[Float[Array, "b _t _h _w _c"], ...]:
    """Features of every stage.

    Args:
      clips: normalised, any length, height and width; padded behind with zeros where needed.
      rng: key of stochastic depth in training; None is deterministic.

    Returns:
      One [b, ceil(t / 2), ceil(h / s), ceil(w / s), c] for each of `feature_specs`.
    """
    return stages.features(self.stages, self.patch_embed(clips.astype(self.dtype)), rng)

  def embed(self, clips: Float[Array, "b t h w 3"], *, rng: Array | None = None) -> Float[Array, "b c"]:
    """The final norm's output, averaged over time and space."""
    return jnp.mean(self.norm(self(clips, rng=rng)[-1]), axis=(1, 2, 3))
