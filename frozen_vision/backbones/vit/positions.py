"""Positions of plain ViTs: learned and fixed tables at any size, rotary angles, and biases of offsets."""

import math

import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from frozen_vision.backbones.vit.config import Resize
from frozen_vision.layers.relative_positions import position_index
from frozen_vision.ops import bicubic
from frozen_vision.ops.arrays import Array


def sine_table(grid: int, channels: int) -> np.ndarray:
  """[grid * grid, channels] float32 positions of MAE: sine and cosine of the column, then of the row."""
  frequencies = 1 / 10000 ** (np.arange(channels // 4) / (channels / 4))
  angles = np.arange(grid)[:, None] * frequencies
  of_axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
  columns = np.broadcast_to(of_axis[None], (grid, grid, channels // 2))
  rows = np.broadcast_to(of_axis[:, None], (grid, grid, channels // 2))
  return np.concatenate([columns, rows], axis=-1).reshape(grid * grid, channels).astype(np.float32)


def resize_table(
  table: Float[Array, "positions c"], grid: int, size: tuple[int, int], resize: Resize
) -> Float[Array, "_ c"]:
  """Positions of the patches at another size, float32, row by row; see `ViTConfig.position_resize`.

  Args:
    table: positions of `grid` x `grid` cells.
    size: rows and columns wanted.
  """
  table = table.astype(jnp.float32)
  if size == (grid, grid):
    return table
  scale = tuple((length + 0.1) / grid for length in size) if resize == "bicubic_scale" else None
  cells = bicubic.resize_bicubic(
    table.reshape(grid, grid, -1), size, antialias=resize == "bicubic_antialias", scale=scale
  )
  return cells.reshape(size[0] * size[1], -1)


def relative_rows(grid: int, class_token: bool) -> int:
  """Rows of a table of biases: one per offset, and three of the class token (`relative_bias`)."""
  return (2 * grid - 1) ** 2 + 3 * class_token


def relative_bias(
  table: Float[Array, "offsets heads"], grid: int, size: tuple[int, int], class_token: bool, resize: Resize
) -> Float[Array, "heads n n"]:
  """The bias of every (query, key) pair of tokens, float32 (BEiT, arXiv 2106.08254; feature distillation).

  Args:
    table: biases of offsets between cells, query minus key, row by row; behind them those of class token to
      patch, patch to class token, and class token to itself, in this order.
    grid: cells per side that the table is stored for; for another size its offsets are resized bicubically,
      which is our choice: the released code knows one size.
    size: rows and columns of the patches.
  """
  rows, columns = size
  offsets = (2 * grid - 1) ** 2
  table = table.astype(jnp.float32)
  by_offset = table[:offsets].reshape(2 * grid - 1, 2 * grid - 1, -1)
  if size != (grid, grid):
    antialias = resize == "bicubic_antialias"
    by_offset = bicubic.resize_bicubic(by_offset, (2 * rows - 1, 2 * columns - 1), antialias=antialias)
  pairs = by_offset.reshape(-1, table.shape[1])[position_index(size)]
  pairs = jnp.moveaxis(pairs, -1, 0)
  if not class_token:
    return pairs
  to_patch, from_patch, to_itself = table[offsets:, :, None, None]
  heads, patches = pairs.shape[:2]
  first = jnp.concatenate([to_itself, jnp.broadcast_to(to_patch, (heads, 1, patches))], axis=2)
  others = jnp.concatenate([jnp.broadcast_to(from_patch, (heads, patches, 1)), pairs], axis=2)
  return jnp.concatenate([first, others], axis=1)


def rotary_periods(base: float, head_dim: int) -> np.ndarray:
  """[head_dim / 4] float32 periods base^(i / n), i < n = head_dim / 4, in units of half an image side."""
  quarter = head_dim // 4
  return (np.float32(base) ** (np.arange(quarter, dtype=np.float32) / np.float32(quarter))).astype(np.float32)


def rotary_angles(periods: Float[Array, " q"], size: tuple[int, int]) -> Float[Array, "cells d"]:
  """Angle of every patch and channel of a head, float32 (DINOv3).

  Coordinates of rows and columns run from -1 to 1 over the centers of the cells. The angles of the row and of
  the column are put side by side, and repeated for the second half of the channels.
  """
  rows, columns = (2 * (jnp.arange(length) + 0.5) / length - 1 for length in size)
  periods = periods.astype(jnp.float32)
  by_row, by_column = (2 * math.pi * axis[:, None] / periods for axis in (rows, columns))
  shape = (*size, periods.shape[0])
  angles = jnp.concatenate(
    [jnp.broadcast_to(by_row[:, None], shape), jnp.broadcast_to(by_column[None], shape)], axis=-1
  )
  return jnp.tile(angles.reshape(size[0] * size[1], -1), (1, 2))


def rotate(
  x: Float[Array, "b n heads d"], cosine: Float[Array, "cells d"], sine: Float[Array, "cells d"]
) -> Float[Array, "b n heads d"]:
  """Turns the channels of the patches' queries or keys in float32; tokens before the patches stay."""
  prefix = x.shape[1] - cosine.shape[0]
  patches = x[:, prefix:].astype(jnp.float32)
  first, second = jnp.split(patches, 2, axis=-1)
  turned = patches * cosine[:, None] + jnp.concatenate([-second, first], axis=-1) * sine[:, None]
  return jnp.concatenate([x[:, :prefix], turned.astype(x.dtype)], axis=1)
