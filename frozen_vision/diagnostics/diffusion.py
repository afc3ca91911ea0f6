"""Attentive diffusion: over how much of an image attention spreads (arXiv 2011.13377, appendix A.9).

A square of the mean colour slides over the image. How much the features change where it covers a pixel is the
attention to that pixel; the fraction of pixels with more than the mean attention is the diffusion. The
paper's repository has no code for it, and the colour of its square is not stated.
"""

from collections.abc import Callable
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from frozen_vision.backbones.base import Backbone
from frozen_vision.ops.arrays import Array

SIZE = 10  # side of the square in pixels


@dataclasses.dataclass(frozen=True)
class Diffusion:
  """Attention to the cells of one image.

  Attributes:
    attention: root relative squared error of the features while a cell is covered, averaged over all places
      of the square that cover it; a cell is a square of `stride` pixels.
    diffusion: the fraction of cells whose attention is above the mean, in 0..1.
  """

  attention: Float[np.ndarray, "rows columns"]
  diffusion: float


def measure(
  backbone: Backbone,
  images: Float[Array, "n h w 3"],
  *,
  size: int = SIZE,
  stride: int = 1,
  batch_size: int = 32,
) -> list[Diffusion]:
  """Attention of a backbone's embedding to every image.

  Args:
    images: normalised; their sides are multiples of the stride.
    size: side of the square in pixels, a multiple of the stride.
    stride: pixels between two places of the square. The paper's is 1: 54,289 places for 224 x 224 pixels.
    batch_size: places that one pass looks at.

  Raises:
    ValueError: sides or a size that are no multiples of the stride, or a size that is no less than the sides.
  """
  graphdef, state = nnx.split(backbone)

  def embed(state, images):
    return nnx.merge(graphdef, state).embed(images)

  found = errors(embed, state, images, size=size, stride=stride, batch_size=batch_size)
  maps = [mean_of_coverings(each, size // stride) for each in found]
  return [Diffusion(attention, diffusion(attention)) for attention in maps]


def errors(
  embed: Callable[..., Float[Array, "b d"]],
  state: object,
  images: Float[Array, "n h w 3"],
  *,
  size: int,
  stride: int,
  batch_size: int,
) -> Float[np.ndarray, "n rows columns"]:
  """Root relative squared error of the features at every place of the square.

  The square begins outside of the image and ends outside, so that every pixel is covered equally often. The
  error is that of the features' vector, relative to its deviation from its own mean:
  sqrt(sum (f - g)^2 / sum (f - mean f)^2).

  Args:
    embed: (state, normalised images) -> features.
    size, stride, batch_size: as in `measure`.

  Raises:
    ValueError: as `measure` does.
  """
  height, width = images.shape[1:3]
  if stride < 1 or size % stride or height % stride or width % stride:
    raise ValueError(
      f"An image of {height} x {width} px and a square of {size} px cannot be covered in steps of {stride} "
      "px; expected multiples of the step."
    )
  if not 0 < size < min(height, width):
    raise ValueError(f"The square has {size} px and the image {height} x {width}; expected a smaller square.")
  tops, lefts = (np.arange(stride - size, side, stride) for side in (height, width))
  places = np.stack(np.meshgrid(tops, lefts, indexing="ij"), -1).reshape(-1, 2)
  count = len(places)
  places = np.concatenate([places, np.repeat(places[-1:], -count % batch_size, axis=0)])
  run, places = _errors(embed, size), jnp.asarray(places.reshape(-1, batch_size, 2))
  found = np.stack([np.asarray(run(state, jnp.asarray(image), places)).reshape(-1) for image in images])
  return found[:, :count].reshape(-1, len(tops), len(lefts))


def mean_of_coverings(
  errors: Float[np.ndarray, "rows columns"], coverings: int
) -> Float[np.ndarray, "cell_rows cell_columns"]:
  """The mean over all places of the square that cover a cell.

  Args:
    errors: of every place, the first of which covers the last of the square's cells only.
    coverings: cells of the image along a side of the square.
  """
  windows = np.lib.stride_tricks.sliding_window_view(np.asarray(errors, np.float64), (coverings, coverings))
  return windows.mean(axis=(-2, -1))


def diffusion(attention: Float[np.ndarray, "rows columns"]) -> float:
  """The fraction of cells above the mean."""
  return float(np.mean(attention > attention.mean()))


def _errors(embed, size: int):
  @jax.jit
  def run(state, image, places):
    clean = embed(state, image[None])[0].astype(jnp.float32)
    scale = jnp.sum((clean - clean.mean()) ** 2)

    def one_batch(corners):
      covered = [
        (jnp.arange(side) >= corners[:, axis, None]) & (jnp.arange(side) < corners[:, axis, None] + size)
        for axis, side in enumerate(image.shape[:2])
      ]
      mask = covered[0][:, :, None] & covered[1][:, None, :]
      features = embed(state, jnp.where(mask[..., None], 0.0, image)).astype(jnp.float32)
      return jnp.sqrt(jnp.sum((features - clean) ** 2, axis=-1) / scale)

    return jax.lax.map(one_batch, places)

  return run
