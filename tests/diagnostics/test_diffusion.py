"""Attentive diffusion: known answers, a plain loop, and inputs that cannot be covered."""

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.diagnostics import diffusion
from tests import tiny_family


def _two_pixels(state, images):
  """Features that see two pixels alone."""
  del state
  return jnp.stack([images[:, 5, 6, 0], images[:, 5, 6, 1]], axis=-1)


@pytest.mark.parametrize("stride", [1, 2])
def test_attention_to_a_pixel_is_a_tent_around_it(stride):
  image = np.zeros((12, 16, 3), np.float32)
  image[5, 6] = (3.0, -1.0, 0.0)
  [found] = diffusion.errors(_two_pixels, (), image[None], size=4, stride=stride, batch_size=7)
  # Covered, both numbers become 0: sqrt((9 + 1) / (4 + 4)).
  error = np.sqrt(10 / 8)
  np.testing.assert_allclose(np.unique(found), [0, error], rtol=1e-6)
  attention = diffusion.mean_of_coverings(found, 4 // stride)
  cells = 4 // stride

  def tent(side, at):
    return np.maximum(0, 1 - np.abs(np.arange(side // stride) - at // stride) / cells)

  np.testing.assert_allclose(attention, error * np.outer(tent(12, 5), tent(16, 6)), atol=1e-6)
  assert attention.max() == pytest.approx(error) == attention[5 // stride, 6 // stride]


def test_a_network_equals_a_plain_loop():
  backbone = tiny_family.Tiny(tiny_family.TinyConfig(channels=(4, 6)), rngs=nnx.Rngs(0))
  image = np.random.default_rng(0).normal(size=(16, 16, 3)).astype(np.float32)
  _, found = diffusion.measure(backbone, np.stack([-image, image]), size=8, stride=4, batch_size=4)
  tops = range(-4, 16, 4)
  covered = [image[None]]
  for top in tops:
    for left in tops:
      one = image.copy()
      one[max(top, 0) : top + 8, max(left, 0) : left + 8] = 0
      covered.append(one[None])
  clean, *others = np.asarray(backbone.embed(jnp.asarray(np.concatenate(covered))), np.float64)
  errors = np.sqrt([np.sum((other - clean) ** 2) / np.sum((clean - clean.mean()) ** 2) for other in others])
  errors = errors.reshape(5, 5)
  expected = np.array([[errors[i : i + 2, j : j + 2].mean() for j in range(4)] for i in range(4)])
  np.testing.assert_allclose(found.attention, expected, rtol=1e-4)
  assert found.diffusion == np.mean(expected > expected.mean())


def test_diffusion_is_the_fraction_above_the_mean():
  assert diffusion.diffusion(np.array([[1.0, 1.0], [1.0, 5.0]])) == 0.25
  assert diffusion.diffusion(np.ones((3, 3))) == 0


@pytest.mark.parametrize(
  "size, stride, message",
  [(10, 3, "in steps of 3 px"), (5, 5, "16 x 16 px and a square of 5"), (16, 4, "a smaller square")],
)
def test_squares_that_do_not_fit(size, stride, message):
  with pytest.raises(ValueError, match=message):
    diffusion.errors(_two_pixels, (), np.zeros((1, 16, 16, 3)), size=size, stride=stride, batch_size=4)
