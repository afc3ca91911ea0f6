"""Relative positions of the cells of a grid, which SwinV2 and plain ViTs look their biases up by."""

import jax.numpy as jnp
from jaxtyping import Int

from frozen_vision.ops.arrays import Array


def position_index(window: tuple[int, int]) -> Int[Array, "n n"]:
  """Row of the bias table for each (query, key) pair of a window of n = h*w cells.

  Computed in the program: as a constant it would be megabytes of each program with large windows.
  """
  height, width = window
  rows, columns = jnp.divmod(jnp.arange(height * width), width)
  down = rows[:, None] - rows[None, :] + height - 1
  right = columns[:, None] - columns[None, :] + width - 1
  return down * (2 * width - 1) + right
