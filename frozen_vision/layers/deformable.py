"""Deformable attention as a layer (Deformable DETR, Zhu et al. 2021): queries choose where they look."""

from collections.abc import Sequence

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float
import numpy as np

from frozen_vision.ops.arrays import Array
from frozen_vision.ops.deformable_attention import deformable_attention

_SAMPLED = "deformable_sampled"
# What `jax.checkpoint` keeps of a block next to its input: sampling again would cost as much as the rest.
SAVE_SAMPLED = jax.checkpoint_policies.save_only_these_names(_SAMPLED)


class DeformableAttention(nnx.Module):
  """Each head reads a few points of every level, at offsets and with weights that are linear in the query."""

  def __init__(
    self,
    channels: int,
    num_heads: int,
    *,
    num_levels: int,
    num_points: int,
    value_channels: int | None = None,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    """Builds the layer.

    Args:
      channels: of queries, of the levels and of the result.
      num_heads: must divide `value_channels`.
      num_levels, num_points: levels that are read, and points of each that a head reads.
      value_channels: of what is sampled, all heads together; `channels` by default.
      dtype: of the projections of values and result. Offsets and weights are float32: bfloat16 cannot tell
        neighbouring cells of a map of 160 apart.

    Raises:
      ValueError: the heads do not divide the channels of the values.
    """
    value_channels = value_channels or channels
    if value_channels % num_heads:
      raise ValueError(
        f"Deformable attention: {value_channels} channels of values do not divide into {num_heads} heads."
      )
    self.num_heads, self.num_points = num_heads, num_points
    samples = num_heads * num_levels * num_points
    zeros = nnx.initializers.zeros
    self.offsets = nnx.Linear(channels, 2 * samples, kernel_init=zeros, rngs=rngs)
    self.offsets.bias[...] = _ring(num_heads, num_levels, num_points).reshape(-1)
    self.weights = nnx.Linear(channels, samples, kernel_init=zeros, rngs=rngs)
    xavier = nnx.initializers.xavier_uniform()
    self.value = nnx.Linear(channels, value_channels, dtype=dtype, kernel_init=xavier, rngs=rngs)
    self.output = nnx.Linear(value_channels, channels, dtype=dtype, kernel_init=xavier, rngs=rngs)

  def attend(
    self,
    queries: Float[Array, "b q c"],
    cells: Float[Array, "b s c"],
    references: Float[np.ndarray, "q 2"],
    shapes: Sequence[tuple[int, int]],
  ) -> Float[Array, "b q c"]:
    """Samples the values around the points of each query, and projects their sum.

    Args:
      queries: decide where to sample, and how much each sample counts.
      cells: of all levels, row by row, one level after the other.
      references: (x, y) that each query's offsets are counted from, as fractions of a level's sides.
      shapes: (height, width) of each level.
    """
    b, number, _ = queries.shape
    queries = queries.astype(jnp.float32)
    split = (b, number, self.num_heads, len(shapes), self.num_points)
    sizes = np.asarray(shapes, np.float32)[:, None, ::-1]  # an offset of one is one cell of the level sampled
    locations = references[:, None, None, None] + self.offsets(queries).reshape(*split, 2) / sizes
    weights = jax.nn.softmax(self.weights(queries).reshape(*split[:3], -1), axis=-1).reshape(split)
    values = self.value(cells).reshape(b, cells.shape[1], self.num_heads, -1)
    sampled = checkpoint_name(deformable_attention(values, shapes, locations, weights), _SAMPLED)
    return self.output(sampled.reshape(b, number, -1))


def cell_centres(height: int, width: int) -> Float[np.ndarray, "s 2"]:
  """(x, y) of every cell's centre as fractions of the map's width and height, row by row."""
  y, x = np.mgrid[:height, :width]
  centres = (np.stack([x, y], axis=-1) + 0.5) / np.asarray([width, height])
  return centres.reshape(-1, 2).astype(np.float32)


def _ring(heads: int, levels: int, points: int) -> Float[np.ndarray, "heads levels points 2"]:
  """Initial offsets [Deformable DETR]: each head looks in its own direction, one point behind the other."""
  angle = np.arange(heads) * (2 * np.pi / heads)
  direction = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
  direction /= np.abs(direction).max(axis=-1, keepdims=True)
  distance = np.arange(1, points + 1)
  ring = direction[:, None, None] * distance[:, None]
  return np.broadcast_to(ring, (heads, levels, points, 2)).astype(np.float32)
