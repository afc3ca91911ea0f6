"""Every row of every family keeps the contract of backbones.

How many parameters a row has is compared with its references where the family is tested.
"""

import functools
import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.backbones import base, families
from frozen_vision.freezing import feature_key
from frozen_vision.layers import storage

pytestmark = pytest.mark.usefixtures("quick_compilation")

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


@functools.lru_cache(maxsize=2)
def _abstract(name):
  return nnx.eval_shape(lambda: families.build_backbone(name, rngs=nnx.Rngs(0)))


def _shapes(program, size):
  images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
  return [level.shape for level in jax.eval_shape(lambda program, images: program(images), program, images)]


def _small(family, **overrides):
  name, fields = _SMALL[family]
  options = {**families.FAMILIES[family].random, **fields, **overrides}
  return families.build_backbone(name, rngs=nnx.Rngs(0), **options)


def _features(program, size=(64, 64), *, pixels=False):
  images = jax.random.normal(jax.random.key(0), (2, *size, 3))
  if pixels:
    images = program.preprocessing.normalise(127 + 60 * images)
  return jax.jit(lambda program, images: program(images))(program, images)


def test_every_family_and_every_row_is_in_the_matrix():
  assert set(_SMALL) == set(families.FAMILIES)
  assert len(_ROWS) == sum(len(family.variants) for family in families.FAMILIES.values())


@pytest.mark.parametrize("name", _rows())
def test_a_row(name):
  backbone = _abstract(name)
  assert isinstance(backbone, base.Backbone)
  specs = backbone.feature_specs
  assert specs == families.backbone_config(name).feature_specs
  assert [spec.stride for spec in specs] == sorted(spec.stride for spec in specs)
  for size in _SIZES:
    expected = [(2, *(-(-side // spec.stride) for side in size), spec.channels) for spec in specs]
    assert _shapes(backbone, size) == expected, size
  assert _shapes(storage.shapes(backbone), _SIZES[0]) == [
    (2, *(-(-side // spec.stride) for side in _SIZES[0]), spec.channels) for spec in specs
  ]
  depths = {backbone.depth_of("/".join(map(str, path))) for path, _ in nnx.to_flat_state(nnx.state(backbone))}
  assert min(depths) == 0 and max(depths) <= backbone.num_depths
  key = feature_key.feature_key(backbone, "abc")
  assert json.loads(json.dumps(key)) == key
  assert backbone.config.replace(**json.loads(json.dumps(vars(backbone.config)))) == backbone.config


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_features_have_their_specs_and_folded_they_are_the_same(family):
  backbone = _small(family)
  folded = backbone.fold()
  assert folded.feature_specs == backbone.feature_specs and folded.embed_dim == backbone.embed_dim
  assert folded.preprocessing == backbone.preprocessing
  for size in _SIZES:
    wanted = _features(backbone, size)
    for spec, level in zip(backbone.feature_specs, wanted, strict=True):
      assert level.shape == (2, *(-(-side // spec.stride) for side in size), spec.channels)
      assert np.isfinite(level).all() and np.ptp(level) > 0
    for found, level in zip(_features(folded, size), wanted, strict=True):
      assert np.abs(found - level).max() <= 2e-5 * np.abs(level).max()
  specs = backbone.feature_specs
  ends = jax.jit(lambda program, images: (program.embed(images), program.final_features(images)))
  images = jax.random.normal(jax.random.key(1), (2, *_SIZES[0], 3))
  vectors, final = ends(backbone, images)
  assert vectors.shape == (2, backbone.embed_dim)
  assert final.map.shape == (2, *(-(-side // specs[-1].stride) for side in _SIZES[0]), specs[-1].channels)
  assert (final.class_token is not None) == getattr(backbone.config, "class_token", False)
  for found, wanted in zip(
    jax.tree.leaves(ends(folded, images)), jax.tree.leaves((vectors, final)), strict=True
  ):
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_options_that_change_features_are_in_the_key(family):
  """Every field without weights whose other values change the features changes the key."""
  backbone = _small(family)
  key = feature_key.feature_key(backbone, "abc")
  weights = nnx.state(backbone)
  seen = 0
  for name in backbone.config.weightless:
    other = _small(family, **{name: _other(name, getattr(backbone.config, name), backbone.config)})
    nnx.update(other, weights)
    found, wanted = (_features(one, pixels=True) for one in (other, backbone))
    differ = [one.shape for one in found] != [one.shape for one in wanted] or any(
      np.abs(one - two).max() > 1e-6 * np.abs(two).max() for one, two in zip(found, wanted)
    )
    assert differ <= (feature_key.feature_key(other, "abc") != key), name
    seen += differ
  assert seen


def _other(name, value, config):
  """Another value of a field."""
  special = {
    "whole_windows": True,
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
