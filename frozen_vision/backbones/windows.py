"""Attention inside windows, as Swin Transformer V2 (arXiv 2111.09883) does it; no parameters here."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

_MASKED = -100.0  # not -inf: the released code adds -100, and its weights were trained with it.


@functools.lru_cache(maxsize=None)
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


@functools.lru_cache(maxsize=None)
def position_index(window: tuple[int, int]) -> np.ndarray:
  """Row of the bias table for each (query, key) pair of a window, [h*w, h*w] int32."""
  height, width = window
  rows, columns = (axis.reshape(-1) for axis in np.mgrid[:height, :width])
  down = rows[:, None] - rows[None, :] + height - 1
  right = columns[:, None] - columns[None, :] + width - 1
  return (down * (2 * width - 1) + right).astype(np.int32)


@functools.lru_cache(maxsize=None)
def shift_mask(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> np.ndarray | None:
  """What keeps pixels apart that only the cyclic shift made neighbours.

  Args:
    size: (height, width) of the padded map, multiples of the window.
    window: (height, width) of the window.
    shift: cells the map was rolled by, up and left; 0 on an axis that is a single window.

  Returns:
    [windows, h*w, h*w] float32 of 0 and -100, or None without a shift.
  """
  if not any(shift):
    return None
  regions = []
  for length, side, rolled in zip(size, window, shift):
    position = np.arange(length)
    regions.append(
        (position >= length - side).astype(int) + (position >= length - rolled) if rolled else position * 0)
  region = regions[0][:, None] * 3 + regions[1][None, :]
  (height, width), (rows, columns) = window, (size[0] // window[0], size[1] // window[1])
  region = region.reshape(rows, height, columns, width).transpose(0, 2, 1, 3).reshape(rows * columns, -1)
  return np.where(region[:, :, None] == region[:, None, :], 0.0, _MASKED).astype(np.float32)


def _unit(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
  """x / max(|x|, 1e-12) in float32, with a finite gradient at zero."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def cosine_attention(
    qkv: Float[Array, "b windows n 3c"], scale: Float[Array, "heads"], bias: Float[Array, "heads n n"],
    mask: np.ndarray | None,
) -> Float[Array, "b windows n c"]:
  """Attention by cosine similarity times `scale`, plus `bias`; logits and softmax in float32."""
  b, windows, n, c = qkv.shape
  heads = scale.shape[0]
  q, k, v = jnp.unstack(qkv.reshape(b * windows, n, 3, heads, -1), axis=2)
  q, k = (_unit(q) * scale[:, None]).astype(qkv.dtype), _unit(k).astype(qkv.dtype)
  logits = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32) + bias
  if mask is not None:
    logits = logits.reshape(b, windows, heads, n, n) + mask[:, None]
    logits = logits.reshape(b * windows, heads, n, n)
  # Softmax, with its division after the product instead of before it: on d instead of n numbers a query.
  largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
  weights = jnp.exp(logits - largest)
  total = jnp.swapaxes(jnp.sum(weights, axis=-1), 1, 2)[..., None]
  x = jnp.einsum("bhnm,bmhd->bnhd", weights.astype(qkv.dtype), v, preferred_element_type=jnp.float32)
  return (x / total).astype(qkv.dtype).reshape(b, windows, n, c // 3)


def attend_in_windows(
    x: Float[Array, "b h w c"], window_size: int, shifted: bool, attention: Callable[..., Array]
) -> Float[Array, "b h w c"]:
  """Pads right and bottom to whole windows, shifts, attends, and undoes both.

  Args:
    attention: of (x [b, windows, n, c], window (height, width) in effect, mask or None).
  """
  b, height, width, c = x.shape
  window = (min(window_size, height), min(window_size, width))
  rows, columns = -(-height // window[0]), -(-width // window[1])
  padded = (rows * window[0], columns * window[1])
  shift = tuple(
      side // 2 if shifted and side < length else 0 for side, length in zip(window, (height, width)))
  if padded != (height, width):
    x = jnp.pad(x, ((0, 0), (0, padded[0] - height), (0, padded[1] - width), (0, 0)))
  if any(shift):
    x = jnp.roll(x, (-shift[0], -shift[1]), axis=(1, 2))
  x = x.reshape(b, rows, window[0], columns, window[1], c).transpose(0, 1, 3, 2, 4, 5)
  x = x.reshape(b, rows * columns, window[0] * window[1], c)
  x = attention(x, window, shift_mask(padded, window, shift))
  x = x.reshape(b, rows, columns, window[0], window[1], c).transpose(0, 1, 3, 2, 4, 5)
  x = x.reshape(b, *padded, c)
  if any(shift):
    x = jnp.roll(x, shift, axis=(1, 2))
  return x[:, :height, :width]
