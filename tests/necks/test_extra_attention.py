"""The extra attention block against a loop over cells, and its place in the necks."""

import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.necks import build
from frozen_vision.necks.extra_attention import ExtraAttention

SPECS = (FeatureSpec(4, 3), FeatureSpec(8, 6))


def _randomise(module):
  rng = np.random.default_rng(0)
  graphdef, state = nnx.split(module)

  def draw(x):
    return jnp.asarray(rng.normal(0.1, 0.4, x.shape), jnp.float32)

  return nnx.merge(graphdef, jax.tree.map(draw, state))


def _norm(x, norm):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
  return x * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])


def _linear(x, layer):
  return x @ np.asarray(layer.kernel[...], float) + np.asarray(layer.bias[...])


def _reference(block, x, heads):
  """[n, c] in float64, one query and head at a time."""
  size = x.shape[1] // heads
  q, k, v = np.split(_linear(_norm(x, block.norm1), block.qkv), 3, axis=1)
  mixed = np.zeros_like(x)
  for row in range(len(x)):
    for head in range(heads):
      part = slice(head * size, (head + 1) * size)
      scores = [q[row, part] @ key / math.sqrt(size) for key in k[:, part]]
      weights = np.exp(scores) / np.exp(scores).sum()
      mixed[row, part] = weights @ v[:, part]
  x = x + _linear(mixed, block.proj)
  hidden = _linear(_norm(x, block.norm2), block.fc1)
  hidden *= 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
  return _norm(x + _linear(hidden, block.fc2), block.norm)


def test_equals_the_loop():
  block = _randomise(ExtraAttention(6, 2, rngs=nnx.Rngs(0)))
  x = np.random.default_rng(1).standard_normal((2, 3, 4, 6)).astype(np.float32)
  found = jax.jit(block.__call__)(x)
  for image in range(2):
    expected = _reference(block, x[image].reshape(12, 6).astype(float), heads=2)
    np.testing.assert_allclose(found[image].reshape(12, 6), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["fpn", "bifpn"])
def test_it_replaces_the_last_level_only(name):
  def make(heads):
    return build.build_neck(name, SPECS, channels=32, num_levels=3, attention_heads=heads, rngs=nnx.Rngs(0))

  features = tuple(
    jax.ShapeDtypeStruct((1, 8 // (i + 1), 8 // (i + 1), s.channels), jnp.float32)
    for i, s in enumerate(SPECS)
  )
  plain, extended = nnx.eval_shape(lambda: (make(0), make(2)))
  assert plain.attention is None and plain.feature_specs == extended.feature_specs

  def shapes(neck):
    graphdef, state = nnx.split(neck)
    outputs = jax.eval_shape(lambda s, f: nnx.merge(graphdef, s)(f), state, features)
    return [x.shape for x in outputs]

  assert shapes(plain) == shapes(extended) == [(1, s, s, 32) for s in (8, 4, 2)]

  def size(neck):
    return sum(x.size for x in jax.tree.leaves(nnx.state(neck)))

  c = SPECS[-1].channels
  assert size(extended) - size(plain) == 12 * c * c + 3 * 2 * c + (3 + 1 + 4 + 1) * c
  with pytest.raises(ValueError, match="6 channels do not divide into 4 heads"):
    make(4)
