"""How alike each cell of a frame is to the cells around it in later frames."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from frozen_vision.ops.arrays import Array


def to_later_frames(
  features: Float[Array, "b t h w c"], radius: int, lags: Sequence[int] = (1,)
) -> Float[Array, "b t h w n"]:
  """Cosine similarities of every cell with its neighbourhood in frames that follow.

  The part of self-similarity in space and time (arXiv 2102.07092) that looks ahead; the correlation layer of
  FlowNet (arXiv 1504.06852) on unit vectors. Vectors are taken less their frame's mean, which is most of
  what cells of a backbone's map share. Float32.

  Whole rows are multiplied with whole rows, and the neighbours picked from the products: more arithmetic than
  the similarities need, but matrix products, and nothing larger than a few rows' worth per cell.

  Args:
    features: maps of frames in order.
    radius: in cells; the neighbourhood is a square of 2 radius + 1 cells.
    lags: how many frames ahead, 1 or more each.

  Returns:
    n = len(lags) x (2 radius + 1)^2 similarities from -1 to 1 per cell: lag by lag, and there row by row from
    the top left neighbour; 0 for neighbours outside of the map and frames beyond the last.
  """
  x = features.astype(jnp.float32)
  x = x - x.mean((2, 3), keepdims=True)
  # Added, unlike the far smaller floor of cosine attention: what rounding leaves of an even map, such as a
  # black frame's, points nowhere and must not become unit vectors.
  x = x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
  t, h, w = x.shape[1:4]
  offsets = np.arange(-radius, radius + 1)
  columns = np.arange(w)
  pick = jnp.asarray(columns[:, None, None] + offsets == columns[:, None], jnp.float32)
  found = []
  for lag in (min(lag, t) for lag in lags):
    later = jnp.pad(x[:, lag:], ((0, 0), (0, 0), (radius, radius), (0, 0), (0, 0)))
    for row in range(len(offsets)):
      products = jnp.einsum("bthjc,bthkc->bthjk", x[:, : t - lag], later[:, :, row : row + h])
      ahead = jnp.einsum("bthjk,jkn->bthjn", products, pick)
      found.append(jnp.pad(ahead, ((0, 0), (0, lag), (0, 0), (0, 0), (0, 0))))
  return jnp.concatenate(found, axis=-1)
