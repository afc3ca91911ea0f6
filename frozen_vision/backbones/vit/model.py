"""Plain vision transformers (arXiv 2010.11929) as one Flax NNX module; `config.VARIANTS` has the kinds.

The numbers follow the released code of each family; `tests/references/vit.py` runs timm's and transformers'
beside it. Random numbers are arguments: a call without `rng` is deterministic.
"""

from collections.abc import Callable, Mapping
import dataclasses
import re
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from frozen_vision.backbones.base import (
  AttentionWeights,
  Backbone,
  COMMON_SHARDING_RULES,
  EditStem,
  FinalFeatures,
  Preprocessing,
  ShardingRules,
)
from frozen_vision.backbones.vit import folded, positions, tokens
from frozen_vision.backbones.vit.config import ViTConfig
from frozen_vision.layers.activations import ACTIVATIONS, SwiGlu
from frozen_vision.layers.attention import attention
from frozen_vision.layers.mlp import linear, Mlp
from frozen_vision.layers.norms import LayerNorm
from frozen_vision.layers.patches import patches
from frozen_vision.layers.residual import drop_path, LayerScale
from frozen_vision.ops.arrays import Array

_IN_PREPROCESSING = ("mean", "std", "stride")  # feature keys have it beside the options


class FixedTable(nnx.Variable):
  """A table that checkpoints hold and nothing trains: sine positions, rotary periods."""


class PatchEmbedding(nnx.Module):
  """A convolution of stride `patch_size`, written as the matrix product it is."""

  def __init__(self, config: ViTConfig, *, dtype: Any, rngs: nnx.Rngs):
    self.patch_size = config.patch_size
    self.proj = linear(
      3 * config.patch_size**2, config.embed_dim, use_bias=config.patch_bias, dtype=dtype, rngs=rngs
    )

  def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b rows columns c"]:
    return self.proj(patches(images, self.patch_size))


class Attention(nnx.Module):
  """Multi-head self-attention; queries and keys of patches are turned where positions are rotary."""

  def __init__(self, config: ViTConfig, *, dtype: Any, rngs: nnx.Rngs):
    channels = config.embed_dim
    self.num_heads = config.num_heads
    self.qkv = linear(channels, 3 * channels, use_bias=False, dtype=dtype, rngs=rngs)
    for part in ("q", "k", "v"):
      has_bias = config.qkv_bias != "none" and part in config.qkv_bias
      setattr(self, f"{part}_bias", nnx.data(nnx.Param(jnp.zeros(channels)) if has_bias else None))
    self.proj = linear(channels, channels, dtype=dtype, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, "b n c"],
    rotary: tuple[Array, Array] | None = None,
    bias: Float[Array, "heads n n"] | None = None,
  ) -> Float[Array, "b n c"]:
    query, key, value = self._heads(x, rotary)
    return self.proj(attention(query, key, value, bias=bias).reshape(x.shape))

  def weights(
    self, x: Float[Array, "b n c"], rotary: tuple[Array, Array] | None, bias: Float[Array, "heads n n"] | None
  ) -> Float[Array, "b heads n n"]:
    """Softmax of the scores, float32: what `__call__` weighs values by."""
    query, key, _ = self._heads(x, rotary)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    return jax.nn.softmax(scores if bias is None else scores + bias, axis=-1)

  def _heads(
    self, x: Float[Array, "b n c"], rotary: tuple[Array, Array] | None
  ) -> tuple[Array, Array, Array]:
    """Queries, keys and values, [b, n, heads, d]."""
    query, key, value = jnp.split(self.qkv(x), 3, axis=-1)
    query, key, value = (
      tokens.split_heads(part if bias is None else part + bias[...].astype(x.dtype), self.num_heads)
      for part, bias in ((query, self.q_bias), (key, self.k_bias), (value, self.v_bias))
    )
    if rotary is not None:
      query, key = positions.rotate(query, *rotary), positions.rotate(key, *rotary)
    return query, key, value


