"""FPN: sizes, upsampling rule, errors. For its numbers see tests/heads/htc/test_golden.py."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.necks import fpn

SPECS = (FeatureSpec(4, 3), FeatureSpec(8, 5), FeatureSpec(16, 6))


def test_outputs_have_the_announced_sizes_for_odd_maps():
  neck = fpn.FPN(SPECS, 4, num_levels=5, rngs=nnx.Rngs(0))
  assert neck.feature_specs == tuple(FeatureSpec(s, 4) for s in (4, 8, 16, 32, 64))
  sizes = [(25, 31), (13, 16), (7, 8)]
  features = tuple(jnp.ones((2, *size, spec.channels)) for size, spec in zip(sizes, SPECS))
  outputs = jax.eval_shape(neck, features)
  assert [x.shape for x in outputs] == [(2, *s, 4) for s in [*sizes, (4, 4), (2, 2)]]


@pytest.mark.parametrize("length, out", [(7, 13), (7, 14), (3, 10), (5, 5), (2, 3)])
def test_nearest_reads_the_cell_at_floor(length, out):
  x = jnp.arange(length, dtype=jnp.float32)[None, :, None, None]
  expected = [i * length // out for i in range(out)]
  np.testing.assert_array_equal(fpn.resize_nearest(x, (out, 1))[0, :, 0, 0], expected)


def test_input_norm_makes_the_output_blind_to_the_scale_of_a_level():
  neck = fpn.FPN(SPECS[:1], 4, num_levels=1, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (1, 4, 4, 3))
  np.testing.assert_allclose(neck((x,))[0], neck((100 * x,))[0], atol=1e-4)
  assert len(fpn.FPN(SPECS, 4, input_norm=False, rngs=nnx.Rngs(0)).norms) == 0


def test_bfloat16_keeps_float32_parameters():
  neck = fpn.FPN(SPECS[:2], 4, num_levels=2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(neck))} == {jnp.dtype("float32")}
  outputs = jax.eval_shape(neck, (jnp.ones((1, 8, 8, 3)), jnp.ones((1, 4, 4, 5))))
  assert {x.dtype for x in outputs} == {jnp.dtype("bfloat16")}


@pytest.mark.usefixtures("without_type_checks")
def test_errors_name_what_was_found():
  with pytest.raises(ValueError, match="num_levels=2 outputs for 3 backbone levels"):
    fpn.FPN(SPECS, 4, num_levels=2, rngs=nnx.Rngs(0))
  neck = fpn.FPN(SPECS[:1], 4, num_levels=1, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=r"channels \[7\], was built for \[3\]"):
    neck((jnp.ones((1, 4, 4, 7)),))
