"""Building blocks of both decoders: initial values, position embedding, feed-forward network, attention."""

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float
import numpy as np

from frozen_vision.ops.arrays import Array

XAVIER = nnx.initializers.xavier_uniform()
# PyTorch initialises query, key and value projections as one matrix [d, 3 d].
XAVIER_QKV = nnx.initializers.variance_scaling(0.5, "fan_avg", "uniform")
# Detectron2's c2_xavier_fill.
XAVIER_FAN_IN = nnx.initializers.variance_scaling(1.0, "fan_in", "uniform")
EPSILON = 1e-5  # of norms; PyTorch's default


def default_linear(features_in: int, features_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
  """A Linear with PyTorch's default initial values: uniform within 1 / sqrt(features_in), biases too."""
  bound = features_in**-0.5

  def uniform(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return nnx.Linear(features_in, features_out, dtype=dtype, kernel_init=uniform, bias_init=uniform, rngs=rngs)


def layer_norm(channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
  return nnx.LayerNorm(channels, epsilon=EPSILON, use_fast_variance=False, dtype=dtype, rngs=rngs)


def sine_positions(height: int, width: int, channels: int) -> Float[Array, "n c"]:
  """Position embedding [height * width, channels] of a map: rows in the first half, columns in the second.

  DETR's, normalised: positions count from 1 and are scaled to 2 pi; wave lengths grow geometrically to 10000.
  A program holds the waves along both sides as constants, not the map.
  """
  half = channels // 2
  period = np.float32(10000) ** (2 * (np.arange(half) // 2) / half).astype(np.float32)

  def waves(length: int) -> np.ndarray:
    position = np.arange(1, length + 1, dtype=np.float32) / np.float32(length + 1e-6) * np.float32(2 * np.pi)
    angle = position[:, None] / period
    return np.where(np.arange(half) % 2 == 0, np.sin(angle), np.cos(angle)).astype(np.float32)

  rows = jnp.broadcast_to(waves(height)[:, None], (height, width, half))
  columns = jnp.broadcast_to(waves(width)[None], (height, width, half))
  return jnp.concatenate([rows, columns], axis=-1).reshape(height * width, channels)


class FeedForward(nnx.Module):
  """Two layers with a ReLU between them, added to their input, then a norm."""

  def __init__(self, channels: int, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    self.hidden = nnx.Linear(channels, hidden, dtype=dtype, kernel_init=XAVIER, rngs=rngs)
    self.output = nnx.Linear(hidden, channels, dtype=dtype, kernel_init=XAVIER, rngs=rngs)
    self.norm = layer_norm(channels, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
    return self.norm(x + self.output(nnx.relu(self.hidden(x))))


class Attention(nnx.Module):
  """Multi-head attention, added to its queries, then a norm."""

  def __init__(self, channels: int, num_heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    self.num_heads = num_heads

    def linear(init):
      return nnx.Linear(channels, channels, dtype=dtype, kernel_init=init, rngs=rngs)

    self.query, self.key, self.value = linear(XAVIER_QKV), linear(XAVIER_QKV), linear(XAVIER_QKV)
    self.output = linear(XAVIER)
    self.norm = layer_norm(channels, dtype=dtype, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, "b q c"],
    positions: Float[Array, "q c"],
    keys: Float[Array, "b s c"],
    values: Float[Array, "b s c"],
    blocked: Bool[Array, "b q s"] | None = None,
  ) -> Float[Array, "b q c"]:
    """Attends from x + positions to `keys`; pairs in `blocked` have no weight. The softmax is float32."""

    def split(y):
      return y.reshape(*y.shape[:2], self.num_heads, -1)

    queries, keys, values = split(self.query(x + positions)), split(self.key(keys)), split(self.value(values))
    scores = jnp.einsum("bqhd,bshd->bhqs", queries, keys, preferred_element_type=jnp.float32)
    scores = scores * np.float32(queries.shape[-1] ** -0.5)
    if blocked is not None:
      scores = jnp.where(blocked[:, None], -jnp.inf, scores)
    attention = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    attended = jnp.einsum("bhqs,bshd->bqhd", attention, values)
    return self.norm(x + self.output(attended.reshape(*x.shape)))
