"""Turns class scores of padded frames into label maps at original sizes: windows, mirroring, several scales.

Static shapes throughout: what differs between images is where their content ends, and how many tiles are
filled.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, UInt8

from frozen_vision.devices import sharding
from frozen_vision.ops import resize
from frozen_vision.ops.arrays import Array
from frozen_vision.ops.mirror import mirror

# images [b, h, w, 3] uint8, sizes [b, 2] (h, w) of the content -> scores [b, h, w, k] of the whole frame
Scorer = Callable[[jax.Array, jax.Array], jax.Array]

# A tile of the result, (height, width): the only part of it that exists with all its classes' scores.
_TILE = (32, 128)


class View(NamedTuple):
  """Scores of one way to look at the images.

  Attributes:
    scores: of the whole padded frame, in the upright orientation.
    sizes: (h, w) of the content.
  """

  scores: Float[Array, "b h w k"]
  sizes: Int[Array, "b 2"]


def mirrored(scorer: Scorer) -> Scorer:
  """Scores of the mirrored image, turned back."""

  def score(images: jax.Array, sizes: jax.Array) -> jax.Array:
    return mirror(scorer(mirror(images, sizes), sizes), sizes)

  return score


def sliding(scorer: Scorer, window: tuple[int, int], stride: tuple[int, int]) -> Scorer:
  """Scores of overlapping windows, averaged where they overlap.

  Windows stand where mmseg's `slide_inference` has them: every `stride` pixels, and the last one of a row or
  column moved back to the content's end. Content smaller than the window is padded, as it is in training.

  Args:
    window: (height, width) that the model sees at once.
    stride: from one window to the next, (down, right), at most the window.
  """

  def score(images: jax.Array, sizes: jax.Array) -> jax.Array:
    frame = images.shape[1:3]
    side = tuple(min(w, f) for w, f in zip(window, frame))
    grid = [_count(f, w, s) for f, w, s in zip(frame, side, stride)]
    needed = jnp.stack([_count(sizes[:, axis], side[axis], stride[axis]) for axis in (0, 1)], axis=1)

    def add(total: tuple[jax.Array, jax.Array], cell: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
      last = jnp.maximum(sizes - jnp.asarray(side), 0)
      start = jnp.minimum(cell * jnp.asarray(stride), last)

      def cut(image, at):
        return jax.lax.dynamic_slice(image, (at[0], at[1], 0), (*side, 3))

      parts = jax.vmap(cut)(images, start)
      inside = jnp.minimum(sizes - start, jnp.asarray(side))
      # An image that needs fewer windows than the frame has room for sees its last one again, for nothing.
      weight = jnp.all(cell < needed, axis=1).astype(jnp.float32)[:, None, None, None]
      scores = scorer(parts, inside).astype(jnp.float32) * weight

      def put(sums: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
        place = (at[0], at[1], 0)
        return jax.lax.dynamic_update_slice(sums, jax.lax.dynamic_slice(sums, place, new.shape) + new, place)

      counts = jnp.broadcast_to(weight, (*scores.shape[:3], 1))
      return (jax.vmap(put)(total[0], scores, start), jax.vmap(put)(total[1], counts, start)), None

    example = jax.eval_shape(
      scorer,
      jax.ShapeDtypeStruct((images.shape[0], *side, 3), images.dtype),
      jax.ShapeDtypeStruct(sizes.shape, sizes.dtype),
    )

    def zeros(channels):
      return jnp.zeros((images.shape[0], *frame, channels), jnp.float32)

    cells = jnp.stack(jnp.meshgrid(*(jnp.arange(n) for n in grid), indexing="ij"), axis=-1).reshape(-1, 2)
    (sums, counts), _ = jax.lax.scan(add, (zeros(example.shape[-1]), zeros(1)), cells)
    return sums / jnp.maximum(counts, 1.0)

  return score


def _count(length, window: int, stride: int):
  """Windows along an axis of `length` pixels, an integer or an array of them."""
  over = length - window + stride - 1
  return (max(over, 0) if isinstance(over, int) else jnp.maximum(over, 0)) // stride + 1


def label_maps(
  views: Sequence[View], original_size: Int[Array, "b 2"], largest: tuple[int, int]
) -> UInt8[Array, "b y x"]:
  """The class with the largest mean score at every pixel of the original images.

  The order is the official one: every view's scores are resized to the original size (bilinear, align_corners
  False), then averaged, then compared. That never exists as a whole, 150 scores for each pixel of a large
  photograph: the result is made in tiles, and an image costs as many as it covers.

  Args:
    original_size: (h, w) of every image.
    largest: (h, w) that no image exceeds; fixes the shape of the result.

  Returns:
    Class of every pixel; y and x are `largest` rounded up to whole tiles, what lies outside of an image is 0.
  """
  shape = tuple(-(-side // tile) * tile for side, tile in zip(largest, _TILE))

  def one(arguments: tuple[list[View], jax.Array]) -> jax.Array:
    return _label_map(*arguments, shape)

  return sharding.per_device(lambda *arrays: jax.lax.map(one, arrays))(list(views), original_size)


def _label_map(
  views: Sequence[View], original: Int[Array, "2"], shape: tuple[int, int]
) -> UInt8[Array, "y x"]:
  """`label_maps` of one image: views without their first axis, `shape` of the result in whole tiles."""
  tiles = -(-original // jnp.asarray(_TILE))

  def row_of_tiles(i: jax.Array, result: jax.Array) -> jax.Array:
    # Rows are resized once for all tiles beside each other.
    rows = [resize.resize_rows(v.scores, i * _TILE[0], _TILE[0], v.sizes[0], original[0]) for v in views]

    def tile(j: jax.Array, result: jax.Array) -> jax.Array:
      classes = _tile_classes(rows, [v.sizes[1] for v in views], (i, j), original)
      return jax.lax.dynamic_update_slice(result, classes, (i * _TILE[0], j * _TILE[1]))

    return jax.lax.fori_loop(0, tiles[1], tile, result)

  return jax.lax.fori_loop(0, tiles[0], row_of_tiles, jnp.zeros(shape, jnp.uint8))


def _tile_classes(
  rows: Sequence[Float[Array, "y _w k"]],
  widths: Sequence[Int[Array, ""]],
  position: tuple[jax.Array, jax.Array],
  original: Int[Array, "2"],
) -> UInt8[Array, "y x"]:
  """Classes of one tile, 0 outside of the image.

  Args:
    rows: of each view, its scores at the tile's rows of the original image, at the view's own width.
    widths: of each view's content.
    position: of the tile, counted in tiles from the top and the left.
    original: (h, w) of the image.
  """
  total = sum(
    resize.resize_rows(x.swapaxes(0, 1), position[1] * _TILE[1], _TILE[1], width, original[1])
    for x, width in zip(rows, widths)
  )
  classes = jnp.argmax(total, axis=-1).astype(jnp.uint8).T
  y, x = (jnp.arange(n) + at * n < side for n, at, side in zip(_TILE, position, original))
  return jnp.where(y[:, None] & x[None, :], classes, 0)
