"""Attention inside windows, as Swin Transformer V2 (arXiv 2111.09883) does it; no parameters here."""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int
import numpy as np

from frozen_vision.backbones.swinv2 import window_kernel
from frozen_vision.devices import sharding
from frozen_vision.layers.relative_positions import position_index
from frozen_vision.ops import vectors
from frozen_vision.ops.arrays import Array

MAX_LOGIT_SCALE = math.log(100.0)  # the trained temperature stays above 0.01.
_MASKED = -100.0  # not -inf: the released code adds -100, and its weights were trained with it.
# The most scores of one image that exist at once: all windows of 32 x 32 in a map of 384 x 384 have 2.4
# billion.
_MOST_SCORES = 2**27
# The most pairs of cells of a window that all heads attend to at once. What `position_index` gathers has the
# heads innermost, which a TPU pads to 128: 5 GB where windows are 56 x 56.
_MOST_PAIRS = 2**22


@functools.cache
def position_coordinates(window: tuple[int, int], pretrained: int) -> np.ndarray:
  """Log-spaced relative coordinates, [(2h-1)(2w-1), 2] float32 (section 3.3).

  Args:
    window: (height, width) of the window in use.
    pretrained: the side that distances are divided by; 0 takes the window in use.
  """
  axes = []
  for size in window:
    span = max((pretrained or size) - 1, 1)  # the released code divides by zero at a 1 x 1 window.
    distance = np.arange(-(size - 1), size, dtype=np.float64) * 8 / span
    axes.append(np.sign(distance) * np.log2(np.abs(distance) + 1) / np.log2(8))
  rows, columns = np.meshgrid(*axes, indexing="ij")
  return np.stack([rows, columns], axis=-1).reshape(-1, 2).astype(np.float32)


def position_table(
  kernel1: Float[Array, "2 hidden"],
  bias1: Float[Array, "hidden"],
  kernel2: Float[Array, "hidden heads"],
  *,
  window: tuple[int, int],
  pretrained: int,
) -> Float[Array, "offsets heads"]:
  """The bias of every relative position of a window, in the order of `position_coordinates`."""
  hidden = jax.nn.relu(jnp.asarray(position_coordinates(window, pretrained)) @ kernel1 + bias1)
  return 16 * jax.nn.sigmoid(hidden @ kernel2)


def pair_bias(
  table: Float[Array, "offsets heads"],
  window: tuple[int, int],
) -> Float[Array, "heads _ _"]:
  """The bias of every (query, key) pair of a window; of a large one, its table by head, y = 2h-1, x = 2w-1.

  `cosine_attention` takes both, and makes pairs of a table for some heads after the others.

  Args:
    table: the bias of every relative position, in the order of `position_coordinates`.
  """
  if math.prod(window) ** 2 > _MOST_PAIRS:
    return table_by_head(table, window)
  return jnp.moveaxis(table[position_index(window)], -1, 0)


def table_by_head(table: Float[Array, "offsets heads"], window: tuple[int, int]) -> Float[Array, "heads y x"]:
  """The bias of every relative position, y = 2h-1 and x = 2w-1, in the order of `position_coordinates`."""
  return table.T.reshape(-1, 2 * window[0] - 1, 2 * window[1] - 1)


def _pairs_of_table(table: Float[Array, "heads y x"]) -> Float[Array, "heads n n"]:
  """Gathers as `position_index` would, by slices."""
  pairs = _differences(_differences(table, 2), 1)  # by head, query's and key's row, query's and key's column
  pairs = pairs.transpose(0, 1, 3, 2, 4)
  return pairs.reshape(table.shape[0], pairs.shape[1] * pairs.shape[2], -1)