class Block(nnx.Module):
  """x + scale(attention(norm(x))), then x + scale(mlp(norm(x)))."""

  def __init__(self, config: ViTConfig, drop_path: float, *, dtype: Any, rngs: nnx.Rngs):
    channels = config.embed_dim
    self.drop_path = drop_path

    def layer_scale():
      return LayerScale(channels, config.layer_scale_init) if config.layer_scale else None

    self.norm1 = LayerNorm(channels, epsilon=config.norm_epsilon, rngs=rngs)
    self.attn = Attention(config, dtype=dtype, rngs=rngs)
    self.scale1 = layer_scale()
    self.norm2 = LayerNorm(channels, epsilon=config.norm_epsilon, rngs=rngs)
    self.mlp = _mlp(config, dtype=dtype, rngs=rngs)
    self.scale2 = layer_scale()

  def __call__(
    self,
    x: Float[Array, "b n c"],
    rotary: tuple[Array, Array] | None,
    bias: Float[Array, "heads n n"] | None,
    rng: Array | None = None,
  ) -> Float[Array, "b n c"]:
    keys = (None, None) if rng is None or not self.drop_path else jax.random.split(rng)
    update = self.attn(self.norm1(x), rotary, bias)
    x = x + drop_path(_scaled(update, self.scale1), self.drop_path, keys[0])
    update = self.mlp(self.norm2(x))
    return x + drop_path(_scaled(update, self.scale2), self.drop_path, keys[1])


def _scaled(x: Float[Array, "..."], scale: LayerScale | None) -> Float[Array, "..."]:
  return x if scale is None else scale(x)


