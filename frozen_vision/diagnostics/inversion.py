"""Images from features alone: what a backbone's last map keeps of an image (arXiv 2011.13377, appendix A.8).

A convolutional network with random weights is trained to make, of one fixed noise, an image whose features
are those of the image in question (deep image prior, arXiv 1711.10925). Nothing else of the image is used, so
what is missing in the result is what the features do not keep, or the network cannot draw.
"""

from collections.abc import Callable, Sequence
import dataclasses
import logging
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float, Num
import numpy as np
import optax

from frozen_vision.backbones.base import Backbone
from frozen_vision.layers.convolution import MapConv
from frozen_vision.ops.arrays import Array

_logger = logging.getLogger(__name__)

STEPS = 3000
LEARNING_RATE = 1e-3
WIDTHS = (16, 32, 64, 128, 128)
_NOISE_CHANNELS = 32
_SKIP_CHANNELS = 4
_CHUNK = 50  # steps that are compiled as one loop


@dataclasses.dataclass(frozen=True)
class Reconstruction:
  """One image from its features.

  Attributes:
    image: RGB in 0..255.
    distances: squared distance of its features to those of the original, relative to their squared norm, at
      every step.
  """

  image: Float[np.ndarray, "h w 3"]
  distances: Float[np.ndarray, "steps"]


class ImagePrior(nnx.Module):
  """An encoder and a decoder with narrow connections between equal resolutions, from noise to an image.

  Args:
    widths: channels of the levels; each halves the resolution of the one before.
  """

  def __init__(self, widths: Sequence[int] = WIDTHS, *, rngs: nnx.Rngs):
    inputs = (_NOISE_CHANNELS, *widths[:-1])
    outputs = (*widths[1:], widths[-1])
    self.skips = nnx.List([_Layer(n, _SKIP_CHANNELS, 1, rngs=rngs) for n in inputs])
    self.down = nnx.List([_Layer(n, width, 3, 2, rngs=rngs) for n, width in zip(inputs, widths)])
    self.deeper = nnx.List([_Layer(width, width, 3, rngs=rngs) for width in widths])
    self.up = nnx.List([_Layer(_SKIP_CHANNELS + n, width, 3, rngs=rngs) for n, width in zip(outputs, widths)])
    self.colours = MapConv(widths[0], 3, (1, 1), rngs=rngs)

  def __call__(self, noise: Float[Array, "h w c"]) -> Float[Array, "h w 3"]:
    """RGB in 0..1."""
    x, kept = noise[None], []
    for skip, down, deeper in zip(self.skips, self.down, self.deeper):
      kept.append(skip(x))
      x = deeper(down(x))
    for skip, up in zip(reversed(kept), reversed(list(self.up))):
      x = jax.image.resize(x, (*skip.shape[:3], x.shape[-1]), "linear")
      x = up(jnp.concatenate([skip, x], axis=-1))
    return jax.nn.sigmoid(self.colours(x))[0]


class _Layer(nnx.Module):
  """Convolution, norm of every channel over the image, leaky ReLU."""

  def __init__(self, inputs: int, outputs: int, size: int, strides: int = 1, *, rngs: nnx.Rngs):
    self.conv = MapConv(inputs, outputs, (size, size), strides=strides, rngs=rngs)
    self.norm = nnx.GroupNorm(outputs, num_groups=outputs, rngs=rngs)

  def __call__(self, x: Float[Array, "1 h w c"]) -> Float[Array, "1 h2 w2 d"]:
    return jax.nn.leaky_relu(self.norm(self.conv(x)), 0.2)


def reconstruct(
  backbone: Backbone,
  images: Num[Array, "n h w 3"],
  *,
  steps: int = STEPS,
  learning_rate: float = LEARNING_RATE,
  widths: Sequence[int] = WIDTHS,
  seed: int = 0,
) -> list[Reconstruction]:
  """Draws, for every image, one that has its last feature map.

  Args:
    images: RGB in 0..255, sides of any length.
    steps, learning_rate: of Adam; the defaults are the paper's.
    widths: of the network that draws; its architecture is ours, since the paper does not state its own.
    seed: of its noise and weights.
  """
  graphdef, state = nnx.split(backbone)

  def features(state, pixels):
    module = nnx.merge(graphdef, state)
    return module(module.preprocessing.normalise(pixels[None]))[-1].astype(jnp.float32)

  return invert(features, state, images, steps=steps, learning_rate=learning_rate, widths=widths, seed=seed)


def invert(
  features: Callable[[Any, Float[Array, "h w 3"]], Array],
  state: Any,
  images: Num[Array, "n h w 3"],
  *,
  steps: int,
  learning_rate: float,
  widths: Sequence[int],
  seed: int,
) -> list[Reconstruction]:
  """`reconstruct` of any function of (state, RGB in 0..255)."""
  if steps < 1:
    raise ValueError(f"steps is {steps}; expected 1 or more.")
  rngs = nnx.Rngs(seed)
  graphdef, weights = nnx.split(ImagePrior(widths, rngs=rngs))
  noise = 0.1 * jax.random.uniform(rngs.noise(), (*images.shape[1:3], _NOISE_CHANNELS))
  tx = optax.adam(learning_rate)

  def draw(weights):
    return 255.0 * nnx.merge(graphdef, weights)(noise)

  @jax.jit
  def some_steps(carry, state, target, chunk):
    def step(carry, _):
      weights, moments = carry

      def distance(weights):
        return jnp.sum((features(state, draw(weights)) - target) ** 2) / jnp.sum(target**2)

      value, grads = jax.value_and_grad(distance)(weights)
      updates, moments = tx.update(grads, moments)
      return (optax.apply_updates(weights, updates), moments), value

    return jax.lax.scan(step, carry, chunk)

  compiled_features, compiled_draw = jax.jit(features), jax.jit(draw)
  reconstructions = []
  for image in images:
    target = compiled_features(state, jnp.asarray(image, jnp.float32))
    carry, values = (weights, tx.init(weights)), []
    for start in range(0, steps, _CHUNK):
      carry, found = some_steps(carry, state, target, jnp.arange(min(_CHUNK, steps - start)))
      values.append(np.asarray(found))
    _logger.info("Image %d of %d is drawn.", len(reconstructions) + 1, len(images))
    reconstructions.append(Reconstruction(np.asarray(compiled_draw(carry[0])), np.concatenate(values)))
  return reconstructions


def colour_errors(found: Num[Array, "h w 3"], expected: Num[Array, "h w 3"]) -> Float[np.ndarray, "3"]:
  """Mean squared error of red, green and blue, in squares of 8-bit levels.

  Args:
    found, expected: RGB in 0..255.
  """
  difference = np.asarray(found, np.float64) - np.asarray(expected, np.float64)
  return np.mean(difference**2, axis=(0, 1))
