"""A folded backbone gives the features of the module it was made from."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision import fold
from frozen_vision.backbones import swinv2


def _backbone(depths=(2, 5), extra_norm=0, pretrained=(4, 3), seed=0):
  config = swinv2.SwinV2Config(
      16, depths, (2, 4)[:len(depths)], (4,) * len(depths), pretrained[:len(depths)],
      extra_norm_interval=extra_norm, residual_norm_init=1.0)
  backbone = swinv2.SwinV2(config, rngs=nnx.Rngs(seed))
  keys = iter(jax.random.split(jax.random.key(seed), 500))
  state = jax.tree.map(
      lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), nnx.state(backbone, nnx.Param))
  nnx.update(backbone, state)
  return backbone


def _features(module, images):
  return [np.asarray(level, np.float32) for level in jax.jit(lambda m, x: m(x))(module, images)]


def _images(*size):
  return jax.random.normal(jax.random.key(9), (2, *size, 3))


# Whole windows; padding; a map of stage 1 smaller than its window, in one axis or both; odd sizes.
@pytest.mark.parametrize("size", [(32, 32), (40, 24), (22, 40), (8, 8)])
def test_equal_features(size):
  backbone, images = _backbone(), _images(*size)
  wanted = _features(backbone, images)
  folded = fold.fold(backbone)
  assert folded.stages[0]["repeated"] is None and len(folded.stages[0]["blocks"]) == 2
  assert len(folded.stages[1]["repeated"]) == 2 and len(folded.stages[1]["blocks"]) == 1
  assert folded.stages[1]["repeated"][0]["table"].shape == (2, 49, 4)
  for found, level in zip(_features(folded, images), wanted):
    assert found.shape == level.shape
    assert np.abs(found - level).max() <= 1e-5 * np.abs(level).max()
  np.testing.assert_allclose(folded.embed(images), backbone.embed(images), rtol=1e-4, atol=1e-5)
  assert folded.feature_specs == backbone.feature_specs and folded.config == backbone.config


def test_extra_norms_are_scanned_in_whole_periods():
  backbone, images = _backbone(depths=(13,), extra_norm=6), _images(32, 24)
  folded = fold.fold(backbone)
  repeated = folded.stages[0]["repeated"]
  assert [block["extra_norm"] is not None for block in repeated] == [False] * 5 + [True]
  assert repeated[0]["scale"].shape == (2, 2) and len(folded.stages[0]["blocks"]) == 1
  [wanted] = _features(backbone, images)
  [found] = _features(folded, images)
  [single] = _features(fold.fold(backbone, scan=False), images)
  for features in (found, single):
    assert np.abs(features - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_bias_relative_to_the_map_needs_its_size():
  backbone, images = _backbone(pretrained=(0, 0)), _images(40, 24)  # stage 1: 5 x 3, window 4 x 3
  with pytest.raises(ValueError, match=r"Stage 1 was folded for a window of \(4, 4\), and the image gives \(4, 3\)"):
    fold.fold(backbone)(images)
  folded = fold.fold(backbone, image_size=(40, 24))
  for found, wanted in zip(_features(folded, images), _features(backbone, images)):
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_smaller_weights_drift_little():
  backbone, images = _backbone(), _images(32, 32)
  wanted = _features(backbone, images)
  sizes = {}
  for name, options, least in (
      ("float32", dict(), 0.99999), ("bfloat16", dict(dtype=jnp.bfloat16), 0.999), ("int8", dict(int8=True), 0.999)):
    folded = fold.fold(backbone, **options)
    sizes[name] = sum(
        leaf.nbytes for leaf in jax.tree.leaves(folded.stages[1]) if leaf.ndim >= 2 and leaf.dtype != jnp.float32)
    for found, level in zip(_features(folded, images), wanted):
      cosine = (found * level).sum() / np.sqrt((found**2).sum() * (level**2).sum())
      assert cosine >= least, (name, cosine)
  assert sizes["float32"] == 0 < sizes["int8"] < sizes["bfloat16"]
