"""Bilinear resizing of maps whose cells have a place in the image."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int
import numpy as np

from frozen_vision.ops.arrays import Array


def upsample(x: Float[Array, "b h w c"], factor: int, size: tuple[int, int]) -> Float[Array, "b y x c"]:
  """Bilinear upsampling by a whole factor, cut to `size`.

  Cell i covers the output cells [factor * i, factor * (i + 1)), as a map of stride `factor` does of the
  image, so that a map of an image whose sides are no multiples of the stride stays in place: it is cut, where
  PyTorch's `interpolate` to the image's size would squeeze it. For multiples the two are the same
  (align_corners False).

  Raises:
    ValueError: the map is too small for `size`.
  """
  full = (x.shape[1] * factor, x.shape[2] * factor)
  if full[0] < size[0] or full[1] < size[1]:
    raise ValueError(f"A map of {x.shape[1:3]} cells, {factor} pixels each, does not cover {size} pixels.")
  if factor > 1:
    x = jax.image.resize(x, (x.shape[0], *full, x.shape[3]), "bilinear")
  return x[:, : size[0], : size[1]]


def average_pool_matrix(size_in: int, size_out: int) -> np.ndarray:
  """[size_out, size_in] weights of PyTorch's adaptive average pooling.

  Of n cells, bin i of k is [i n / k, (i + 1) n / k), rounded outwards.
  """
  matrix = np.zeros((size_out, size_in), np.float32)
  for i in range(size_out):
    start, stop = i * size_in // size_out, -(-(i + 1) * size_in // size_out)
    matrix[i, start:stop] = 1 / (stop - start)
  return matrix


def adaptive_average_pool(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b y x c"]:
  """Means of size[0] x size[1] bins that cover the map and may overlap by a cell."""
  rows = jnp.asarray(average_pool_matrix(x.shape[1], size[0]), x.dtype)
  columns = jnp.asarray(average_pool_matrix(x.shape[2], size[1]), x.dtype)
  return jnp.einsum("yh,xw,bhwc->byxc", rows, columns, x)


def resize_bilinear(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b y x c"]:
  """To any size, without smoothing (PyTorch's `interpolate`, align_corners False)."""
  return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "bilinear", antialias=False)


def resize_rows(
  x: Float[Array, "h w k"],
  first: Int[Array, ""] | int,
  count: int,
  content: Int[Array, ""],
  target: Int[Array, ""],
) -> Float[Array, "count w k"]:
  """Rows first .. first + count - 1 of the first `content` rows resized to `target` rows, bilinearly.

  `content` and `target` may differ between images of a batch: shapes stay. Rows from `target` on repeat the
  last one.
  """
  at = (first + jnp.arange(count) + 0.5) * (content.astype(jnp.float32) / target) - 0.5
  at = jnp.clip(at, 0, content - 1)
  low = jnp.floor(at).astype(jnp.int32)
  weight = (at - low)[:, None, None]
  return x[low] * (1 - weight) + x[jnp.minimum(low + 1, content - 1)] * weight


def resize_content(
  x: Float[Array, "h w k"],
  content: Int[Array, "2"],
  target: Int[Array, "2"],
  largest: tuple[int, int],
) -> Float[Array, "y x k"]:
  """The content at the upper left of a map, resized to `target` (height, width) at the upper left of another.

  Args:
    largest: (height, width) of the result; what lies beyond `target` repeats its edge.
  """
  rows = resize_rows(x, 0, largest[0], content[0], target[0])
  return resize_rows(rows.swapaxes(0, 1), 0, largest[1], content[1], target[1]).swapaxes(0, 1)
