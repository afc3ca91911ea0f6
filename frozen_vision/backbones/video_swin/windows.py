"""Attention inside windows of space and time, as Video Swin (arXiv 2106.13230) does it; no parameters here.

Sizes, windows and shifts are (frames, rows, columns), in cells of the map.
"""

from collections.abc import Callable
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int
import numpy as np

from frozen_vision.ops.arrays import Array

_MASKED = -100.0  # not -inf: the released code adds -100, and its weights were trained with it.

Size = tuple[int, int, int]


def table_rows(window: Size) -> int:
  """Relative positions inside a window: rows of its bias table."""
  return math.prod(2 * side - 1 for side in window)


def position_index(window: Size) -> Int[Array, "n n"]:
  """Row of the bias table for each (query, key) pair of a window; computed in the program, not a constant."""
  cells = jnp.stack(jnp.unravel_index(jnp.arange(math.prod(window)), window))
  offsets = cells[:, :, None] - cells[:, None, :] + jnp.array(window)[:, None, None] - 1
  _, rows, columns = (2 * side - 1 for side in window)
  return (offsets[0] * rows + offsets[1]) * columns + offsets[2]


def effective_window(size: Size, window: Size, shifted: bool) -> tuple[Size, Size]:
  """Window and shift on a map: an axis that fits into its window is one window, without a shift."""
  shift = tuple(side // 2 if shifted and length > side else 0 for length, side in zip(size, window))
  return tuple(min(length, side) for length, side in zip(size, window)), shift


@functools.cache
def shift_regions(size: Size, window: Size, shift: Size) -> Int[np.ndarray, "windows n"] | None:
  """Regions of cells that were neighbours before the cyclic shift: each cell attends to its own region.

  Regions instead of a mask per pair: at 16 frames of 224 pixels the mask would be 39 MB.

  Args:
    size: of the padded map, multiples of the window.
    window: in effect.
    shift: cells the map was rolled by; 0 on an axis that is a single window.

  Returns:
    The number of each cell's region, or None without a shift.
  """
  if not any(shift):
    return None
  region = np.zeros((1, 1, 1), np.int32)
  for axis, (length, side, rolled) in enumerate(zip(size, window, shift)):
    position = np.arange(length)
    part = np.zeros(length, np.int32)
    if rolled:
      part += (position >= length - side).astype(np.int32) + (position >= length - rolled)
    region = region * 3 + np.expand_dims(part, [other for other in range(3) if other != axis])
  return np.asarray(_partition(region[None, ..., None], window)[0, ..., 0], np.int32)


def _partition(x: Array, window: Size) -> Array:
  """[b, t, h, w, c] to [b, windows, cells, c]."""
  b, frames, height, width, c = x.shape
  counts = [length // side for length, side in zip((frames, height, width), window)]
  x = x.reshape(b, counts[0], window[0], counts[1], window[1], counts[2], window[2], c)
  return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, math.prod(counts), math.prod(window), c)


def _join(x: Array, size: Size, window: Size) -> Array:
  """Undoes `_partition`."""
  counts = [length // side for length, side in zip(size, window)]
  x = x.reshape(x.shape[0], *counts, *window, x.shape[-1])
  return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(x.shape[0], *size, x.shape[-1])


def attention(
  qkv: Float[Array, "b windows n qkv"],
  num_heads: int,
  bias: Float[Array, "heads n n"],
  regions: Int[Array, "windows n"] | None,
) -> Float[Array, "b windows n c"]:
  """Scaled dot-product attention plus `bias`, inside regions; logits and softmax in float32."""
  b, windows, n, c = qkv.shape
  # Heads first, so that all axes of the batch come before those of the products: with the heads between
  # them XLA takes twice as long on a CPU.
  q, k, v = jnp.moveaxis(qkv.reshape(b, windows, n, 3, num_heads, -1), (3, 4), (0, 3))
  q = q * q.shape[-1] ** -0.5
  logits = jnp.einsum("bwhnd,bwhmd->bwhnm", q, k, preferred_element_type=jnp.float32)
  logits = logits + bias.astype(jnp.float32)
  if regions is not None:
    regions = jnp.asarray(regions)
    same = regions[:, :, None] == regions[:, None, :]
    logits = logits + jnp.where(same, 0.0, _MASKED)[:, None]
  weights = jax.nn.softmax(logits, axis=-1).astype(qkv.dtype)
  return jnp.einsum("bwhnm,bwhmd->bwhnd", weights, v).swapaxes(2, 3).reshape(b, windows, n, c // 3)


def attend_in_windows(
  x: Float[Array, "b t h w c"], window: Size, shifted: bool, attend: Callable[..., Array]
) -> Float[Array, "b t h w c"]:
  """Pads behind to whole windows, shifts, attends, and undoes both.

  Args:
    attend: of (x [b, windows, n, c], window in effect, regions or None).
  """
  size = x.shape[1:4]
  window, shift = effective_window(size, window, shifted)
  padded = tuple(-(-length // side) * side for length, side in zip(size, window))
  if padded != size:
    x = jnp.pad(x, ((0, 0), *((0, new - old) for new, old in zip(padded, size)), (0, 0)))
  if any(shift):
    x = jnp.roll(x, tuple(-s for s in shift), axis=(1, 2, 3))
  x = _join(attend(_partition(x, window), window, shift_regions(padded, window, shift)), padded, window)
  if any(shift):
    x = jnp.roll(x, shift, axis=(1, 2, 3))
  return x[:, : size[0], : size[1], : size[2]]
