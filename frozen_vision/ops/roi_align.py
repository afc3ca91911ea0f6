"""RoIAlign (Mask R-CNN, section 3) over a pyramid: exact adaptive sampling with static shapes.

A bin's value is the mean of bilinear samples on a regular grid inside it. Bilinear weights are a
product of a row and a column factor, so a roi is `rows [s, cells] @ features [cells, cells, c] @
columns [cells, s]`. Only the cells that a roi touches are read, in square tiles: a roi needs one
tile or hundreds, so a loop with a dynamic trip count adds the tiles up, and rois are visited in
order of that count to keep the rois of one step alike. Any roi is therefore exact, memory does not
depend on the size of rois, and time grows with the area they cover.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int
import numpy as np

from frozen_vision.ops import boxes as box_ops
from frozen_vision.ops import select
from frozen_vision.ops.arrays import Array

_TILE = 16  # cells per side of a tile of features


def assign_levels(
  rois: Float[Array, "*shape 4"], num_levels: int, finest_scale: float = 56
) -> Int[Array, "*shape"]:
  """Pyramid level of each roi (FPN, eq. 1): floor(log2(sqrt(area) / finest_scale + 1e-6)), clamped.

  The form of mmdet 3.x: with finest_scale 56, rois of up to 112 pixels take level 0.
  """
  scale = jnp.sqrt(box_ops.area(rois))
  level = jnp.floor(jnp.log2(scale / finest_scale + 1e-6))
  return jnp.clip(level, 0, num_levels - 1).astype(jnp.int32)


def roi_align(
  features: tuple[Float[Array, "b _h _w c"], ...],
  rois: Float[Array, "b n 4"],
  *,
  strides: tuple[int, ...],
  output_size: int,
  sampling_ratio: int | None,
  levels: Int[Array, "b n"] | None = None,
  max_samples: int | None = None,
  chunk: int = 64,
) -> Float[Array, "b n output_size output_size c"]:
  """Crops each roi from its pyramid level to output_size x output_size bins.

  Half-pixel aligned (`aligned=True`): input pixel x lies at x / stride - 0.5 in a map. A sample
  beyond -1 or beyond the map's size counts as zero; one between there and the outer cell centres
  takes the outer cell (mmcv, torchvision).

  Args:
    features: pyramid levels, any sizes, one number of channels; levels share batch and dtype.
    rois: xyxy in input pixels. A roi of zero area gives the features at its point, never NaN; an
      inverted one is taken as empty at (x1, y1).
    strides: input pixels per cell, one per level.
    output_size: bins per side.
    sampling_ratio: samples per bin and axis; None adapts it per roi and axis to ceil(side of a bin
      in cells), mmcv's sampling_ratio 0. Exact for every roi: there is no static bound on the
      number of samples.
    levels: level of each roi; None means `assign_levels` over all given levels.
    max_samples: upper limit of the adaptive count per bin and axis; None (the default) sets none. A
      limit is a choice against parity with mmdet, it saves no time here.
    chunk: rois per image that are in memory at once, as one 16 x 16 x c float32 tile each.

  Returns:
    In the dtype of the features; accumulated in float32. Gradients flow to the features, and are
    zero for rois.

  Raises:
    ValueError: the levels, strides or rois do not fit together.
  """
  _check(features, rois, strides, levels)
  sizes = tuple((level.shape[1], level.shape[2]) for level in features)
  if levels is None:
    levels = assign_levels(rois, len(features))
  rois = jax.lax.stop_gradient(jnp.asarray(rois, jnp.float32))
  b, n = rois.shape[:2]
  channels = features[0].shape[-1]
  if n == 0:
    return jnp.zeros((b, 0, output_size, output_size, channels), features[0].dtype)
  sampling = Sampling(output_size, sampling_ratio, max_samples)
  plan = _Plan(sizes, tuple(strides), sampling, min(chunk, n))
  # A row of a tile is read as one slice, which may run over the last row of the last level.
  tail = jnp.zeros((b, _TILE, channels), features[0].dtype)
  table = jnp.concatenate([*(level.reshape(b, -1, channels) for level in features), tail], axis=1)
  return _pool(plan, table, rois, jnp.asarray(levels, jnp.int32))


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How many sample points a bin has along one axis; see `roi_align`."""

  bins: int
  ratio: int | None = None
  max_samples: int | None = None

  def counts(self, extent: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Samples per bin and axis for rois of `extent` cells, as whole float32 numbers."""
    if self.ratio is not None:
      return jnp.full(extent.shape, self.ratio, jnp.float32)
    count = jnp.ceil(extent / self.bins)
    # XLA may divide by multiplying with a rounded reciprocal; 14 / 7 must not become 3 samples.
    count = jnp.where((count - 1) * self.bins >= extent, count - 1, count)
    count = jnp.where(count * self.bins < extent, count + 1, count)
    count = jnp.maximum(count, 1.0)
    return count if self.max_samples is None else jnp.minimum(count, self.max_samples)


class Line(NamedTuple):
  """One axis of some rois: where they lie on their map, and the cells they touch there."""

  start: Array  # float32, first edge of the roi in cells (0 is the centre of the first cell)
  extent: Array  # float32, length of the roi in cells, >= 0
  size: Array  # int32, cells of the map
  low: Array  # int32, first cell touched
  tiles: Array  # int32, tiles needed from there

  def weights(
    self, index: Int[Array, "*shape"], tile: int, sampling: Sampling
  ) -> Float[Array, "*shape bins tile"]:
    """Weight of each cell of tile `index` in each bin; zero for cells that no sample touches."""
    cells = self.low[..., None] + index[..., None] * tile + jnp.arange(tile)
    return _axis_weights(self.start, self.extent, self.size, cells, sampling)


def make_line(
  start: Float[Array, "*shape"],
  extent: Float[Array, "*shape"],
  size: Int[Array, "*shape"],
  tile: int,
  sampling: Sampling,
  align: int = 1,
) -> Line:
  """Line of rois [start, start + extent] on maps of `size` cells, read in tiles of `tile` cells.

  The first tile begins at a multiple of `align` cells.
  """
  count = sampling.counts(extent)
  step = extent / sampling.bins
  first = start + 0.5 * step / count
  last = start + (sampling.bins - 1) * step + (count - 0.5) * step / count
  low = jnp.clip(jnp.floor(first), 0, size - 1).astype(jnp.int32)
  high = jnp.clip(jnp.floor(last) + 1, 0, size - 1).astype(jnp.int32)
  # What a NaN becomes as an integer is undefined: without this a broken roi reads out of bounds.
  low, high = jnp.clip(low, 0, size - 1), jnp.clip(high, 0, size - 1)
  low = jnp.minimum(low, high) // align * align
  return Line(start, extent, size, low, (high - low) // tile + 1)


def _axis_weights(start: Array, extent: Array, size: Array, cells: Array, sampling: Sampling) -> Array:
  """Mean over the samples of each bin of the linear weight of `cells` [..., k]: [..., bins, k]."""
  count = sampling.counts(extent)[..., None, None, None]
  step = (extent / sampling.bins)[..., None, None, None]
  bins = jnp.arange(sampling.bins, dtype=jnp.float32)[:, None, None]
  edge = start[..., None, None, None] + bins * step
  cell = cells[..., None, :, None].astype(jnp.float32)
  if sampling.ratio is None and sampling.max_samples is None:
    # A cell is touched by samples in (cell - 1, cell + 1). With more than one sample per bin they
    # are more than half a cell apart (count = ceil(step) < step + 1), so six in a row from just
    # below cell - 1 hold all of them.
    nearest = jnp.floor((cell - 1 - edge) / jnp.maximum(step / count, 1e-12) - 0.5)
    sample = jnp.clip(nearest, 0, count - 1) + jnp.arange(6)
  else:
    most = sampling.ratio if sampling.ratio is not None else sampling.max_samples
    sample = jnp.arange(most, dtype=jnp.float32)
  position = edge + (sample + 0.5) * step / count
  size = size[..., None, None, None]
  counted = (sample < count) & (position >= -1) & (position <= size)
  position = jnp.clip(position, 0, size - 1)
  weight = jnp.maximum(1 - jnp.abs(position - cell), 0.0)
  return jnp.sum(jnp.where(counted, weight, 0.0), axis=-1) / count[..., 0]


def tiled_order(y: Line, x: Line, chunk: int) -> tuple[Array, Array, Array]:
  """Visits rois [b, n] by falling number of tiles, `chunk` of each image at a time.

  Images stay apart so that a batch split over devices is not shuffled between them.

  Returns:
    order [b, n_padded] (indices into n; the last one is repeated to fill the last step), inverse
    [b, n] (where each roi is in that order) and trips [n_padded / chunk], the tiles to add in each
    step.
  """
  n = y.tiles.shape[1]
  need = y.tiles * x.tiles
  inverse = select.falling_rank(need)
  order = select.inverse(inverse)
  padded = -(-n // chunk) * chunk
  order = jnp.pad(order, ((0, 0), (0, padded - n)), mode="edge")
  sorted_need = jnp.take_along_axis(need, order, axis=1)
  return order, inverse, jnp.max(sorted_need[:, ::chunk], axis=0)


def to_chunks(values: Array, order: Array, chunk: int) -> Array:
  """Reorders [b, n, ...] by `order` and cuts it up: [steps, b, chunk, ...]."""
  expanded = order.reshape(*order.shape, *(1,) * (values.ndim - 2))
  values = jnp.take_along_axis(values, expanded, axis=1)
  values = values.reshape(values.shape[0], -1, chunk, *values.shape[2:])
  return jnp.moveaxis(values, 1, 0)


def from_chunks(values: Array, inverse: Array) -> Array:
  """Undoes `to_chunks`, dropping what was padded."""
  values = jnp.moveaxis(values, 0, 1)
  values = values.reshape(values.shape[0], -1, *values.shape[3:])
  expanded = inverse.reshape(*inverse.shape, *(1,) * (values.ndim - 2))
  return jnp.take_along_axis(values, expanded, axis=1)


@dataclasses.dataclass(frozen=True)
class _Plan:
  """The static part of one call: sizes and strides of the levels, and how they are sampled."""

  sizes: tuple[tuple[int, int], ...]
  strides: tuple[int, ...]
  sampling: Sampling
  chunk: int

  def lines(self, rois: Array, levels: Array) -> tuple[Line, Line, Array, Array]:
    """Row and column lines of rois; offset in the table and row length of their levels."""
    heights, widths = (np.asarray(side, np.int32) for side in zip(*self.sizes))
    offsets = np.concatenate([[0], np.cumsum(heights * widths)[:-1]]).astype(np.int32)
    scale = jnp.asarray(1 / np.asarray(self.strides, np.float32))[levels]
    height, width, offset = (jnp.asarray(a)[levels] for a in (heights, widths, offsets))
    low = rois[..., :2] * scale[..., None] - 0.5
    high = rois[..., 2:] * scale[..., None] - 0.5
    extent = jnp.maximum(high - low, 0.0)
    y = make_line(low[..., 1], extent[..., 1], height, _TILE, self.sampling)
    x = make_line(low[..., 0], extent[..., 0], width, _TILE, self.sampling)
    return y, x, offset, width

  def steps(self, rois: Array, levels: Array) -> tuple[tuple, Array, Array]:
    """Everything a loop over chunks maps over, the visiting order and its inverse."""
    geometry = self.lines(rois, levels)
    order, inverse, trips = tiled_order(geometry[0], geometry[1], self.chunk)
    split = functools.partial(to_chunks, order=order, chunk=self.chunk)
    return (trips, *jax.tree.map(split, geometry)), order, inverse

  def tile(self, index: Array, y: Line, x: Line, offset: Array, width: Array) -> tuple:
    """Tile `index` of each roi: where its rows start in the table; row and column weights."""
    row, column = index // x.tiles, index % x.tiles
    # Rois of fewer tiles than others in the chunk run on below their last row, where all weights
    # are zero.
    rows = y.low[..., None] + row[..., None] * _TILE + jnp.arange(_TILE)
    rows = jnp.minimum(rows, y.size[..., None] - 1)
    starts = offset[..., None] + rows * width[..., None] + (x.low + column * _TILE)[..., None]
    return starts, y.weights(row, _TILE, self.sampling), x.weights(column, _TILE, self.sampling)


_einsum = functools.partial(
  jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


def _repeat(weights: Array, bins: int) -> Array:
  """Column weights once per row of bins; a batch axis of rows spares a transpose, 3x on a CPU."""
  b, k, *shape = weights.shape
  return jnp.broadcast_to(weights[:, :, None], (b, k, bins, *shape))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pool(plan: _Plan, table: Array, rois: Array, levels: Array) -> Array:
  """RoIAlign from a table [b, cells, c] that holds all levels one after the other."""
  steps, _, inverse = plan.steps(rois, levels)
  bins, b, channels = plan.sampling.bins, table.shape[0], table.shape[-1]

  def step(step):
    trips, geometry = step[0], step[1:]

    def add_tile(index, total):
      starts, wy, wx = plan.tile(index, *geometry)
      patch = jax.vmap(_read_rows)(table, starts).astype(jnp.float32)
      rows = _einsum("bkpy,bkyxc->bkpxc", wy, patch)
      return total + _einsum("bkpqx,bkpxc->bkpqc", _repeat(wx, bins), rows)

    zeros = jnp.zeros((b, plan.chunk, bins, bins, channels), jnp.float32)
    return jax.lax.fori_loop(0, trips, add_tile, zeros).astype(table.dtype)

  return from_chunks(jax.lax.map(step, steps), inverse)


def _pool_forward(plan: _Plan, table: Array, rois: Array, levels: Array) -> tuple:
  return _pool(plan, table, rois, levels), (rois, levels)


def _pool_backward(plan: _Plan, residuals: tuple, gradient: Array) -> tuple:
  # A loop with a dynamic trip count has no automatic transpose, so here is the transpose: the same
  # tiles and weights, with the gradient spread over the cells that were read.
  rois, levels = residuals
  steps, order, _ = plan.steps(rois, levels)
  b, n = rois.shape[:2]
  cells = sum(height * width for height, width in plan.sizes) + _TILE
  dtype, channels = gradient.dtype, gradient.shape[-1]
  gradient = to_chunks(gradient, order, plan.chunk)
  # Padding repeats a roi, whose gradient must not count twice.
  place = jnp.arange(order.shape[1]).reshape(-1, 1, plan.chunk, 1, 1, 1)
  gradient = jnp.where(place < n, gradient, 0).astype(jnp.float32)

  def step(total, step):
    (trips, *geometry), gradient = step

    def add_tile(index, total):
      starts, wy, wx = plan.tile(index, *geometry)
      rows = _einsum("bkpqx,bkpqc->bkpxc", _repeat(wx, plan.sampling.bins), gradient)
      patch = _einsum("bkpy,bkpxc->bkyxc", wy, rows)
      return jax.vmap(_add_rows)(total, starts, patch)

    return jax.lax.fori_loop(0, trips, add_tile, total), None

  zeros = jnp.zeros((b, cells, channels), jnp.float32)
  total, _ = jax.lax.scan(step, zeros, (steps, gradient))
  return total.astype(dtype), jnp.zeros_like(rois), None


_pool.defvjp(_pool_forward, _pool_backward)


def _read_rows(table: Array, starts: Array) -> Array:
  """Runs of `_TILE` cells: table [cells, c], starts [k, tile] -> [k, tile, _TILE, c]."""
  dimensions = jax.lax.GatherDimensionNumbers(
    offset_dims=(2, 3), collapsed_slice_dims=(), start_index_map=(0,)
  )
  return jax.lax.gather(
    table,
    starts[..., None],
    dimensions,
    slice_sizes=(_TILE, table.shape[-1]),
    mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
  )


def _add_rows(table: Array, starts: Array, patch: Array) -> Array:
  """Transpose of `_read_rows`: adds the runs of `patch` to the table."""
  dimensions = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(2, 3), inserted_window_dims=(), scatter_dims_to_operand_dims=(0,)
  )
  return jax.lax.scatter_add(
    table,
    starts[..., None],
    patch,
    dimensions,
    mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
  )


def _check(features: tuple, rois: Array, strides: tuple, levels: Array | None) -> None:
  shapes = [tuple(level.shape) for level in features]
  if not features or len(features) != len(strides):
    raise ValueError(
      f"roi_align got {len(features)} feature levels {shapes} and strides {tuple(strides)};"
      " pass one stride per level."
    )
  same = {(shape[0], shape[-1]) for shape in shapes if len(shape) == 4}
  if any(len(shape) != 4 for shape in shapes) or len(same) != 1:
    raise ValueError(
      f"roi_align got feature levels of shapes {shapes}; expected [b, h, w, c] with one b and one c."
    )
  if rois.ndim != 3 or rois.shape[-1] != 4 or rois.shape[0] != shapes[0][0]:
    raise ValueError(
      f"roi_align got rois of shape {tuple(rois.shape)}; expected [{shapes[0][0]}, n, 4] for"
      f" features of shapes {shapes}."
    )
  if levels is not None and tuple(levels.shape) != tuple(rois.shape[:2]):
    raise ValueError(
      f"roi_align got roi levels of shape {tuple(levels.shape)}; expected"
      f" {tuple(rois.shape[:2])}, one per roi."
    )
