"""Maps cut into patches, and neighbouring cells joined."""

import jax.numpy as jnp
from jaxtyping import Float

from frozen_vision.ops.arrays import Array


def patches(images: Float[Array, "b h w c"], size: int) -> Float[Array, "b rows columns d"]:
  """Squares of size x size pixels as vectors, row by row, channels last; the image is padded with zeros."""
  x = pad_to_multiple(images, size)
  b, height, width, c = x.shape
  rows, columns = height // size, width // size
  x = x.reshape(b, rows, size, columns, size, c).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, rows, columns, -1)


def join_neighbours(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
  """2 x 2 neighbours as one cell of 4 c channels, as Swin's patch merging joins them."""
  x = pad_to_multiple(x, 2)
  b, height, width, c = x.shape
  x = x.reshape(b, height // 2, 2, width // 2, 2, c)
  # Order of the released code: (0,0), (1,0), (0,1), (1,1), so the column offset is the slower one.
  return x.transpose(0, 1, 3, 4, 2, 5).reshape(b, height // 2, width // 2, 4 * c)


def pad_to_multiple(x: Float[Array, "b h w c"], multiple: int) -> Float[Array, "b h2 w2 c"]:
  """Zeros at the bottom and the right, up to whole multiples."""
  bottom, right = -x.shape[1] % multiple, -x.shape[2] % multiple
  return jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0))) if bottom or right else x