def _differences(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
  """Two axes i and j for one of length 2m-1: its entries i - j + m-1."""
  m = (x.shape[axis] + 1) // 2
  before, after = x.shape[:axis], x.shape[axis + 1 :]
  x = jnp.pad(jnp.flip(x, axis), [(0, int(i == axis)) for i in range(x.ndim)])
  # Repeated with a period of 2m and cut into rows of 2m-1, each row begins one entry earlier than that above.
  x = jnp.broadcast_to(jnp.expand_dims(x, axis), (*before, m, 2 * m, *after)).reshape(*before, -1, *after)
  x = jax.lax.slice_in_dim(x, 0, m * (2 * m - 1), axis=axis).reshape(*before, m, 2 * m - 1, *after)
  return jax.lax.slice_in_dim(x, m - 1, 2 * m - 1, axis=axis + 1)


@functools.cache
def shift_regions(
  size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> np.ndarray | None:
  """Regions of pixels that were neighbours before the cyclic shift: each pixel attends to its own region.

  Args:
    size: (height, width) of the padded map, multiples of the window.
    window: (height, width) of the window.
    shift: cells the map was rolled by, up and left; 0 on an axis that is a single window.

  Returns:
    The region of each pixel of each window, [windows, h*w] int32, or None without a shift. As a mask of pairs
    it would be a constant of hundreds of megabytes in the programs of large windows.
  """
  if not any(shift):
    return None
  regions = []
  for length, side, rolled in zip(size, window, shift):
    position = np.arange(length)
    regions.append(
      (position >= length - side).astype(int) + (position >= length - rolled) if rolled else position * 0
    )
  region = regions[0][:, None] * 3 + regions[1][None, :]
  (height, width), (rows, columns) = window, (size[0] // window[0], size[1] // window[1])
  region = region.reshape(rows, height, columns, width).transpose(0, 2, 1, 3)
  return region.reshape(rows * columns, -1).astype(np.int32)


def cosine_attention(
  qkv: Float[Array, "b h w qkv"],
  window: tuple[int, int],
  scale: Float[Array, "heads"],
  bias: Float[Array, "heads _ _"],
  regions: Int[Array, "windows n"] | None,
) -> Float[Array, "b h w c"]:
  """Attention inside every window of a map, by cosine similarity times `scale`, plus `bias`.

  Logits and softmax are float32.

  Args:
    qkv: queries, keys and values of a map of whole windows.
    window: (height, width).
    bias: see `pair_bias`.
    regions: of each window of an image, see `shift_regions`; or None.
  """
  heads = scale.shape[0]
  q, k, v = (_windows(x, window, heads) for x in jnp.split(qkv, 3, axis=-1))
  q, k = (vectors.unit(q) * scale[:, None, None]).astype(qkv.dtype), vectors.unit(k).astype(qkv.dtype)
  cells = math.prod(window)
  if bias.shape[1:] == (cells, cells):
    x = _attend(q, k, v, bias, regions)
  else:
    at_once = _divisor(heads, _MOST_SCORES // cells**2)

    def cut(x):
      return jnp.moveaxis(x.reshape(x.shape[0], -1, at_once, *x.shape[2:]), 1, 0)

    # The backward pass too holds the scores of one group at a time.
    some = jax.checkpoint(
      lambda part: _attend(*part[:3], _pairs_of_table(part[3]), regions), prevent_cse=False
    )
    parts = cut(q), cut(k), cut(v), bias.reshape(-1, at_once, *bias.shape[1:])
    x = jnp.moveaxis(jax.lax.map(some, parts), 0, 1).reshape(q.shape)
  return _map(x, qkv.shape[:3], window)


def _attend(
  q: Float[Array, "bw heads n d"],
  k: Float[Array, "bw heads n d"],
  v: Float[Array, "bw heads n d"],
  bias: Float[Array, "heads n n"],
  regions: Int[Array, "windows n"] | None,
) -> Float[Array, "bw heads n d"]:
  logits = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=jnp.float32) + bias
  if regions is not None:
    regions = jnp.asarray(regions)  # of a numpy array, the mask of all pairs would be a constant
    shape, mask = logits.shape, jnp.where(regions[:, :, None] == regions[:, None, :], 0.0, _MASKED)
    logits = (logits.reshape(-1, mask.shape[0], *shape[1:]) + mask[:, None]).reshape(shape)
  # Softmax, with its division after the product instead of before it: on d instead of n numbers a query.
  largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
  weights = jnp.exp(logits - largest)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  x = jnp.einsum("bhnm,bhmd->bhnd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
  return (x / total).astype(v.dtype)


def fits_on_chip(window: tuple[int, int], head_channels: int, dtype: Any) -> bool:
  """Whether `attention_on_chip` can attend in windows of (height, width) cells."""
  return window_kernel.why_not(window, head_channels, dtype) is None


def attention_on_chip(
  qkv: Float[Array, "b h w qkv"],
  window: tuple[int, int],
  scale: Float[Array, "heads"],
  table: Float[Array, "heads y x"],
  shift: tuple[int, int],
) -> Float[Array, "b h w c"]:
  """`cosine_attention` by a kernel for TPUs that keeps the scores of a window on the chip.

  On each device of a mesh it attends in that device's images. The gradient is that of `cosine_attention`,
  whose scores it computes again, those of some windows and heads after the others.

  Args:
    qkv: queries, keys and values of a map of whole windows.
    window: (height, width).
    table: see `table_by_head`.
    shift: cells the map was rolled by, up and left.

  Raises:
    ValueError: heads, a dtype or windows that the kernel does not take.
    NotImplementedError: the program is compiled for something else than a TPU.
  """
  head_channels = qkv.shape[-1] // 3 // scale.shape[0]
  reason = window_kernel.why_not(window, head_channels, qkv.dtype)
  if reason is not None:
    raise ValueError(
      f"SwinV2Config.attention is 'pallas', and that kernel cannot attend here: {reason}. Give "
      "--config.backbone.overrides.attention=xla, or attention='xla' where the backbone is built."
    )
  return _on_chip(qkv, scale, table, window, shift)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _on_chip(qkv, scale, table, window, shift):
  def attend(qkv, scale, table):
    return window_kernel.attend(qkv, window, scale, table, shift, _MASKED)

  return sharding.per_device(attend, replicated=2)(qkv, scale, table)


def _on_chip_forward(qkv, scale, table, window, shift):
  return _on_chip(qkv, scale, table, window, shift), (qkv, scale, table)


def _on_chip_backward(window, shift, inputs, gradient):
  def plain(qkv, scale, table):
    def attention(part, window, regions):
      return cosine_attention(part, window, scale, table, regions)

    regions = shift_regions(qkv.shape[1:3], window, shift)
    return _in_groups(qkv, window, regions, attention, scale.shape[0])

  return jax.vjp(plain, *inputs)[1](gradient)


_on_chip.defvjp(_on_chip_forward, _on_chip_backward)


def attention_weights(
  qkv: Callable[[Array], Array],
  x: Float[Array, "b h w c"],
  window_size: int,
  shifted: bool,
  scale: Float[Array, "heads"],
  bias: Callable[[tuple[int, int]], Float[Array, "heads n n"]],
) -> tuple[Float[Array, "b windows heads n n"], Float[np.ndarray, "windows n 2"]]:
  """The softmax inside every window, and (row, column) of each cell in the map; NaN of padding.

  What `attend_in_windows` and `cosine_attention` weigh values by, all at once.

  Args:
    qkv: gives queries, keys and values of a map of whole windows.
    bias: gives the bias of every pair of a window of (height, width).
  """
  b, height, width = x.shape[:3]
  window, padded, shift = _grid((height, width), window_size, shifted)
  cells = np.full((*padded, 2), np.nan, np.float32)
  cells[:height, :width] = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1)
  cells = np.roll(cells, (-shift[0], -shift[1]), axis=(0, 1))
  rows, columns = padded[0] // window[0], padded[1] // window[1]
  cells = cells.reshape(rows, window[0], columns, window[1], 2).transpose(0, 2, 1, 3, 4)
  x = _roll(_filled(x, padded), shift, -1)
  q, k, _ = (_windows(part, window, scale.shape[0]) for part in jnp.split(qkv(x), 3, axis=-1))
  q, k = vectors.unit(q) * scale[:, None, None], vectors.unit(k)
  logits = jnp.einsum("bhnd,bhmd->bhnm", q, k) + bias(window)
  logits = logits.reshape(b, rows * columns, *logits.shape[1:])
  regions = shift_regions(padded, window, shift)
  if regions is not None:
    logits += jnp.where(regions[:, :, None] == regions[:, None, :], 0.0, _MASKED)[:, None]
  return jax.nn.softmax(logits, axis=-1), cells.reshape(rows * columns, -1, 2)


def _windows(x: Float[Array, "b h w c"], window: tuple[int, int], heads: int) -> Float[Array, "bw heads n d"]:
  """Cuts windows and heads in one transposition; each alone would copy the map."""
  b, height, width, c = x.shape
  rows, columns = height // window[0], width // window[1]
  x = x.reshape(b, rows, window[0], columns, window[1], heads, c // heads).transpose(0, 1, 3, 5, 2, 4, 6)
  return x.reshape(b * rows * columns, heads, window[0] * window[1], c // heads)


def _map(
  x: Float[Array, "bw heads n d"],
  size: tuple[int, int, int],
  window: tuple[int, int],
) -> Float[Array, "b h w c"]:
  """Undoes `_windows`."""
  b, height, width = size
  x = x.reshape(b, height // window[0], width // window[1], x.shape[1], *window, x.shape[-1])
  return x.transpose(0, 1, 4, 2, 5, 3, 6).reshape(b, height, width, -1)


def attend_in_windows(
  x: Float[Array, "b h w c"],
  window_size: int,
  shifted: bool,
  attention: Callable[..., Array],
  heads: int,
) -> Float[Array, "b h w _c"]:
  """Pads right and bottom to whole windows, shifts, attends, and undoes both.

  Windows so large that their scores would fill a device are attended to in groups, one after the other.

  Args:
    attention: of (x [b, h, w, c] of whole windows, window (height, width) in effect, regions or None).
    heads: of it.
  """
  height, width = x.shape[1:3]
  window, padded, shift = _grid((height, width), window_size, shifted)
  x = _roll(_filled(x, padded), shift, -1)
  x = _in_groups(x, window, shift_regions(padded, window, shift), attention, heads)
  return _roll(x, shift, 1)[:, :height, :width]


def attend_on_chip(
  x: Float[Array, "b h w c"],
  window_size: int,
  shifted: bool,
  attention: Callable[..., Array],
) -> Float[Array, "b h w _c"]:
  """`attend_in_windows` for attention that needs no groups of windows, as `attention_on_chip`.

  Args:
    attention: of (x [b, h, w, c] of whole windows, window (height, width) in effect, shift).
  """
  height, width = x.shape[1:3]
  window, padded, shift = _grid((height, width), window_size, shifted)
  x = attention(_roll(_filled(x, padded), shift, -1), window, shift)
  return _roll(x, shift, 1)[:, :height, :width]


def _filled(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b _h _w c"]:
  """Zeros at the right and at the bottom, up to a size."""
  height, width = x.shape[1:3]
  return jnp.pad(x, ((0, 0), (0, size[0] - height), (0, size[1] - width), (0, 0)))


def _in_groups(
  x: Float[Array, "b h w c"],
  window: tuple[int, int],
  regions: Int[np.ndarray, "windows n"] | None,
  attention: Callable[..., Array],
  heads: int,
) -> Float[Array, "b h w _c"]:
  """Attends in some windows of a map after the others, where the scores of all would fill a device."""
  rows, columns = (length // side for length, side in zip(x.shape[1:3], window))
  most = max(_MOST_SCORES // (heads * math.prod(window) ** 2), 1)  # windows of a group
  down, right = _divisor(rows, most // columns), _divisor(columns, most)
  if rows * columns <= most:
    return attention(x, window, regions)
  # The batch's axis stays where it is: it may be cut over devices.
  b, height, width, c = x.shape
  parts = x.reshape(b, rows // down, down * window[0], columns // right, right * window[1], c)
  parts = parts.transpose(1, 3, 0, 2, 4, 5).reshape(-1, b, *parts.shape[2:3], *parts.shape[4:])
  if regions is not None:
    regions = regions.reshape(rows // down, down, columns // right, right, -1).swapaxes(1, 2)
    regions = jnp.asarray(regions.reshape(len(parts), down * right, -1))
  parts = jax.lax.map(lambda part: attention(part[0], window, part[1]), (parts, regions))
  parts = parts.reshape(rows // down, columns // right, *parts.shape[1:])
  return parts.transpose(2, 0, 3, 1, 4, 5).reshape(b, height, width, parts.shape[-1])


def whole_windows(size: tuple[int, int], window_size: int) -> bool:
  """Whether a map of this (height, width) needs no padding."""
  return _grid(size, window_size, False)[1] == tuple(size)


def map_in_strips(
  x: Float[Array, "b h w c"],
  window_size: int,
  shifted: bool,
  function: Callable[..., Array],
  cells: int,
) -> Float[Array, "b h w c"]:
  """Shifts, applies a function to some rows of windows after the others, and undoes the shift.

  What the function makes on its way is then as large as a strip, not as the batch.

  Args:
    x: a map of whole windows.
    function: of (x [b, h, w, c] of whole windows, window, regions or None); no window depends on another.
    cells: of one strip, about; a strip is rows of windows of one image, or whole images.
  """
  b, height, width, c = x.shape
  window, _, shift = _grid((height, width), window_size, shifted)
  regions = shift_regions((height, width), window, shift)
  rows, wanted = height // window[0], max(cells // (window[0] * width), 1)
  at_once, images = _divisor(rows, wanted), _divisor(b, wanted // rows)
  strips = _roll(x, shift, -1).reshape(-1, images, at_once * window[0], width, c)
  each = None if regions is None else jnp.asarray(regions.reshape(rows // at_once, -1, regions.shape[-1]))

  def strip(inputs):
    index, x = inputs
    return function(x, window, None if each is None else each[index % each.shape[0]])

  if len(strips) == 1:
    strips = function(strips[0], window, regions)
  else:
    strips = jax.lax.map(strip, (jnp.arange(len(strips)), strips))
  return _roll(strips.reshape(x.shape), shift, 1)


def _divisor(number: int, most: int) -> int:
  """The largest divisor that is not above `most`; 1 at least."""
  return max(divisor for divisor in range(1, max(min(number, most), 1) + 1) if number % divisor == 0)


def _grid(size: tuple[int, int], window_size: int, shifted: bool) -> tuple[tuple[int, int], ...]:
  """(window in effect, size padded to whole windows, shift), each (height, width)."""
  window = tuple(min(window_size, length) for length in size)
  padded = tuple(-(-length // side) * side for length, side in zip(size, window))
  shift = tuple(side // 2 if shifted and side < length else 0 for side, length in zip(window, size))
  return window, padded, shift


def _roll(x: Float[Array, "b h w c"], shift: tuple[int, int], sign: int) -> Float[Array, "b h w c"]:
  return jnp.roll(x, (sign * shift[0], sign * shift[1]), axis=(1, 2)) if any(shift) else x
