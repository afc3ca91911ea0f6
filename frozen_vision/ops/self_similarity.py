"""How alike each cell of a frame is to the cells around it in the next one."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def to_next_frame(features: Float[Array, "b t h w c"], radius: int) -> Float[Array, "b t h w n"]:
  """Cosine similarities of every cell with its neighbourhood in the frame that follows.

  The part of self-similarity in space and time (arXiv 2102.07092) that reaches one frame ahead; the
  correlation layer of FlowNet (arXiv 1504.06852) on unit vectors. Vectors are taken less their frame's mean,
  which is most of what cells of a backbone's map share. Float32.

  Args:
    features: maps of frames in order.
    radius: in cells; the neighbourhood is a square of 2 radius + 1 cells.

  Returns:
    n = (2 radius + 1)^2 similarities from -1 to 1 per cell, row by row from the top left neighbour; 0 for
    neighbours outside of the map, and everywhere in the last frame, which none follows.
  """
  x = features.astype(jnp.float32)
  x = x - x.mean((2, 3), keepdims=True)
  x = x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
  h, w = x.shape[2:4]
  following = jnp.pad(x[:, 1:], ((0, 0), (0, 1), (radius, radius), (radius, radius), (0, 0)))
  side = range(2 * radius + 1)
  return jnp.stack(
      [jnp.sum(x * following[:, :, i:i + h, j:j + w], axis=-1) for i in side for j in side], axis=-1)
