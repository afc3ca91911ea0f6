"""The head of normals and depth: losses and decoding, written out in numpy."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.data.dense import codewords
from frozen_vision.heads import dense_regression, linear, upernet

_SPECS = (FeatureSpec(4, 6), FeatureSpec(8, 5))
_SIZE = (16, 24)
_WORDS = codewords.lattice(7)
_BINS = dense_regression.DepthBins(count=5, nearest=0.5, farthest=8.5, weight=2.0)


def _head(words=_WORDS, depth=_BINS, config=linear.LinearConfig()):
  return dense_regression.DenseRegressionHead(_SPECS, config, codewords=words, depth=depth, rngs=nnx.Rngs(0))


def _features(seed=0):
  rng = np.random.default_rng(seed)
  return [
    jnp.asarray(rng.normal(size=(2, _SIZE[0] // s.stride, _SIZE[1] // s.stride, s.channels)), jnp.float32)
    for s in _SPECS
  ]


def _batch(seed=0):
  rng = np.random.default_rng(seed)
  normals = rng.normal(size=(2, *_SIZE, 3)) + [0, 0, 1.5]
  normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
  depth = rng.uniform(0.5, 8, (2, *_SIZE))
  normals[rng.random(depth.shape) < 0.2], depth[rng.random(depth.shape) < 0.3] = 0, 0
  return {"normals": jnp.asarray(normals, jnp.float32), "depth": jnp.asarray(depth, jnp.float32)}


def _enlarged(maps):
  """[b, h, w, k] at four times the size, by Pillow's bilinear filter, one channel at a time."""
  return np.stack(
    [
      np.stack(
        [
          np.asarray(Image.fromarray(one[..., k]).resize(_SIZE[::-1], Image.Resampling.BILINEAR))
          for k in range(one.shape[-1])
        ],
        axis=-1,
      )
      for one in np.asarray(maps, np.float32)
    ]
  ).astype(np.float64)


def _softmax(x):
  e = np.exp(x - x.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def _expected(head, features):
  """(probabilities of codewords, depth) at full size."""
  logits = np.asarray(head.logits(features), np.float64)
  metres = _softmax(logits[..., 7:]) @ np.array([0.5, 2.5, 4.5, 6.5, 8.5])
  return _softmax(_enlarged(logits[..., :7])), _enlarged(metres[..., None])[..., 0]


def test_predictions_are_means_of_codewords_and_bins():
  head, features = _head(), _features()
  probabilities, depth = _expected(head, features)
  found = head.predict(features, _SIZE)
  normals = np.zeros((2, *_SIZE, 3))
  for k, word in enumerate(_WORDS):
    normals += probabilities[..., k, None] * word
  np.testing.assert_allclose(found["normals"], normals, atol=1e-5)
  np.testing.assert_allclose(found["depth"][..., 0], depth, rtol=1e-5)


def test_losses_are_cross_entropy_and_the_scale_invariant_error():
  head, features, batch = _head(), _features(), _batch()
  probabilities, depth = _expected(head, features)
  terms, metrics = head.losses(features, batch, None)
  normals, true = np.asarray(batch["normals"], np.float64), np.asarray(batch["depth"], np.float64)

  losses, right = [], []
  for place in zip(*np.nonzero(np.any(normals != 0, axis=-1))):
    angles = [np.arccos(np.clip(normals[place] @ word / np.linalg.norm(word), -1, 1)) for word in _WORDS]
    losses.append(-np.log(probabilities[place][int(np.argmin(angles))]))
    right.append(np.argmax(probabilities[place]) == np.argmin(angles))
  assert float(terms["normals"]) == pytest.approx(np.mean(losses), rel=1e-5)
  assert float(metrics["codeword_accuracy"]) == pytest.approx(np.mean(right), rel=1e-5)

  g = np.log(depth[true > 0]) - np.log(true[true > 0])
  wanted = 2.0 * np.sqrt(np.var(g) + 0.15 * np.mean(g) ** 2)
  assert float(terms["depth"]) == pytest.approx(wanted, rel=1e-5)
  assert float(metrics["abs_rel"]) == pytest.approx(np.mean(np.abs(np.expm1(g))), rel=1e-5)


@pytest.mark.parametrize("known", [False, True])
def test_gradients_are_finite_without_a_truth_and_with_a_perfect_prediction(known):
  head, features = _head(depth=dataclasses.replace(_BINS, count=2)), _features()
  graphdef, state = nnx.split(head)
  depth = head.predict(features, _SIZE)["depth"][..., 0] * known
  batch = {"normals": jnp.zeros((2, *_SIZE, 3)), "depth": jax.lax.stop_gradient(depth)}

  def total(state):
    return sum(nnx.merge(graphdef, state).losses(features, batch, None)[0].values())

  loss, gradient = jax.jit(jax.value_and_grad(total))(state)
  assert float(loss) < 1e-4
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name, arguments", [("normals", dict(depth=None)), ("depth", dict(words=None))])
def test_one_target_alone(name, arguments):
  head, features, batch = _head(**arguments), _features(), _batch()
  assert (
    set(head.predict(features, _SIZE)) == set(head.losses(features, {name: batch[name]}, None)[0]) == {name}
  )


def test_upernet_gives_the_logits_and_has_no_part_without_a_loss():
  config = upernet.UPerNetConfig(channels=8, norm_groups=4, auxiliary_weight=0.0, dropout=0.5)
  head, features, batch = _head(config=config), _features(), _batch()
  graphdef, state = nnx.split(head)

  @jax.jit
  def total(state, key):
    return sum(nnx.merge(graphdef, state).losses(features, batch, key)[0].values())

  first, second = (float(total(state, jax.random.key(seed))) for seed in (0, 1))
  assert first != second  # dropout
  gradient = jax.jit(jax.grad(total))(state, jax.random.key(0))
  assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
  "arguments, message",
  [
    (dict(words=None, depth=None), "0 codewords and depth bins None"),
    (dict(words=codewords.lattice(256)), "256 codewords"),
    (dict(config=upernet.UPerNetConfig()), "auxiliary_weight=0.4.* set it to 0"),
  ],
)
def test_what_cannot_be_built(arguments, message):
  with pytest.raises(ValueError, match=message):
    _head(**arguments)
