"""Every row of every family keeps the contract of backbones.

How many parameters a row has is compared with its references where the family is tested.
"""

import functools
import json
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.backbones import base, families
from frozen_vision.files import tensors, trees
from frozen_vision.freezing import feature_key, prepare
from frozen_vision.layers import storage
from tests import random_backbones

_ROWS = sorted(families.variants())
# No whole patches or cells of any family along any axis.
_SIZES = ((37, 54), (66, 43))

# {family: (a row, fields that make it small)}; real features are computed with it.
_SMALL = {
  "swinv2": (
    "swinv2_nano",
    dict(embed_dim=8, depths=(1, 2, 2, 1), num_heads=(1, 2, 4, 8), window_sizes=(4, 4, 4, 2)),
  ),
  "resnet": ("resnet50", dict(depths=(1, 2, 1, 1), width=8)),
  "efficientnet": ("efficientnet_lite0", dict(width=0.25, depth=0.3)),
  "convnext": ("convnext_tiny", dict(depths=(1, 1, 2, 1), channels=(8, 16, 16, 24))),
  "vit": ("deit_vits16", dict(embed_dim=24, depth=4, num_heads=2, mlp_dim=48)),
}


def _rows():
  """The row that stands for its family, and the others, which take long to trace."""
  first = {name for name, _ in _SMALL.values()}
  return [pytest.param(name, marks=() if name in first else pytest.mark.slow) for name in _ROWS]


def _shapes(program, size):
  images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
  return [level.shape for level in jax.eval_shape(lambda program, images: program(images), program, images)]


def _expected_shapes(specs, size):
  return [(2, *(-(-side // spec.stride) for side in size), spec.channels) for spec in specs]


def _fields(family, **overrides):
  """A small row of a family: (its name, the fields that it has of its own)."""
  name, fields = _SMALL[family]
  return name, {**families.FAMILIES[family].random, **fields, **overrides}


@functools.cache
def _small(family):
  name, fields = _fields(family)
  return random_backbones.build(name, **fields)


def _features_of_pixels(program, pixels):
  return program(program.preprocessing.normalise(pixels))


def test_every_family_and_every_row_is_in_the_matrix():
  assert set(_SMALL) == set(families.FAMILIES)
  assert len(_ROWS) == sum(len(family.variants) for family in families.FAMILIES.values())


@pytest.mark.parametrize("name", _rows())
def test_a_row(name):
  backbone = families.abstract_backbone(name)
  assert isinstance(backbone, base.Backbone)
  specs = backbone.feature_specs
  assert specs == families.backbone_config(name).feature_specs
  assert [spec.stride for spec in specs] == sorted(spec.stride for spec in specs)
  assert _shapes(backbone, _SIZES[0]) == _expected_shapes(specs, _SIZES[0])
  assert _shapes(storage.shapes(backbone), _SIZES[1]) == _expected_shapes(specs, _SIZES[1])
  depths = {backbone.depth_of("/".join(map(str, path))) for path, _ in nnx.to_flat_state(nnx.state(backbone))}
  assert min(depths) == 0 and max(depths) <= backbone.num_depths
  key = feature_key.feature_key(backbone, "abc")
  assert json.loads(json.dumps(key)) == key
  assert backbone.config.replace(**json.loads(json.dumps(vars(backbone.config)))) == backbone.config


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_features_have_their_specs_and_folded_they_are_the_same(family):
  backbone = _small(family)
  folded = random_backbones.fold(backbone)
  assert folded.feature_specs == backbone.feature_specs and folded.embed_dim == backbone.embed_dim
  assert folded.preprocessing == backbone.preprocessing

  @jax.jit
  def run(program, images):
    return program(images), program.embed(images), program.final_features(images)

  for size in _SIZES:
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, *size, 3)), jnp.float32)
    wanted, vectors, final = run(backbone, images)
    found, folded_vectors, folded_final = run(folded, images)
    assert [level.shape for level in wanted] == _expected_shapes(backbone.feature_specs, size)
    for folded_level, level in zip(found, wanted, strict=True):
      assert np.isfinite(level).all() and np.ptp(level) > 0
      assert np.abs(folded_level - level).max() <= 2e-5 * np.abs(level).max()
    assert vectors.shape == (2, backbone.embed_dim)
    assert final.map.shape == wanted[-1].shape
    assert (final.class_token is not None) == getattr(backbone.config, "class_token", False)
    for one, other in zip(
      jax.tree.leaves((folded_vectors, folded_final)), jax.tree.leaves((vectors, final)), strict=True
    ):
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_of_a_public_checkpoint_parts_are_read_one_after_another(family, monkeypatch):
  """The whole is never in memory, and its fingerprint is the same."""
  backbone = _small(family)
  leaves = {
    path: tensors.LazyTensor(leaf.shape, leaf.dtype, lambda leaf=leaf: np.asarray(leaf))
    for path, leaf in trees.flatten(trees.weights(backbone)).items()
  }
  row, fields = _fields(family)
  file = families.BackboneFile(
    families.abstract_backbone(row, **fields), leaves, pathlib.Path("public.pth"), fingerprint=None
  )
  monkeypatch.setattr(families.BackboneFile, "load", None)
  found, wanted = prepare.freeze(file), prepare.freeze(backbone)
  assert found.key == wanted.key
  for one, other in zip(*map(jax.tree.leaves, (found.program, wanted.program)), strict=True):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_options_that_change_features_are_in_the_key(family):
  """Every field without weights whose other values change the features changes the key."""
  backbone = _small(family)
  key = feature_key.feature_key(backbone, "abc")
  pixels = np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3)).astype(np.float32)
  program = jax.jit(_features_of_pixels).lower(backbone, pixels)
  wanted = program.compile()(backbone, pixels)

  def changes_features(other):
    changed = jax.jit(_features_of_pixels).lower(other, pixels)
    if changed.as_text() == program.as_text():
      return False
    found = changed.compile()(other, pixels)
    return [level.shape for level in found] != [level.shape for level in wanted] or any(
      np.abs(one - two).max() > 1e-6 * np.abs(two).max() for one, two in zip(found, wanted)
    )

  seen = 0
  for name in backbone.config.weightless:
    value = _other(name, getattr(backbone.config, name), backbone.config)
    row, fields = _fields(family, **{name: value})
    other = families.abstract_backbone(row, **fields)
    nnx.update(other, nnx.state(backbone))
    if feature_key.feature_key(other, "abc") == key:
      assert not changes_features(other), name
    else:  # it may; that one does is enough to know that the comparison sees it
      seen = seen or changes_features(other)
  assert seen


def _other(name, value, config):
  """Another value of a field."""
  special = {
    "whole_windows": True,
    "attention": value,  # a kernel that runs on TPUs only; see swinv2/test_window_kernel.py
    "window_sizes": (2, 4, 4, 2),
    "pretrained_window_sizes": (8, 8, 8, 4),
    "activation": "quick_gelu" if type(config).__name__ == "ViTConfig" else "swish",
    "position_resize": "bicubic_antialias",
    "taps": (1, 2, 3),
    "qkv_bias": value,
    "stride": 8,
    "finest_stride": 2,
    "position_grid": value,
    "num_heads": 1,
  }
  if name in special:
    return special[name]
  if isinstance(value, bool):
    return not value
  if isinstance(value, tuple):
    return tuple(0.5 for _ in value)
  return 2 * value + 0.1
