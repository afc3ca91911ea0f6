"""Random masks of image patches, and the pixels that are predicted under them."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from frozen_vision.ops.arrays import Array


def random_masks(
  rng: jax.Array, numbers: Int[Array, "b"], size: tuple[int, int], ratio: float
) -> Bool[Array, "b rows columns"]:
  """Masks of which each has exactly ceil(ratio * cells) cells, drawn without replacement (SimMIM).

  Args:
    rng: key; a mask depends on it and on its own number alone.
    numbers: of the masks, one each.
    size: rows and columns.
    ratio: fraction of the cells that is masked, in 0..1.
  """
  cells = size[0] * size[1]
  masked = math.ceil(cells * ratio)

  def one(number: jax.Array) -> Array:
    order = jax.random.permutation(jax.random.fold_in(rng, number), cells)
    return (order < masked).reshape(size)

  return jax.vmap(one)(numbers)


def enlarged(mask: Bool[Array, "b rows columns"], size: tuple[int, int]) -> Bool[Array, "b h w"]:
  """A mask on a finer grid: every cell is repeated.

  Raises:
    ValueError: a grid that is no whole multiple of the mask's.
  """
  factors = [wanted // side for wanted, side in zip(size, mask.shape[1:])]
  if any(wanted != factor * side for wanted, factor, side in zip(size, factors, mask.shape[1:])):
    raise ValueError(
      f"A mask of {mask.shape[1:]} cells cannot be repeated to {size}; expected whole multiples."
    )
  return jnp.repeat(jnp.repeat(mask, factors[0], axis=1), factors[1], axis=2)


def local_statistics(
  images: Float[Array, "b h w c"], window: int
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
  """Mean and standard deviation of the window around every pixel, by channel, float32.

  Only pixels inside the image count. The variance is unbiased, at least 0, and has 1e-6 added, as in the
  released code of SwinV2's SimMIM.

  Args:
    window: odd side of the window in pixels, at least 3.

  Raises:
    ValueError: an even window, or one of a single pixel, which has no unbiased variance.
  """
  if window % 2 == 0 or window < 3:
    raise ValueError(
      f"The window of local statistics is {window}; expected an odd number of pixels from 3 on."
    )
  x = images.astype(jnp.float32)
  count = _window_sum(jnp.ones((1, *x.shape[1:3], 1)), window)
  mean = _window_sum(x, window) / count
  square = _window_sum(x * x, window) / count
  variance = jnp.maximum((square - mean * mean) * (count / (count - 1)), 0)
  return mean, jnp.sqrt(variance + 1e-6)


def _window_sum(x: Float[Array, "b h w c"], window: int) -> Float[Array, "b h w c"]:
  """Sums over windows, rows first and then columns; outside of the image is zero."""
  for axis in (1, 2):
    shape = [1, 1, 1, 1]
    shape[axis] = window
    x = jax.lax.reduce_window(x, 0.0, jax.lax.add, shape, (1, 1, 1, 1), "SAME")
  return x
