"""Transformer decoder of Mask2Former (Cheng et al. 2022, 3.2): queries that look inside their own masks."""

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from frozen_vision.heads.mask2former import layers
from frozen_vision.heads.mask2former.config import Mask2FormerConfig
from frozen_vision.heads.mask2former.pixel_decoder import PixelFeatures
from frozen_vision.ops.arrays import Array
from frozen_vision.ops.resize import resize_bilinear


class Predictions(NamedTuple):
  """All predictions of one pass: one from the initial queries, then one per layer.

  Masks are kept as factors; `mask_logits` multiplies out the prediction that is wanted.
  """

  class_logits: Array  # float32 [p, b, q, num_classes + 1]; the last class is "no object"
  mask_embeddings: Array  # [p, b, q, mask_dim]
  mask_features: Array  # [b, h, w, mask_dim]

  @property
  def factors(self) -> Array:
    """See `criterion.MaskPredictions`."""
    return self.mask_embeddings

  def multiplied(self, factors: Float[Array, "b n c"]) -> Float[Array, "b n h w"]:
    """Mask logits of some of the queries of one prediction, float32."""
    return mask_logits(factors, self.mask_features)

  def mask_logits(self, index: int) -> Float[Array, "b q h w"]:
    """Mask logits of prediction `index`, float32, of the finest level's size."""
    return mask_logits(self.mask_embeddings[index], self.mask_features)


def mask_logits(
  embeddings: Float[Array, "b q c"], features: Float[Array, "b h w c"]
) -> Float[Array, "b q h w"]:
  """Logit of every query's mask at every pixel, float32."""
  return jnp.einsum("bqc,bhwc->bqhw", embeddings, features, preferred_element_type=jnp.float32)


class DecoderLayer(nnx.Module):
  """Masked cross-attention, self-attention and a feed-forward network, each with its norm after it."""

  def __init__(self, config: Mask2FormerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
    def attention():
      return layers.Attention(config.hidden_dim, config.num_heads, dtype=dtype, rngs=rngs)

    self.cross_attention, self.self_attention = attention(), attention()
    self.ffn = layers.FeedForward(config.hidden_dim, config.decoder_ffn_dim, dtype=dtype, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, "b q c"],
    query_positions: Float[Array, "q c"],
    memory: Float[Array, "b s c"],
    memory_positions: Float[Array, "s c"],
    blocked: Bool[Array, "b q s"],
  ) -> Float[Array, "b q c"]:
    x = self.cross_attention(x, query_positions, memory + memory_positions, memory, blocked)
    return self.ffn(self.self_attention(x, query_positions, x + query_positions, x))


class TransformerDecoder(nnx.Module):
  """Learned queries -> classes and mask embeddings, after every layer."""

  def __init__(self, config: Mask2FormerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
    self.dtype = dtype
    channels = config.hidden_dim

    def embedding(rows):
      return nnx.Param(jax.random.normal(rngs.params(), (rows, channels)))

    self.query_features = embedding(config.num_queries)
    self.query_positions = embedding(config.num_queries)
    self.level_embed = embedding(config.encoder_levels)
    self.layers = nnx.List(
      [DecoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.decoder_layers)]
    )
    self.norm = layers.layer_norm(channels, dtype=dtype, rngs=rngs)
    self.classes = layers.default_linear(channels, config.num_classes + 1, dtype=dtype, rngs=rngs)
    sizes = (channels, channels, channels, config.mask_dim)
    self.mask_mlp = nnx.List(
      [layers.default_linear(i, o, dtype=dtype, rngs=rngs) for i, o in zip(sizes[:-1], sizes[1:])]
    )

  def __call__(self, features: PixelFeatures) -> Predictions:
    """See Predictions. No mask is multiplied out at its full size here."""
    levels = features.levels
    b, _, _, channels = levels[0].shape
    memories = [
      level.reshape(b, -1, channels) + jnp.asarray(self.level_embed[i], self.dtype)
      for i, level in enumerate(levels)
    ]
    memory_positions = [
      layers.sine_positions(*level.shape[1:3], channels).astype(self.dtype) for level in levels
    ]
    # A resized mask is a mask of resized features: resizing is linear. This way it is done once per level.
    fixed = jax.lax.stop_gradient(features.masks.astype(jnp.float32))
    coarse_features = [resize_bilinear(fixed, level.shape[1:3]) for level in levels]
    query_positions = jnp.asarray(self.query_positions[...], self.dtype)
    x = jnp.broadcast_to(jnp.asarray(self.query_features[...], self.dtype), (b, *self.query_features.shape))
    states = [x]
    for i, layer in enumerate(self.layers):
      level = i % len(levels)
      blocked = self._blocked(x, coarse_features[level])
      # Attention over the largest level is much larger than what goes in and comes out.
      x = jax.checkpoint(layer.__call__)(
        x, query_positions, memories[level], memory_positions[level], blocked
      )
      states.append(x)
    states = self.norm(jnp.stack(states))
    classes = self.classes(states).astype(jnp.float32)
    return Predictions(classes, self._mask_embeddings(states), features.masks)

  def _mask_embeddings(self, states: Float[Array, "*shape c"]) -> Float[Array, "*shape d"]:
    for linear in self.mask_mlp[:-1]:
      states = nnx.relu(linear(states))
    return self.mask_mlp[-1](states)

  def _blocked(
    self, x: Float[Array, "b q c"], coarse_features: Float[Array, "b h w mask_dim"]
  ) -> Bool[Array, "b q h*w"]:
    """Cells where the mask of a query's state is off; none for a query whose mask is off everywhere."""
    embeddings = jax.lax.stop_gradient(self._mask_embeddings(self.norm(x)))
    logits = mask_logits(embeddings.astype(jnp.float32), coarse_features)
    blocked = jax.nn.sigmoid(logits.reshape(*logits.shape[:2], -1)) < 0.5
    return blocked & ~blocked.all(axis=-1, keepdims=True)
