"""Anchor boxes on a regular grid (Faster R-CNN, section 3.1.1), in mmdet's layout."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Num
import numpy as np

from frozen_vision.ops.arrays import Array


def grid_anchors(
  height: int,
  width: int,
  stride: int,
  scales: Sequence[float] = (8,),
  ratios: Sequence[float] = (0.5, 1, 2),
) -> Float[Array, "n 4"]:
  """All anchors of one pyramid level.

  An anchor of scale s and ratio r (height / width) has the area of (stride * s)^2 and is centred at
  (stride * column, stride * row): mmdet 3.x uses no centre offset.

  Args:
    height: rows of the feature map.
    width: columns of the feature map.
    stride: input pixels per cell.
    scales: side lengths of the square anchor, in strides.
    ratios: height over width.

  Returns:
    float32 xyxy in input pixels, n = height * width * anchors per cell. Order: row, column, ratio, scale
    (slowest to fastest), the order of a [height, width, anchors] map of predictions. Computed where it is
    used: as constants, those of large images would be tens of megabytes of program.
  """
  root = np.sqrt(np.asarray(ratios, np.float32))[:, None]
  sides = np.float32(stride) * np.asarray(scales, np.float32)[None, :]
  half_width = 0.5 * (sides / root).reshape(-1)
  half_height = 0.5 * (sides * root).reshape(-1)
  base = np.stack([-half_width, -half_height, half_width, half_height], axis=-1)
  y, x = jnp.meshgrid(
    jnp.arange(height, dtype=jnp.float32) * stride,
    jnp.arange(width, dtype=jnp.float32) * stride,
    indexing="ij",
  )
  centers = jnp.stack([x, y, x, y], axis=-1)
  return (centers[:, :, None, :] + base).reshape(-1, 4)


def inside_flags(
  anchors: Num[Array, "n 4"],
  image_size: Int[Array, "*batch 2"],
  allowed_border: float,
) -> Bool[Array, "*batch n"]:
  """Anchors that reach at most `allowed_border` pixels out of the image.

  Args:
    anchors: xyxy in input pixels, shared by all images.
    image_size: (height, width) of each image.
    allowed_border: tolerance in pixels; a negative value accepts every anchor, as in mmdet.
  """
  anchors = jnp.asarray(anchors, jnp.float32)
  image_size = jnp.asarray(image_size, jnp.float32)
  if allowed_border < 0:
    return jnp.ones((*image_size.shape[:-1], anchors.shape[0]), bool)
  height, width = image_size[..., 0, None], image_size[..., 1, None]
  x1, y1, x2, y2 = (anchors[:, i] for i in range(4))
  # Strict on the right and bottom only, as mmdet's `anchor_inside_flags`.
  return (
    (x1 >= -allowed_border)
    & (y1 >= -allowed_border)
    & (x2 < width + allowed_border)
    & (y2 < height + allowed_border)
  )


def center_inside(anchors: Num[Array, "n 4"], image_size: Int[Array, "b 2"]) -> Bool[Array, "b n"]:
  """Anchors whose cell begins inside the image, and not in its padding (mmdet's `valid_flags`).

  Args:
    anchors: xyxy in input pixels, shared by all images.
    image_size: (height, width) of each image's content.
  """
  centers = 0.5 * (anchors[:, :2] + anchors[:, 2:])
  return (centers[None] < image_size[:, None, ::-1]).all(-1)
