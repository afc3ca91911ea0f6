"""Heads on frozen frame features: what each can and cannot see, shapes, and their options."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.heads import video_swin
from tests import random_backbones

_SPECS = (FeatureSpec(4, 4), FeatureSpec(8, 6), FeatureSpec(16, 8))


def _features(b=2, t=4, h=4, w=6):
  keys = jax.random.split(jax.random.key(0), 3)
  return tuple(
    jax.random.normal(key, (b, t, -(-h // 2**i), -(-w // 2**i), spec.channels))
    for i, (key, spec) in enumerate(zip(keys, _SPECS))
  )


def _video_swin(**changes):
  options = dict(
    levels=(1, 2), channels=(8, 16), depths=(2, 1), head_channels=4, window_size=(2, 2, 2), drop_path_rate=0.2
  )
  config = video_swin.VideoSwinHeadConfig(**(options | changes))
  return video_swin.VideoSwinHead(_SPECS, config, 5, rngs=nnx.Rngs(0))


def _head(name):
  options = dict(levels=(1, 2), dropout=0.5, rngs=nnx.Rngs(0))
  match name:
    case "video_swin":
      return _video_swin()
    case "video_swin with motion":
      return _video_swin(motion_radius=1)
    case "average":
      return video_swin.AverageHead(_SPECS, 5, **options)
    case "attentive":
      return video_swin.AttentiveHead(_SPECS, 5, channels=8, num_heads=2, **options)


@pytest.mark.parametrize("name", ["video_swin", "video_swin with motion", "average", "attentive"])
def test_logits_are_float32_and_only_a_key_makes_them_random(name):
  # A fresh classifier hides the rest: it starts near zero.
  head = random_backbones.fill(nnx.eval_shape(lambda: _head(name)))
  features = tuple(feature.astype(jnp.bfloat16) for feature in _features()[1:])
  run = jax.jit(lambda head, features, key: head(features, key))
  apply = functools.partial(run, head)
  logits = apply(features, None)
  assert logits.shape == (2, 5) and logits.dtype == jnp.float32 and np.isfinite(logits).all()
  np.testing.assert_array_equal(logits, apply(features, None))
  first = apply(features, jax.random.key(1))
  np.testing.assert_array_equal(first, apply(features, jax.random.key(1)))
  assert np.abs(first - logits).max() > 1e-3
  assert np.abs(first - apply(features, jax.random.key(2))).max() > 1e-3

  # Every parameter takes part.
  def loss(state):
    return jnp.sum(nnx.merge(nnx.graphdef(head), state)(features, None) ** 2)

  gradients = jax.jit(jax.grad(loss))(nnx.state(head, nnx.Param))
  for path, leaf in nnx.to_flat_state(gradients):
    assert np.abs(leaf[...]).max() > 0, path


@pytest.mark.parametrize("name, sees_order", [("video_swin", True), ("average", False), ("attentive", True)])
def test_which_heads_see_the_order_of_frames(name, sees_order):
  head = _head(name)
  head.classifier.linear.kernel[...] = jax.random.normal(
    jax.random.key(0), head.classifier.linear.kernel.shape
  )
  features = _features()[1:]
  backwards = tuple(feature[:, ::-1] for feature in features)
  apply = jax.jit(lambda features: head(features))
  difference = np.abs(apply(features) - apply(backwards)).max()
  assert (difference > 1e-4) == sees_order
  if not sees_order:
    assert difference < 1e-5


def test_motion_hears_only_which_cell_of_a_later_frame_is_alike():
  motion = video_swin.Motion(1, (1, 2), 8, dtype=jnp.float32, rngs=nnx.Rngs(0))
  features = _features()[1]
  signs = jnp.where(jnp.arange(features.shape[-1]) % 2, 1.0, -1.0)
  np.testing.assert_allclose(motion(features), motion(features * signs * 3), atol=1e-4)
  assert np.abs(motion(features) - motion(features[:, ::-1])[:, ::-1]).max() > 0.1


def test_the_average_is_the_mean_of_normed_cells():
  head = video_swin.AverageHead(_SPECS, 5, levels=(2,), rngs=nnx.Rngs(0))
  feature = _features()[2]
  x = np.asarray(feature, np.float64)
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  kernel = np.asarray(head.classifier.linear.kernel[...])
  np.testing.assert_allclose(head((feature,)), x.mean((1, 2, 3)) @ kernel, atol=1e-6)


def test_any_number_of_frames_and_odd_maps():
  head = _video_swin()
  for t, h, w in ((1, 2, 2), (5, 7, 3)):
    abstract = tuple(jax.ShapeDtypeStruct(f.shape, f.dtype) for f in _features(t=t, h=h, w=w)[1:])
    assert jax.eval_shape(head, abstract).shape == (2, 5)


def test_only_the_levels_that_are_read_are_taken():
  head = _video_swin()
  assert head.levels == (1, 2)
  with pytest.raises(ValueError, match=r"expected one .* for each of the levels \(1, 2\)"):
    head(_features())


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(levels=(1, 3)), "expected neighbours"),
    (dict(depths=(2,)), "one entry per level"),
    (dict(head_channels=3), "does not divide"),
    (dict(motion_radius=-1), "motion_radius = -1, motion_lags .* expected 0 or more"),
    (dict(motion_lags=(0, 1)), "frames ahead from 1"),
    (dict(levels=(2, 3)), "levels = .2, 3. of a backbone with 3 levels"),
  ],
)
def test_options_that_do_not_fit(changes, message):
  with pytest.raises(ValueError, match=message):
    _video_swin(**changes)
  with pytest.raises(ValueError, match="multiple of 2 x num_heads"):
    video_swin.AttentiveHead(_SPECS, 5, levels=(0,), channels=6, num_heads=2, rngs=nnx.Rngs(0))
