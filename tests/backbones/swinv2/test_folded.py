"""A folded backbone gives the features of the module it was made from."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.backbones import base, families
from frozen_vision.backbones.swinv2 import folded as fold
from frozen_vision.backbones.swinv2 import model as swinv2
from frozen_vision.backbones.swinv2 import windows
from frozen_vision.files import trees
from frozen_vision.freezing import partition as freeze
from frozen_vision.layers import storage
from tests import random_backbones


@functools.cache
def _backbone(depths=(2, 5), extra_norm=0, pretrained=(4, 3), seed=0):
  config = swinv2.SwinV2Config(
    16,
    depths,
    (2, 4)[: len(depths)],
    (4,) * len(depths),
    pretrained[: len(depths)],
    extra_norm_interval=extra_norm,
    residual_norm_init=1.0,
  )
  return random_backbones.fill(base.abstract(swinv2.SwinV2, config), seed)


def _features(module, images):
  return [np.asarray(level, np.float32) for level in jax.jit(lambda m, x: m(x))(module, images)]


_features_and_vectors = jax.jit(lambda module, images: (module(images), module.embed(images)))


@functools.cache
def _wanted(*size):
  """Features of the module that is folded, and its vectors."""
  return _features_and_vectors(_backbone(), _images(*size))


def _images(*size):
  return jnp.asarray(np.random.default_rng(9).standard_normal((2, *size, 3)), jnp.float32)


# Whole windows; padding; a map of stage 1 smaller than its window, in one axis or both; odd sizes.
@pytest.mark.parametrize("size", [(32, 32), (40, 24), (22, 40), (8, 8)])
def test_equal_features(size):
  backbone = _backbone()
  folded = random_backbones.fold(backbone)
  assert folded.stages[0]["repeated"] is None and len(folded.stages[0]["blocks"]) == 2
  assert len(folded.stages[1]["repeated"]) == 2 and len(folded.stages[1]["blocks"]) == 1
  assert folded.stages[1]["repeated"][0]["table"].shape == (2, 64, 4)
  (features, vectors), (wanted, wanted_vectors) = (
    _features_and_vectors(folded, _images(*size)),
    _wanted(*size),
  )
  for found, level in zip(features, wanted):
    assert found.shape == level.shape
    assert np.abs(found - level).max() <= 1e-5 * np.abs(level).max()
  np.testing.assert_allclose(vectors, wanted_vectors, rtol=1e-4, atol=1e-5)
  assert folded.feature_specs == backbone.feature_specs and folded.config == backbone.config


def test_extra_norms_are_scanned_in_whole_periods():
  backbone, images = _backbone(depths=(13,), extra_norm=6), _images(32, 24)
  folded = random_backbones.fold(backbone)
  repeated = folded.stages[0]["repeated"]
  assert [block["extra_norm"] is not None for block in repeated] == [False] * 5 + [True]
  assert repeated[0]["scale"].shape == (2, 2) and len(folded.stages[0]["blocks"]) == 1
  [wanted] = _features(backbone, images)
  [found] = _features(folded, images)
  [single] = _features(random_backbones.fold(backbone, scan=False), images)
  for features in (found, single):
    assert np.abs(features - wanted).max() <= 1e-5 * np.abs(wanted).max()


# Of stage 0, 16 x 8 cells in windows of 4: a strip is one row of windows, two, or both images. Stage 1 has a
# shift along one axis only.
@pytest.mark.parametrize("cells", [32, 80, 256])
def test_strips_of_windows_change_nothing(cells, monkeypatch):
  monkeypatch.setattr(fold, "_STRIP_CELLS", cells)
  monkeypatch.setattr(fold, "_STRIP_NUMBERS", 0)
  folded, images = random_backbones.fold(_backbone()), _images(64, 32)
  loops = str(jax.make_jaxpr(lambda m, x: m(x))(folded, images)).count("length=")
  assert (loops > 1) == (cells < 256)  # one loop is that of the stacked blocks
  for found, level in zip(_features(folded, images), _wanted(64, 32)[0]):
    assert np.abs(found - level).max() <= 1e-5 * np.abs(level).max()


# Stage 1: 5 x 3 and 2 x 2 in windows of 4; stage 0 as well in the second.
@pytest.mark.parametrize("size", [(40, 24), (12, 16)])
def test_bias_relative_to_the_map(size):
  backbone, images = _backbone(pretrained=(0, 0)), _images(*size)
  for found, wanted in zip(_features(random_backbones.fold(backbone), images), _features(backbone, images)):
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_checks_of_whole_windows_remain():
  backbone = _backbone(depths=(1, 1))
  config = dataclasses.replace(backbone.config, whole_windows=True)
  whole = base.abstract(swinv2.SwinV2, config)
  nnx.update(whole, nnx.state(backbone))
  folded, images = random_backbones.fold(whole), _images(32, 40)
  for found, wanted in zip(_features(folded, images), _features(random_backbones.fold(backbone), images)):
    np.testing.assert_array_equal(found, wanted)
  for module in (whole, folded):
    with pytest.raises(ValueError, match="A map of 2 x 3 is smaller than its window of 4"):
      module(_images(16, 24))
    with pytest.raises(ValueError, match="whole patch"):
      module(_images(34, 32))


def test_smaller_weights_drift_little():
  backbone, images = _backbone(), _images(32, 32)
  wanted = _wanted(32, 32)[0]
  sizes = {}
  # Twice what the worst of eight draws of weights lost of the cosine: 0.000074, 0.000022, with int8 0.00036.
  for name, options, least in (
    ("float32", dict(), 0.99999),
    ("bfloat16", dict(dtype=jnp.bfloat16), 0.99985),
    ("stored bfloat16", dict(storage="bfloat16"), 0.99995),
    ("int8", dict(storage="int8"), 0.99925),
  ):
    folded = random_backbones.fold(backbone, **options)
    assert folded.storage == name.split()[-1] and folded.dtype == options.get("dtype", jnp.float32)
    sizes[name] = sum(
      leaf.nbytes
      for leaf in jax.tree.leaves(folded.stages[1])
      if leaf.ndim >= 2 and leaf.dtype != jnp.float32
    )
    for found, level in zip(_features(folded, images), wanted):
      cosine = (found * level).sum() / np.sqrt((found**2).sum() * (level**2).sum())
      assert cosine >= least, (name, cosine)
  assert sizes["float32"] == 0 < sizes["int8"] < sizes["stored bfloat16"] <= sizes["bfloat16"]
  with pytest.raises(
    ValueError, match="storage is 'float16'; known kinds of storage: float32, bfloat16, int8"
  ):
    fold.fold(backbone, storage="float16")


def test_in_the_place_of_the_backbone_nothing_of_it_trains():
  model = nnx.Module()
  model.head = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
  model.backbone = nnx.data(random_backbones.fold(_backbone()))
  graphdef, trainable, frozen = freeze.partition(model, (".*",))
  assert set(trees.flatten(trainable)) == {"head/kernel", "head/bias"}
  assert all(path.startswith("backbone/") for path in trees.flatten(frozen))
  images = _images(32, 32)
  wanted = _features(model.backbone, images)
  found = jax.jit(lambda *parts: nnx.merge(graphdef, *parts).backbone(images))(trainable, frozen)
  np.testing.assert_allclose(found[-1], wanted[-1], rtol=1e-5, atol=1e-5)


@pytest.fixture
def saved(tmp_path):
  families.save_backbone(_backbone(), tmp_path / "small.safetensors", name="small")
  return tmp_path / "small.safetensors"


@pytest.mark.parametrize("kind", storage.KINDS)
def test_read_from_its_file_block_by_block_it_is_that_of_the_loaded_one(saved, kind):
  file = families.open_backbone(saved)
  found = fold.fold(file.module, storage=kind, read=file.read)
  assert file.read_fingerprint() == file.fingerprint
  wanted = fold.fold(file.load(), storage=kind)
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  for (path, leaf), (_, other) in zip(
    *map(jax.tree_util.tree_leaves_with_path, (found, wanted)), strict=True
  ):
    assert leaf.dtype == other.dtype, path
    np.testing.assert_array_equal(leaf, other, err_msg=str(path))


def test_a_damaged_file_is_noticed_when_all_of_it_was_read(saved):
  content = bytearray(saved.read_bytes())
  content[-100] ^= 1
  saved.write_bytes(content)
  file = families.open_backbone(saved)
  fold.fold(file.module, read=file.read)
  with pytest.raises(ValueError, match="small.safetensors: its weights have the fingerprint .* was damaged"):
    file.read_fingerprint()


def test_large_windows_attend_in_groups_of_heads(monkeypatch):
  backbone, images = _backbone(), _images(32, 40)
  wanted = _wanted(32, 40)[0]
  monkeypatch.setattr(windows, "_MOST_PAIRS", 0)
  monkeypatch.setattr(windows, "_MOST_SCORES", 4**4)  # one head at a time
  for module in (backbone, random_backbones.fold(backbone)):
    for found, level in zip(_features(module, images), wanted, strict=True):
      np.testing.assert_allclose(found, level, rtol=1e-5, atol=2e-5)


def test_large_windows_put_no_large_constants_into_the_program():
  backbone = families.abstract_backbone("swinv2_nano", window_size=16)
  graphdef, state = nnx.split(storage.shapes(backbone))
  images = jax.ShapeDtypeStruct((1, 512, 512, 3), jnp.float32)
  lowered = jax.jit(lambda state, images: nnx.merge(graphdef, state)(images)).lower(state, images)
  # Regions of 64 windows of 256 cells are 131,000 digits; which pairs are in one region, 8,400,000.
  assert max(map(len, lowered.as_text().splitlines())) < 200_000
