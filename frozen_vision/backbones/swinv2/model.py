"""Swin Transformer V2 (arXiv 2111.09883) as Flax NNX modules.

The numbers follow the released code (github.com/microsoft/Swin-Transformer), where it and the paper
differ: `16 * sigmoid` on the position bias, `8 * d / (w - 1)` and `log2(8)` in its coordinates, and
an additive -100 between the regions of a shifted window are in the code only.

Random numbers are arguments: a call without `rng` is deterministic, which is what a frozen backbone is.
"""

from collections.abc import Callable
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from frozen_vision.backbones import base
from frozen_vision.backbones.swinv2 import folded
from frozen_vision.backbones.swinv2.config import (
  check_map,
  check_patches,
  CPB_HIDDEN,
  PATCH_SIZE,
  SwinV2Config,
)
from frozen_vision.backbones.swinv2.windows import (
  attend_in_windows,
  attend_on_chip,
  attention_on_chip,
  attention_weights,
  cosine_attention,
  MAX_LOGIT_SCALE,
  pair_bias,
  position_table,
  table_by_head,
)
from frozen_vision.layers import stages
from frozen_vision.layers.mlp import linear, Mlp
from frozen_vision.layers.norms import LayerNorm
from frozen_vision.layers.patches import join_neighbours, patches
from frozen_vision.layers.relative_positions import position_index
from frozen_vision.layers.residual import drop_path
from frozen_vision.ops.arrays import Array