def _mlp(config: ViTConfig, *, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
  if config.mlp == "swiglu":
    return SwiGlu(config.embed_dim, config.mlp_dim, dtype=dtype, rngs=rngs)
  activation = ACTIVATIONS[config.activation]
  return Mlp(config.embed_dim, config.mlp_dim, activation=activation, dtype=dtype, rngs=rngs)


class AttentionPool(nnx.Module):
  """One learned query attends to all tokens, and an MLP follows (SigLIP's head)."""

  def __init__(self, config: ViTConfig, *, dtype: Any, rngs: nnx.Rngs):
    channels = config.embed_dim
    self.num_heads = config.num_heads
    self.probe = nnx.Param(0.02 * jax.random.normal(rngs.params(), (channels,)))
    self.query = linear(channels, channels, dtype=dtype, rngs=rngs)
    self.key_value = linear(channels, 2 * channels, dtype=dtype, rngs=rngs)
    self.proj = linear(channels, channels, dtype=dtype, rngs=rngs)
    self.norm = LayerNorm(channels, epsilon=config.norm_epsilon, rngs=rngs)
    self.mlp = _mlp(dataclasses.replace(config, mlp="mlp"), dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b c"]:
    b, _, channels = x.shape
    query = jnp.broadcast_to(self.query(self.probe[...].astype(x.dtype)), (b, 1, channels))
    key, value = jnp.split(self.key_value(x), 2, axis=-1)
    x = attention(*(tokens.split_heads(part, self.num_heads) for part in (query, key, value)))
    x = self.proj(x.reshape(b, channels))
    return x + self.mlp(self.norm(x))


class ViT(Backbone):
  """A plain ViT without its classifier or projection.

  Calling it gives the patch tokens of the tapped blocks as maps of one stride; `token_sequence` gives all
  tokens, `embed` one vector per image.
  """

  sharding_rules: ClassVar[ShardingRules] = COMMON_SHARDING_RULES + (
    (r"(.*/)?(positions|relative_positions|registers|prefix)", (-1,)),  # [positions, channels]
    (r"(.*/)?(q_bias|k_bias|v_bias|cls_token|probe)", (-1,)),
  )
  no_weight_decay: ClassVar[tuple[str, ...]] = (r"positions", r"registers")

  def __init__(self, config: ViTConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
    self.config = config
    self.dtype = dtype
    self.preprocessing = Preprocessing(config.mean, config.std, config.patch_size / config.cell_size)
    channels = config.embed_dim

    def table(*shape):
      return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))

    self.patch_embed = PatchEmbedding(config, dtype=dtype, rngs=rngs)
    self.cls_token = table(channels) if config.class_token else None
    self.registers = table(config.registers, channels) if config.registers else None
    stored = periods = relative = None
    match config.positions:
      case "learned":
        stored = table(config.position_grid**2 + config.class_token, channels)
      case "sine":
        sine = positions.sine_table(config.position_grid, channels)
        stored = FixedTable(jnp.asarray(np.pad(sine, ((int(config.class_token), 0), (0, 0)))))
      case "rotary":
        periods = FixedTable(jnp.asarray(positions.rotary_periods(config.rotary_base, config.head_dim)))
      case "relative":
        rows = positions.relative_rows(config.position_grid, config.class_token)
        relative = nnx.Param(jnp.zeros((rows, config.num_heads)))
    self.relative_positions = nnx.data(relative)
    self.positions, self.periods = nnx.data(stored), nnx.data(periods)
    self.pre_norm = LayerNorm(channels, epsilon=config.norm_epsilon, rngs=rngs) if config.pre_norm else None
    rates = np.linspace(0, config.drop_path_rate, config.depth).tolist()
    self.blocks = nnx.List([Block(config, rate, dtype=dtype, rngs=rngs) for rate in rates])
    self.norm = LayerNorm(channels, epsilon=config.norm_epsilon, rngs=rngs)
    pools = config.pooling == "attention"
    self.attention_pool = AttentionPool(config, dtype=dtype, rngs=rngs) if pools else None

  @property
  def embed_dim(self) -> int:
    return self.config.embed_dim

  @property
  def stem_channels(self) -> int:
    return self.config.embed_dim

  def __call__(
    self, images: Float[Array, "b h w 3"], *, rng: Array | None = None
  ) -> tuple[Float[Array, "b _h _w c"], ...]:
    taps, size = self._run(images, self.config.tapped_blocks, rng)
    if self.config.norm_taps:
      taps = [self.norm(tap) for tap in taps]
    return tuple(tokens.to_map(tap, size, self.config.prefix_tokens) for tap in taps)

  def token_sequence(
    self, images: Float[Array, "b h w 3"], *, rng: Array | None = None
  ) -> Float[Array, "b n c"]:
    """All tokens after the last block and the final norm: class token, registers, patches row by row."""
    [last], _ = self._run(images, (self.config.depth - 1,), rng)
    return self.norm(last)

  def final_features(
    self, images: Float[Array, "b h w 3"], *, rng: Array | None = None, edit_stem: EditStem | None = None
  ) -> FinalFeatures:
    """Patches and class token after the final norm; see `Backbone.final_features`."""
    [last], size = self._run(images, (self.config.depth - 1,), rng, edit_stem)
    return tokens.final_features(self.norm(last), size, self.config)

  def embed(self, images: Float[Array, "b h w 3"], *, rng: Array | None = None) -> Float[Array, "b c"]:
    """The normed class token, or what the learned query attends to (`ViTConfig.pooling`).

    Projections of CLIP into the space of texts are not part of the backbone.
    """
    x = self.token_sequence(images, rng=rng)
    return x[:, 0] if self.attention_pool is None else self.attention_pool(x)

  def _run(
    self,
    images: Float[Array, "b h w 3"],
    taps: tuple[int, ...],
    rng: Array | None,
    edit_stem: EditStem | None = None,
  ) -> tuple[list[Float[Array, "b n c"]], tuple[int, int]]:
    """Outputs of some blocks, and rows and columns of the patches."""
    x, rotary, bias, size = self._enter(images, edit_stem)
    outputs = []
    for index, block in enumerate(self.blocks[: taps[-1] + 1]):
      x = block(x, rotary, bias, None if rng is None else jax.random.fold_in(rng, index))
      if index in taps:
        outputs.append(x)
    return outputs, size

  def attention_weights(self, images: Float[Array, "b h w 3"]) -> tuple[AttentionWeights, ...]:
    x, rotary, bias, size = self._enter(images)
    grid = np.stack(np.meshgrid(*(np.arange(length) for length in size), indexing="ij"), axis=-1)
    centres = (grid.reshape(-1, 2) + 0.5) * self.config.cell_size
    without = np.full((self.config.prefix_tokens, 2), np.nan)
    places = np.concatenate([without, centres]).astype(np.float32)[None]
    found = []
    for block in self.blocks:
      found.append(AttentionWeights(block.attn.weights(block.norm1(x), rotary, bias)[:, None], places))
      x = block(x, rotary, bias)
    return tuple(found)

  def _enter(
    self, images: Float[Array, "b h w 3"], edit_stem: EditStem | None = None
  ) -> tuple[
    Float[Array, "b n c"],
    tuple[Array, Array] | None,
    Float[Array, "heads n n"] | None,
    tuple[int, int],
  ]:
    """Tokens that enter the first block; rotary angles, biases of positions; rows and columns of patches."""
    x = self.patch_embed(tokens.align_to_stride(images, self.config).astype(self.dtype))
    if edit_stem is not None:
      x = edit_stem(x)
    size = x.shape[1:3]
    x = self._prefixed(x.reshape(x.shape[0], -1, self.config.embed_dim), size)
    if self.pre_norm is not None:
      x = self.pre_norm(x)
    rotary = bias = None
    if self.relative_positions is not None:
      bias = tokens.relative_bias(self.relative_positions[...], size, self.config)
    if self.periods is not None:
      angles = positions.rotary_angles(self.periods[...], size)
      rotary = (jnp.cos(angles), jnp.sin(angles))
    return x, rotary, bias, size

  def _prefixed(self, x: Float[Array, "b n c"], size: tuple[int, int]) -> Float[Array, "b _ c"]:
    """Adds positions, and puts class token and registers in front."""
    config, parts = self.config, []
    table = None if self.positions is None else self.positions[...].astype(jnp.float32)
    first = int(config.class_token)
    if config.class_token:
      token = self.cls_token[...] if table is None else self.cls_token[...] + table[0]
      parts.append(token[None])
    if self.registers is not None:
      parts.append(self.registers[...])
    if table is not None:
      resized = positions.resize_table(table[first:], config.position_grid, size, config.position_resize)
      x = x + resized.astype(x.dtype)
    return tokens.with_prefix(x, jnp.concatenate(parts)) if parts else x

  @property
  def num_depths(self) -> int:
    return self.config.depth + 1

  def depth_of(self, path: str) -> int:
    block = re.match(r"blocks/(\d+)/", path)
    if block:
      return int(block[1]) + 1
    return self.num_depths if re.match(r"(norm|attention_pool)/", path) else 0

  def feature_options(self) -> Mapping[str, Any]:
    options = dataclasses.asdict(self.config) | dict(family="vit", taps=self.config.tapped_blocks)
    for name in ("layer_scale_init", "drop_path_rate", *_IN_PREPROCESSING):
      del options[name]
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}

  def fold(
    self,
    *,
    storage: str | None = None,
    dtype: Any = None,
    scan: bool = True,
    read: Callable[[str, nnx.Module], nnx.Module] | None = None,
    shardings: Any = None,
  ) -> folded.FoldedViT:
    return folded.fold(self, storage=storage, dtype=dtype, scan=scan, read=read, shardings=shardings)

  def stacked(self, *, remat: bool = True) -> folded.FoldedViT:
    return folded.stacked(self, remat=remat)
