"""Comparison of states to the bit."""

import jax
import jax.numpy as jnp
import numpy as np

from frozen_vision.runs import state_leaves


def assert_equal(found, wanted):
  """Asserts that two trees have the same leaves: their kinds, dtypes and bytes."""
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  found, wanted = (state_leaves.flatten(t)[0] for t in (found, wanted))
  assert state_leaves.describe(found) == state_leaves.describe(wanted)
  for path, a in wanted.items():
    b = found[path]
    if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    assert isinstance(a, jax.Array) == isinstance(b, jax.Array), path
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path