class PositionBias(nnx.Module):
  """Continuous relative position bias: a two-layer MLP on log-spaced coordinates (section 3.3)."""

  def __init__(self, num_heads: int, *, rngs: nnx.Rngs):
    self.fc1 = linear(2, CPB_HIDDEN, dtype=jnp.float32, rngs=rngs)
    self.fc2 = linear(CPB_HIDDEN, num_heads, use_bias=False, dtype=jnp.float32, rngs=rngs)

  def table(self, window: tuple[int, int], pretrained: int) -> Float[Array, "offsets heads"]:
    """The bias of every relative position, float32, in the order of `position_coordinates`."""
    return position_table(**self.weights(), window=window, pretrained=pretrained)

  def weights(self) -> dict[str, Array]:
    """Arguments of `position_table`, float32."""
    leaves = dict(kernel1=self.fc1.kernel, bias1=self.fc1.bias, kernel2=self.fc2.kernel)
    return {name: leaf[...].astype(jnp.float32) for name, leaf in leaves.items()}

  def __call__(self, window: tuple[int, int], pretrained: int) -> Float[Array, "heads _ _"]:
    """The bias that `cosine_attention` adds to its logits, float32; see `pair_bias`."""
    return pair_bias(self.table(window, pretrained), window)


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
    bias = self.position_bias(window, pretrained)
    return self.proj(cosine_attention(self.biased_qkv(x), window, self.scale(), bias, regions))

  def on_chip(
    self, x: Float[Array, "b h w c"], window: tuple[int, int], pretrained: int, shift: tuple[int, int]
  ) -> Float[Array, "b h w c"]:
    """The same by `attention_on_chip`; shift are the cells that the map was rolled by."""
    table = table_by_head(self.position_bias.table(window, pretrained), window)
    return self.proj(attention_on_chip(self.biased_qkv(x), window, self.scale(), table, shift))

  def biased_qkv(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w qkv"]:
    """Queries, keys and values."""
    q_bias, v_bias = self.q_bias[...], self.v_bias[...]
    return self.qkv(x) + jnp.concatenate([q_bias, jnp.zeros_like(v_bias), v_bias]).astype(x.dtype)

  def scale(self) -> Float[Array, "heads"]:
    """What cosine similarities are multiplied by, float32."""
    return jnp.exp(jnp.minimum(self.logit_scale[...].astype(jnp.float32), MAX_LOGIT_SCALE))


class Block(nnx.Module):
  """x + norm(attention(x)), then x + norm(mlp(x)): residual post-norm (section 3.2)."""

  def __init__(
    self, config: SwinV2Config, stage: int, index: int, drop_path: float, *, dtype: Any, rngs: nnx.Rngs
  ):
    channels = config.stage_channels(stage)
    self.window_size = config.window_sizes[stage]
    self.pretrained_window_size = config.pretrained_window_sizes[stage]
    self.whole_windows = config.whole_windows
    self.attention = config.attention
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

  def attention_weights(
    self, x: Float[Array, "b h w c"]
  ) -> tuple[Float[Array, "b windows heads n n"], Float[np.ndarray, "windows n 2"]]:
    """See `windows.attention_weights`; x is the map that enters the block."""

    def bias(window):
      table = self.attn.position_bias.table(window, self.pretrained_window_size)
      return jnp.moveaxis(table[position_index(window)], -1, 0)

    return attention_weights(self.attn.biased_qkv, x, self.window_size, self.shifted, self.attn.scale(), bias)

  def _attend(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    if self.whole_windows:
      check_map(x.shape[1:3], self.window_size)
    if self.attention == "pallas":
      return attend_on_chip(
        x,
        self.window_size,
        self.shifted,
        lambda x, window, shift: self.attn.on_chip(x, window, self.pretrained_window_size, shift),
      )
    return attend_in_windows(
      x,
      self.window_size,
      self.shifted,
      lambda x, window, regions: self.attn(x, window, self.pretrained_window_size, regions),
      self.attn.num_heads,
    )


class PatchMerging(nnx.Module):
  """Joins 2 x 2 neighbours, halves their channels, then norms (SwinV1 norms first)."""

  def __init__(self, channels: int, *, dtype: Any, rngs: nnx.Rngs):
    self.reduction = linear(4 * channels, 2 * channels, use_bias=False, dtype=dtype, rngs=rngs)
    self.norm = LayerNorm(2 * channels, rngs=rngs)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    return self.norm(self.reduction(join_neighbours(x)))


class PatchEmbedding(nnx.Module):
  """A 4 x 4 convolution of stride 4, written as the matrix product it is, and a norm."""

  def __init__(self, channels: int, *, dtype: Any, rngs: nnx.Rngs):
    self.proj = linear(PATCH_SIZE * PATCH_SIZE * 3, channels, dtype=dtype, rngs=rngs)
    self.norm = LayerNorm(channels, rngs=rngs)

  def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b h4 w4 c"]:
    return self.norm(self.proj(patches(images, PATCH_SIZE)))


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


class SwinV2(base.Backbone):
  """SwinV2 backbone: what public checkpoints hold, without the classifier.

  Calling it gives the raw output of every stage, before the next merging and without a norm: norms per
  level are new parameters, so they belong to the neck, and train. `embed` gives the pooled vector that
  classifiers read.
  """

  sharding_rules = base.COMMON_SHARDING_RULES + (
    (r".*/table", (-2, -1)),  # [positions, heads]
    (r".*/[qv]_bias", (-1,)),
    (r".*/position_bias/.*", (-2, -1)),  # the MLP that makes a table
  )
  no_weight_decay = (r".*/position_bias/.*", r".*/logit_scale")  # as in the released code

  def __init__(self, config: SwinV2Config, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
    self.config = config
    self.dtype = dtype
    self.patch_embed = PatchEmbedding(config.embed_dim, dtype=dtype, rngs=rngs)
    self.stages = stages.build(Stage, config, dtype=dtype, rngs=rngs)
    self.norm = LayerNorm(self.feature_specs[-1].channels, rngs=rngs)

  @property
  def stem_channels(self) -> int:
    return self.config.embed_dim

  def __call__(
    self, images: Float[Array, "b h w 3"], *, rng: Array | None = None
  ) -> tuple[Float[Array, "b _h _w _c"], ...]:
    """Features of every stage.

    Args:
      images: normalised, any height and width; padded right and bottom with zeros where needed.
      rng: key of stochastic depth while the backbone itself trains; None is deterministic.

    Returns:
      One [b, ceil(h / s), ceil(w / s), c] for each of `feature_specs`.
    """
    return self._maps(images, rng)

  def _maps(
    self, images: Float[Array, "b h w 3"], rng: Array | None, edit_stem: base.EditStem | None = None
  ) -> tuple[Float[Array, "b _h _w _c"], ...]:
    if self.config.whole_windows:
      check_patches(images.shape[1:3])
    x = self.patch_embed(images.astype(self.dtype))
    return stages.features(self.stages, x if edit_stem is None else edit_stem(x), rng)

  def attention_weights(self, images: Float[Array, "b h w 3"]) -> tuple[base.AttentionWeights, ...]:
    x, found = self.patch_embed(images.astype(self.dtype)), []
    for stage, spec in zip(self.stages, self.feature_specs, strict=True):
      for block in stage.blocks:
        weights, cells = block.attention_weights(x)
        found.append(base.AttentionWeights(weights, (cells + 0.5) * spec.stride))
        x = block(x)
      if stage.downsample is not None:
        x = stage.downsample(x)
    return tuple(found)

  def embed(self, images: Float[Array, "b h w 3"], *, rng: Array | None = None) -> Float[Array, "b c"]:
    """The final norm's output, averaged over positions."""
    return jnp.mean(self.norm(self(images, rng=rng)[-1]), axis=(1, 2))

  def final_features(
    self,
    images: Float[Array, "b h w 3"],
    *,
    rng: Array | None = None,
    edit_stem: base.EditStem | None = None,
  ) -> base.FinalFeatures:
    """The last stage's map after the final norm; see `Backbone.final_features`."""
    return base.FinalFeatures(self.norm(self._maps(images, rng, edit_stem)[-1]))

  @property
  def num_depths(self) -> int:
    return sum(self.config.depths) + 1

  def depth_of(self, path: str) -> int:
    return base.staged_depth(path, self.config.depths, stem="patch_embed")

  def feature_options(self) -> dict[str, Any]:
    return dict(
      window_sizes=list(self.config.window_sizes),
      pretrained_window_sizes=list(self.config.pretrained_window_sizes),
      padding="bottom-right zeros, then shift",
    )

  def fold(
    self,
    *,
    storage: str | None = None,
    dtype: Any = None,
    scan: bool = True,
    read: Callable[[str, nnx.Module], nnx.Module] | None = None,
    shardings: folded.FoldedSwinV2 | None = None,
  ) -> folded.FoldedSwinV2:
    return folded.fold(self, storage=storage, dtype=dtype, scan=scan, read=read, shardings=shardings)

  def stacked(self, *, remat: bool = True) -> folded.FoldedSwinV2:
    return folded.stacked(self, remat=remat)
