"""Bicubic resizing as PyTorch's `interpolate` does it, with and without antialiasing.

The two differ in the kernel as well: a = -0.75 without antialiasing, -0.5 with it. `jax.image.resize` has
-0.5 always, and weights that sum to one at the border, where PyTorch repeats the border's cells.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from frozen_vision.ops.arrays import Array


@functools.lru_cache(maxsize=64)
def bicubic_matrix(
  size_in: int, size_out: int, *, antialias: bool = False, scale: float | None = None
) -> np.ndarray:
  """[size_out, size_in] float32 weights of a bicubic resize along one axis (align_corners False).

  Args:
    antialias: widen the kernel where the axis shrinks, and leave out what is beyond the border.
    scale: output cells per input cell, where it is given to `interpolate` as `scale_factor`: cells are then
      placed by it instead of by the ratio of the sizes.
  """
  step = size_in / size_out if scale is None else 1 / scale
  centers = (np.arange(size_out) + 0.5) * step
  matrix = np.zeros((size_out, size_in))
  if not antialias:
    for i, center in enumerate(centers - 0.5):
      first = int(np.floor(center)) - 1
      for cell in range(first, first + 4):
        matrix[i, min(max(cell, 0), size_in - 1)] += _cubic(abs(center - cell), -0.75)
    return matrix.astype(np.float32)
  width = max(step, 1.0)
  for i, center in enumerate(centers):
    start = max(int(center - 2 * width + 0.5), 0)
    stop = min(int(center + 2 * width + 0.5), size_in)
    weights = np.array([_cubic(abs(cell - center + 0.5) / width, -0.5) for cell in range(start, stop)])
    matrix[i, start:stop] = weights / weights.sum()
  return matrix.astype(np.float32)


def resize_bicubic(
  x: Float[Array, "h w c"],
  size: tuple[int, int],
  *,
  antialias: bool = False,
  scale: tuple[float, float] | None = None,
) -> Float[Array, "y x c"]:
  """A map at another size, float32; see `bicubic_matrix`.

  Args:
    size: (height, width) of the result.
    scale: of rows and columns, instead of the ratio of the sizes.
  """
  scales = scale or (None, None)
  rows, columns = (
    jnp.asarray(bicubic_matrix(length, wanted, antialias=antialias, scale=factor))
    for length, wanted, factor in zip(x.shape[:2], size, scales)
  )
  return jnp.einsum("yh,xw,hwc->yxc", rows, columns, x.astype(jnp.float32), precision="highest")


def _cubic(distance: float, a: float) -> float:
  """The convolution kernel of Keys (1981)."""
  if distance <= 1:
    return ((a + 2) * distance - (a + 3)) * distance * distance + 1
  if distance < 2:
    return ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
  return 0.0
