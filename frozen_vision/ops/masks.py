"""Instance masks: packed bits, targets cropped from bitmaps, predictions pasted into images."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Num, UInt8
import numpy as np

from frozen_vision.ops import roi_align as roi_ops
from frozen_vision.ops.arrays import Array

_TILE = 64  # pixels per side of a tile of a bitmap; whole bytes


def pack(masks: Bool[np.ndarray, "*shape h w"]) -> UInt8[np.ndarray, "*shape h w8"]:
  """Packs bits along the width, most significant first; zeros fill up the last byte."""
  return np.packbits(np.asarray(masks, bool), axis=-1)


def unpack(packed: UInt8[Array, "*shape h w8"], width: int) -> Bool[Array, "*shape h {width}"]:
  """Inverse of `pack`, for NumPy arrays on the host and for jax arrays on the device."""
  if not 8 * (packed.shape[-1] - 1) < width <= 8 * packed.shape[-1]:
    raise ValueError(
      f"Packed masks of shape {tuple(packed.shape)} hold widths in ({8 * (packed.shape[-1] - 1)},"
      f" {8 * packed.shape[-1]}], not {width}."
    )
  xp = jnp if isinstance(packed, jax.Array) else np
  return xp.unpackbits(packed, axis=-1, count=width).astype(bool)


def crop_masks(
  packed: UInt8[Array, "b n h w8"],
  indices: Int[Array, "b m"],
  rois: Float[Array, "b m 4"],
  size: int,
  *,
  width: int | None = None,
  chunk: int = 64,
) -> Float[Array, "b m {size} {size}"]:
  """Mask targets: the part of an instance's bitmap inside a roi, resized to size x size, in {0, 1}.

  As mmdet's `BitmapMasks.crop_and_resize`: RoIAlign on the bitmap (scale 1, half-pixel aligned,
  adaptive number of samples), then >= 0.5. Exact for rois of any size.

  Args:
    packed: bitmaps of the whole input frame, packed along the width by `np.packbits`.
    indices: which bitmap of the image each roi takes; clamped into range, so padding may hold
      anything.
    rois: xyxy in input pixels.
    size: side of the targets in cells (28 in Mask R-CNN and HTC).
    width: columns of the frame, if 8 * w8 is more. It matters only to samples within half a pixel
      of the right border.
    chunk: rois per image that are in memory at once, as one 64 x 64 float32 tile each.
  """
  b, n, height, row_bytes = packed.shape
  rois = jax.lax.stop_gradient(jnp.asarray(rois, jnp.float32))
  m = rois.shape[1]
  if m == 0 or n == 0:
    return jnp.zeros((b, m, size, size), jnp.float32)
  width = 8 * row_bytes if width is None else width
  chunk = min(chunk, m)
  sampling = roi_ops.Sampling(size)
  low = rois[..., :2] - 0.5
  extent = jnp.maximum((rois[..., 2:] - 0.5) - low, 0.0)
  y = roi_ops.make_line(low[..., 1], extent[..., 1], jnp.full((b, m), height), _TILE, sampling)
  # Tiles begin with a whole byte.
  x = roi_ops.make_line(low[..., 0], extent[..., 0], jnp.full((b, m), width), _TILE, sampling, align=8)
  order, inverse, trips = roi_ops.tiled_order(y, x, chunk)
  offset = jnp.clip(indices, 0, n - 1) * height
  split = functools.partial(roi_ops.to_chunks, order=order, chunk=chunk)
  # Reads may run over the right border, into weights of zero.
  rows_of_bytes = packed.reshape(b, n * height, row_bytes)
  rows_of_bytes = jnp.pad(rows_of_bytes, ((0, 0), (0, 0), (0, _TILE // 8)))
  read = jax.vmap(jax.vmap(_read_bytes, in_axes=(None, 0, 0)))

  def step(step):
    trips, y, x, offset = step

    def add_tile(index, total):
      row, column = index // x.tiles, index % x.tiles
      rows = y.low[..., None] + row[..., None] * _TILE + jnp.arange(_TILE)
      rows = offset[..., None] + jnp.minimum(rows, height - 1)
      first = (x.low + column * _TILE) // 8
      patch = read(rows_of_bytes, rows, first)
      patch = jnp.unpackbits(patch, axis=-1).astype(jnp.float32)
      wy, wx = y.weights(row, _TILE, sampling), x.weights(column, _TILE, sampling)
      columns = _einsum("bkqx,bkyx->bkyq", wx, patch)
      return total + _einsum("bkpy,bkyq->bkpq", wy, columns)

    zeros = jnp.zeros((b, chunk, size, size), jnp.float32)
    return jax.lax.fori_loop(0, trips, add_tile, zeros)

  crops = jax.lax.map(step, (trips, *jax.tree.map(split, (y, x, offset))))
  return (roi_ops.from_chunks(crops, inverse) >= 0.5).astype(jnp.float32)


# The comparison with 0.5 is sharp, so products must not be rounded to bfloat16, a TPU's default.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def _read_bytes(rows_of_bytes: Array, rows: Array, first: Array) -> Array:
  """A tile's bytes, from byte `first` on, of the given rows: [tile, _TILE / 8]."""
  dimensions = jax.lax.GatherDimensionNumbers(
    offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0, 1)
  )
  starts = jnp.stack([rows, jnp.broadcast_to(first, rows.shape)], axis=-1)
  return jax.lax.gather(
    rows_of_bytes,
    starts,
    dimensions,
    slice_sizes=(1, _TILE // 8),
    mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
  )


def paste_mask(
  probabilities: Float[np.ndarray, "s s"],
  box: Num[np.ndarray, "4"],
  height: int,
  width: int,
  threshold: float = 0.5,
) -> Bool[np.ndarray, "height width"]:
  """Pastes a predicted mask into an image, on the host (mmdet's `_do_paste_mask`, its CPU form).

  The mask is sampled bilinearly at pixel centres with half-pixel alignment and zeros around it
  (PyTorch's `grid_sample(align_corners=False)`), only inside the box widened to whole pixels and
  one more, then compared with the threshold (>=).

  Args:
    probabilities: mask of the box, of any size (28 x 28 in HTC).
    box: xyxy in pixels of the target frame; it may reach beyond it.
    height: rows of the target frame.
    width: columns of the target frame.
    threshold: lowest probability that counts as object.

  Returns:
    The mask of the whole frame; all false for a box without area or outside of the frame.
  """
  mask = np.zeros((height, width), bool)
  x1, y1, x2, y2 = np.asarray(box, np.float32)
  if not (np.all(np.isfinite([x1, y1, x2, y2])) and x2 > x1 and y2 > y1):
    return mask
  left, right = max(int(np.floor(x1)) - 1, 0), min(int(np.ceil(x2)) + 1, width)
  top, bottom = max(int(np.floor(y1)) - 1, 0), min(int(np.ceil(y2)) + 1, height)
  if left >= right or top >= bottom:
    return mask
  probabilities = np.asarray(probabilities, np.float32)
  rows = paste_weights(np.arange(top, bottom), y1, y2, probabilities.shape[0])
  columns = paste_weights(np.arange(left, right), x1, x2, probabilities.shape[1])
  mask[top:bottom, left:right] = rows @ probabilities @ columns.T >= np.float32(threshold)
  return mask


def paste_weights(
  pixels: Int[np.ndarray, "n"],
  low: np.float32 | Float[np.ndarray, "n"],
  high: np.float32 | Float[np.ndarray, "n"],
  cells: int,
) -> Float[np.ndarray, "n cells"]:
  """Linear weights of a mask's cells, which fill low..high, at centres of pixels; zero outside of the mask.

  Args:
    pixels: numbers of pixels along an axis.
    low: float32, where the mask begins, in pixels: one number, or one for each pixel.
    high: float32, where it ends, above `low`.
    cells: of the mask along the axis.
  """
  centers = pixels.astype(np.float32) + np.float32(0.5)
  position = (centers - low) / (high - low) * np.float32(cells) - np.float32(0.5)
  distance = np.abs(position[:, None] - np.arange(cells, dtype=np.float32))
  return np.maximum(np.float32(1) - distance, np.float32(0))
