"""Deformable attention against transformers' (PyTorch's grid_sample), with gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.ops.deformable_attention import deformable_attention
from tests import golden_mask2former, golden_values

SHAPES = ((3, 4), (5, 7), (10, 13))
BATCH, QUERIES, HEADS, CHANNELS, POINTS = 2, 9, 3, 5, 4
RELATIVE = 1e-5  # of an array's largest magnitude


def inputs(seed):
  cells = sum(h * w for h, w in SHAPES)
  samples = (BATCH, QUERIES, HEADS, len(SHAPES), POINTS)
  return (
    jnp.asarray(golden_values.values(seed, "values", (BATCH, cells, HEADS, CHANNELS))),
    jnp.asarray(golden_values.uniform(seed, "locations", (*samples, 2)) * np.float32(1.4) - np.float32(0.2)),
    jnp.asarray(golden_values.uniform(seed, "weights", samples)),
  )


@pytest.mark.parametrize("kind", golden_mask2former.KINDS)
def test_output_and_gradients(kind, tmp_path_factory):
  wanted = np.load(golden_mask2former.folder(kind, tmp_path_factory) / "deformable_attention.npz")
  seed = int(wanted["seed"])
  shape = (BATCH, QUERIES, HEADS, CHANNELS)
  cotangent = golden_values.values(seed, "cotangent", (BATCH, QUERIES, HEADS * CHANNELS)).reshape(shape)

  @jax.jit
  def run(*arrays):
    output, pull = jax.vjp(lambda *x: deformable_attention(x[0], SHAPES, x[1], x[2]), *arrays)
    return output, pull(jnp.asarray(cotangent))

  arrays = inputs(seed)
  outside = (arrays[1] < 0) | (arrays[1] > 1)
  assert 0.2 < outside.any(-1).mean() < 0.8  # of the samples: borders are tested
  output, gradients = run(*arrays)
  found = dict(zip(("values", "locations", "weights"), gradients))
  pairs = [(output.reshape(BATCH, QUERIES, -1), wanted["output"])]
  pairs += [(found[name], wanted[f"gradient.{name}"]) for name in found]
  for ours, theirs in pairs:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=RELATIVE * np.abs(theirs).max())


def test_places_that_are_no_numbers_read_nothing():
  values, locations, weights = inputs(0)
  values = values.at[:, -1].set(1e6)  # what a read out of bounds would meet
  for place in (jnp.inf, -jnp.inf, jnp.nan, 1e30):
    broken = locations.at[:, 0].set(place)
    output = deformable_attention(values, SHAPES, broken, weights)
    np.testing.assert_array_equal(output[:, 0], 0.0)
    assert np.isfinite(output[:, 1:]).all()


def test_half_precision_values_are_summed_in_float32():
  values, locations, weights = inputs(0)
  rounded = values.astype(jnp.bfloat16)
  output = deformable_attention(rounded, SHAPES, locations, weights)
  assert output.dtype == jnp.float32
  np.testing.assert_array_equal(
    output, deformable_attention(rounded.astype(jnp.float32), SHAPES, locations, weights)
  )


@pytest.mark.usefixtures("without_type_checks")
def test_arrays_that_do_not_fit():
  values, locations, weights = inputs(0)
  with pytest.raises(ValueError, match=r"values of shape \(2, 176, 3, 5\).*expected \[b, 177, heads, d\]"):
    deformable_attention(values[:, 1:], SHAPES, locations, weights)
  with pytest.raises(ValueError, match=r"locations of shape \(2, 9, 3, 2, 4, 2\); expected \[2, q, 3, 3, "):
    deformable_attention(values, SHAPES, locations[:, :, :, 1:], weights)
  with pytest.raises(ValueError, match=r"weights of shape \(2, 9, 3, 3, 3\); expected \(2, 9, 3, 3, 4\)"):
    deformable_attention(values, SHAPES, locations, weights[..., 1:])
