"""Multi-head attention whose scores are never all in memory at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from frozen_vision.devices import sharding
from frozen_vision.ops.arrays import Array

# Scores of all images and heads of a device that are computed at once, in bytes of float32.
_SCORE_BYTES = 2**28


def attention(
  query: Float[Array, "b q heads d"],
  key: Float[Array, "b k heads d"],
  value: Float[Array, "b k heads d"],
  *,
  scale: float | None = None,
  bias: Float[Array, "heads q k"] | None = None,
) -> Float[Array, "b q heads d"]:
  """Softmax attention; scores and softmax are float32.

  Long sequences are attended to in chunks of queries: 9,216 tokens of 16 heads would have 5.4 GB of scores
  per image. A chunk's scores are computed again for its gradient.

  Args:
    scale: of the scores; 1 / sqrt(d) by default.
    bias: added to the scaled scores of every example.

  Returns:
    In the queries' dtype.
  """
  b, length, heads, d = query.shape
  images = max(b // sharding.num_devices(), 1)
  score_bytes = 4 * images * heads * length * key.shape[1]
  chunks = -(-score_bytes // _SCORE_BYTES)
  if chunks <= 1:
    bias = None if bias is None else bias[None]
    return jax.nn.dot_product_attention(query, key, value, bias, scale=scale)
  size = -(-length // chunks)
  chunks = -(-length // size)
  rest = chunks * size - length
  padded = jnp.pad(query, ((0, 0), (0, rest), (0, 0), (0, 0)))
  parts = padded.reshape(b, chunks, size, heads, d).swapaxes(0, 1)
  biases = None
  if bias is not None:
    biases = jnp.pad(bias, ((0, 0), (0, rest), (0, 0))).reshape(heads, chunks, 1, size, -1)
    biases = jnp.moveaxis(biases, 0, 2)

  @jax.checkpoint
  def attend(part):
    return jax.nn.dot_product_attention(part[0], key, value, part[1], scale=scale)

  out = jax.lax.map(attend, (parts, biases))
  return out.swapaxes(0, 1).reshape(b, chunks * size, heads, d)[:, :length]
