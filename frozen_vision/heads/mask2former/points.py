"""Masks compared at points (PointRend, Kirillov et al. 2020): sampling maps and labels, choosing points."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Integer
import numpy as np

from frozen_vision.ops import select
from frozen_vision.ops.arrays import Array

_CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))  # (row, column)


def _corners(points: Float[Array, "*s 2"], height: int, width: int) -> list[tuple[jax.Array, jax.Array]]:
  """(index into the flattened map, weight) of the four cells around each point; zero outside."""
  position = points * np.asarray([width, height], np.float32) - 0.5
  low = jnp.floor(position)
  fraction = position - low
  corners = []
  for row, column in _CORNERS:
    x, y = low[..., 0] + column, low[..., 1] + row
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    weight = jnp.abs(1 - column - fraction[..., 0]) * jnp.abs(1 - row - fraction[..., 1])
    index = jnp.clip(y, 0, height - 1).astype(jnp.int32) * width + jnp.clip(x, 0, width - 1).astype(jnp.int32)
    corners.append((jnp.clip(index, 0, height * width - 1), jnp.where(inside, weight, 0.0)))
  return corners


def sample_maps(maps: Float[Array, "*s h w"], points: Float[Array, "*s n 2"]) -> Float[Array, "*s n"]:
  """Bilinear samples of each map at its own points: `grid_sample` with align_corners=False and zero padding.

  Args:
    maps: float32.
    points: (x, y) as fractions of the map's width and height.
  """
  flat = maps.reshape(*maps.shape[:-2], -1)

  def take(index):
    return jnp.take_along_axis(flat, index, axis=-1, mode="promise_in_bounds")

  return sum(take(index) * weight for index, weight in _corners(points, *maps.shape[-2:]))


def sample_shared(maps: Float[Array, "b h w q"], points: Float[Array, "b n 2"]) -> Float[Array, "b n q"]:
  """The same for maps that share their points, and lie side by side in the last axis."""
  b, h, w, q = maps.shape
  flat = maps.reshape(b, h * w, q)
  take = jax.vmap(lambda rows, index: rows.at[index].get(mode="promise_in_bounds"))
  return sum(take(flat, index) * weight[..., None] for index, weight in _corners(points, h, w))


def sample_segments(
  labels: Integer[Array, "b h w"], segment_labels: Integer[Array, "b s"], points: Float[Array, "b #s n 2"]
) -> Float[Array, "b s n"]:
  """Bilinear samples of the masks `labels == segment_labels[:, i]`, which are never built.

  Args:
    labels: label maps; a value that is no segment's, such as 255 for ignored pixels, belongs to no mask.
    segment_labels: class of each segment.
    points: as in `sample_maps`, of every segment; s = 1 there shares the points among all segments.
  """
  flat = labels.reshape(labels.shape[0], 1, -1)

  def take(index):
    return jnp.take_along_axis(flat, index, axis=-1, mode="promise_in_bounds")

  def same(index):
    return take(index).astype(jnp.int32) == segment_labels.astype(jnp.int32)[..., None]

  return sum(jnp.where(same(index), weight, 0.0) for index, weight in _corners(points, *labels.shape[1:]))


def choose_points(
  maps: Float[Array, "b s h w"],
  candidates: Float[Array, "b s c 2"],
  others: Float[Array, "b s o 2"],
  num_important: int,
) -> Float[Array, "b s n 2"]:
  """The `num_important` candidates where the logits are nearest to zero, and all `others`."""
  if not num_important:
    return others
  certainty = jnp.abs(sample_maps(maps, candidates))
  uncertain = select.indices(select.smallest(certainty, num_important), num_important)
  important = jnp.take_along_axis(candidates, uncertain[..., None], axis=2)
  return jnp.concatenate([important, others], axis=2)
