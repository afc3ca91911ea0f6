"""Images from features: what features keep comes back, and what they do not keep does not."""

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.diagnostics import inversion
from tests import tiny_family

_OPTIONS = dict(steps=250, learning_rate=1e-2, widths=(8, 16), seed=0)


@pytest.fixture(scope="module")
def image():
  """A square of one colour before another."""
  pixels = np.full((20, 16, 3), (40, 160, 90), np.uint8)
  pixels[6:14, 4:12] = (220, 60, 200)
  return pixels


def test_an_image_comes_back_from_its_pixels(image):
  [found] = inversion.invert(lambda state, x: x, (), image[None], **_OPTIONS)
  assert found.image.shape == (20, 16, 3) and len(found.distances) == 250
  assert found.distances[-1] < 0.02 * found.distances[0]
  assert inversion.colour_errors(found.image, image).max() < 300
  distance = np.sum((found.image - image) ** 2) / np.sum(image.astype(float) ** 2)
  assert found.distances[-1] == pytest.approx(distance, rel=0.3)  # of the step before


def test_a_colour_that_features_do_not_see_is_lost(image):
  [found] = inversion.invert(lambda state, x: x[..., :1], (), image[None], **_OPTIONS)
  red, green, blue = inversion.colour_errors(found.image, image)
  assert red < 300 and min(green, blue) > 5 * red


def test_colour_errors_by_hand():
  found = np.array([[[10, 0, 5], [0, 4, 5]]])
  np.testing.assert_array_equal(inversion.colour_errors(found, np.zeros((1, 2, 3))), [50, 8, 25])


def test_a_backbone_is_inverted_by_its_last_map(image):
  backbone = tiny_family.Tiny(tiny_family.TinyConfig(channels=(8, 8)), rngs=nnx.Rngs(0))
  found, other = inversion.reconstruct(
    backbone, np.stack([image, 255 - image]), steps=60, learning_rate=1e-2, widths=(8, 16)
  )
  assert found.distances[-1] < 0.7 * found.distances[0] and other.distances[0] != found.distances[0]
  maps = [
    np.asarray(backbone(backbone.preprocessing.normalise(jnp.asarray(x, jnp.float32)[None]))[-1])
    for x in (found.image, image)
  ]
  assert np.sum((maps[0] - maps[1]) ** 2) / np.sum(maps[1] ** 2) < 0.7 * found.distances[0]
  [again] = inversion.reconstruct(backbone, image[None], steps=3, learning_rate=1e-2, widths=(8, 16), seed=1)
  assert again.distances[0] != found.distances[0]
  with pytest.raises(ValueError, match="steps is 0"):
    inversion.reconstruct(backbone, image[None], steps=0)
