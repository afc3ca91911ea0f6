"""Multi-scale deformable attention (Deformable DETR, Zhu et al. 2021, eq. 3): the sampling core.

Every query reads a few points of every level, at places it chose itself, and sums them with its own weights.
A sample is bilinear, between the centres of four cells. To read it as one row and not as four, each level is
rearranged so that the row of a cell also holds its right, lower and lower right neighbours: a quarter of the
gathers, a quarter of the scattered rows in the gradient, and with 32 channels per head a row fills the 128
lanes of a TPU. Heads are a loop, whose body is computed again in the gradient, so the samples of one head are
in memory at once.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int
import numpy as np

from frozen_vision.ops.arrays import Array


def deformable_attention(
  values: Float[Array, "b s heads d"],
  shapes: Sequence[tuple[int, int]],
  locations: Float[Array, "b q heads levels points 2"],
  weights: Float[Array, "b q heads levels points"],
) -> Float[Array, "b q heads d"]:
  """Weighted sums of bilinear samples, as `grid_sample` gives them with zero padding and align_corners=False.

  Args:
    values: the cells of all levels, row by row, one level after the other.
    shapes: (height, width) of each level; s is the sum of their areas.
    locations: (x, y) of each sample as a fraction of the level's width and height: 0 is the outer edge of the
      first cell, 1 the outer edge of the last. What lies outside counts as zero.
    weights: of the samples; the caller's softmax makes them sum to one over levels and points.

  Returns:
    float32, as the arithmetic is, whatever the dtype of `values`. Gradients flow to values, locations and
    weights.

  Raises:
    ValueError: the arrays do not fit together.
  """
  shapes = tuple((int(height), int(width)) for height, width in shapes)
  _check(values, shapes, locations, weights)
  per_head = (
    jnp.moveaxis(values.astype(jnp.float32), 2, 0),
    jnp.moveaxis(locations.astype(jnp.float32), 2, 0),
    jnp.moveaxis(weights.astype(jnp.float32), 2, 0),
  )

  @jax.checkpoint
  def attend(values, locations, weights):
    table = _corner_table(values, shapes)
    rows, corner_weights = _samples(shapes, locations)
    corners = jax.vmap(lambda table, rows: table.at[rows].get(mode="promise_in_bounds"))(table, rows)
    corners = corners.reshape(*rows.shape, 4, -1)
    # Multiplied and summed, not a matrix product: those round float32 to bfloat16 on a TPU.
    return jnp.sum(corners * (corner_weights * weights[..., None])[..., None], axis=(2, 3, 4))

  return jnp.moveaxis(jax.lax.map(lambda head: attend(*head), per_head), 0, 2)


def _corner_table(
  values: Float[Array, "b s d"], shapes: Sequence[tuple[int, int]]
) -> Float[Array, "b rows d*4"]:
  """Row (y + 1) * (w + 1) + x + 1 of a level: cells (y, x), (y, x+1), (y+1, x), (y+1, x+1), zero outside."""
  tables, start = [], 0
  for height, width in shapes:
    level = values[:, start : start + height * width].reshape(-1, height, width, values.shape[-1])
    level = jnp.pad(level, ((0, 0), (1, 1), (1, 1), (0, 0)))
    corners = (level[:, :-1, :-1], level[:, :-1, 1:], level[:, 1:, :-1], level[:, 1:, 1:])
    table = jnp.concatenate(corners, axis=-1)
    tables.append(table.reshape(table.shape[0], -1, table.shape[-1]))
    start += height * width
  return jnp.concatenate(tables, axis=1)


def _samples(
  shapes: Sequence[tuple[int, int]], locations: Float[Array, "b q levels points 2"]
) -> tuple[Int[Array, "b q levels points"], Float[Array, "b q levels points 4"]]:
  """Row of the table that each sample reads, and the bilinear weights of the four cells in it."""
  sizes = np.asarray(shapes, np.int32)[:, ::-1]  # (width, height), as locations have (x, y)
  offsets = np.concatenate([[0], np.cumsum((sizes + 1).prod(1))[:-1]]).astype(np.int32)
  sizes, offsets = sizes[:, None], offsets[:, None]
  position = locations * sizes.astype(np.float32) - 0.5
  low = jnp.floor(position)
  fraction = position - low
  inside = jnp.all((low >= -1) & (low < sizes), axis=-1)
  # What a NaN becomes as an integer is undefined: the second clip keeps the read in bounds.
  cell = jnp.clip(jnp.clip(low, -1, sizes - 1).astype(jnp.int32), -1, sizes - 1) + 1
  rows = offsets + cell[..., 1] * (sizes[..., 0] + 1) + cell[..., 0]
  x, y = fraction[..., 0], fraction[..., 1]
  weights = jnp.stack([(1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y], axis=-1)
  return rows, jnp.where(inside[..., None], weights, 0.0)


def _check(values: Array, shapes: tuple, locations: Array, weights: Array) -> None:
  cells = sum(height * width for height, width in shapes)
  if values.ndim != 4 or values.shape[1] != cells:
    raise ValueError(
      f"deformable_attention got values of shape {tuple(values.shape)} for levels of sizes {shapes}; "
      f"expected [b, {cells}, heads, d]."
    )
  b, _, heads, _ = values.shape
  expected = (b, locations.shape[1], heads, len(shapes))
  if locations.ndim != 6 or locations.shape[:4] != expected or locations.shape[-1] != 2:
    raise ValueError(
      f"deformable_attention got locations of shape {tuple(locations.shape)}; expected [{b}, q, {heads}, "
      f"{len(shapes)}, points, 2] for values of shape {tuple(values.shape)} and levels of sizes {shapes}."
    )
  if weights.shape != locations.shape[:-1]:
    raise ValueError(
      f"deformable_attention got weights of shape {tuple(weights.shape)}; expected "
      f"{tuple(locations.shape[:-1])}, one per location."
    )
