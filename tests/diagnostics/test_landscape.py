"""Noise has the norms of the filters; a quadratic has the landscape that its curvature says."""

import jax
import jax.numpy as jnp
import numpy as np

from frozen_vision.diagnostics import landscape


def test_every_filter_gets_noise_of_its_norm():
  scale = jnp.array([0.0, 1.0, 10.0])
  parameters = {"kernel": jnp.ones((3, 3, 4, 3)) * scale, "bias": jnp.ones(3)}
  noise = landscape.direction(parameters, jax.random.key(0))
  found = jnp.sqrt((noise["kernel"] ** 2).sum((0, 1, 2)))
  np.testing.assert_allclose(found, 6 * scale, rtol=1e-5)
  assert not noise["bias"].any()
  assert np.std(np.asarray(noise["kernel"][..., 1])) > 0.5


def test_a_bowl_rises_with_the_square_of_the_distance():
  parameters = {"kernel": jax.random.normal(jax.random.key(1), (5, 2)), "bias": jnp.ones(2)}
  start = parameters["kernel"]

  def loss(moved):
    return 3 + 0.5 * jnp.sum((moved["kernel"] - start) ** 2) + 0 * moved["bias"].sum()

  distances = (-1.0, 0.0, 0.5, 1.0)
  found = landscape.along(loss, parameters, jax.random.key(2), distances=distances, directions=3)
  wanted = 3 + 0.5 * np.square(distances) * float(jnp.sum(start**2))
  np.testing.assert_allclose(found, np.tile(wanted, (3, 1)), rtol=1e-5)
