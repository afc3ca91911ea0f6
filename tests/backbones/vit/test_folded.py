"""A folded ViT gives the features of the module it was made from."""

import dataclasses
import functools
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.backbones import base
from frozen_vision.backbones.vit import model as vit
from frozen_vision.backbones.vit.config import VARIANTS
from frozen_vision.layers import attention
from frozen_vision.layers import storage as stored
from tests import random_backbones

_SIZES = dict(embed_dim=32, depth=3, num_heads=2, mlp_dim=48)
_ROWS = (
  *("deit_vits16", "mae_vitb16", "dinov2_vits14", "dinov2_vitg14_reg4", "dinov3_vits16"),
  *("dinov3_vits16plus", "dinov3_vit7b16", "clip_vitb16", "siglip2_vitb16", "relative"),
)


def _shapes(row, **changes):
  if row == "relative":  # a student of feature distillation
    row, changes = "deit_vits16", dict(positions="relative", qkv_bias="qv", layer_scale=True) | changes
  config = VARIANTS[row]
  grid = {} if config.positions == "rotary" else dict(position_grid=3)
  return base.abstract(vit.ViT, config.replace(**_SIZES | grid | changes))


@functools.cache
def _backbone(row, **changes):
  return random_backbones.fill(_shapes(row, **changes))


def _run(module, images):
  return jax.jit(lambda m, x: (*m(x), m.embed(x), m.token_sequence(x)))(module, images)


def _assert_close(found, wanted, tolerance=1e-5):
  assert len(found) == len(wanted)
  for one, other in zip(found, wanted):
    assert one.shape == other.shape
    assert np.abs(one - other).max() <= tolerance * np.abs(other).max()


def _images(*size):
  return jax.random.normal(jax.random.key(9), (2, *size, 3))


@pytest.mark.parametrize("row", _ROWS)
def test_equal_features(row):
  backbone, images = _backbone(row), _images(50, 70)
  wanted = _run(backbone, images)
  folded = random_backbones.fold(backbone)
  assert folded.stages[0]["repeated"] is not None and folded.stages[0]["blocks"] == ()
  _assert_close(_run(folded, images), wanted)
  assert folded.feature_specs == backbone.feature_specs and folded.embed_dim == backbone.embed_dim
  assert not any(isinstance(leaf, nnx.Param) for leaf in jax.tree.leaves(folded, is_leaf=stored.is_variable))


def test_single_blocks_and_early_taps():
  backbone, images = _backbone("dinov3_vits16", taps=(0, 1)), _images(32, 48)
  wanted = _run(backbone, images)
  _assert_close(_run(random_backbones.fold(backbone, scan=False), images), wanted)
  folded = random_backbones.fold(backbone)
  assert len(folded.stages[1]["blocks"]) == 1  # what only `embed` needs
  _assert_close(_run(folded, images), wanted)


def test_stride_16_of_patches_of_14():
  backbone, images = _backbone("dinov2_vits14_reg4", stride=16), _images(60, 96)
  assert backbone.preprocessing.input_scale == 14 / 16
  wanted = _run(backbone, images)
  assert [map_.shape for map_ in wanted[:-2]] == [(2, 4, 6, 32)] * 3
  _assert_close(_run(random_backbones.fold(backbone), images), wanted)


@pytest.mark.parametrize("row", ["dinov2_vits14", "dinov3_vits16plus"])
def test_long_sequences_never_hold_all_scores(row, monkeypatch):
  backbone, images = _backbone(row), _images(64, 80)
  wanted = _run(backbone, images)
  tokens = wanted[-1].shape[1]
  scores = 2 * 2 * tokens * tokens * 4
  monkeypatch.setattr(attention, "_SCORE_BYTES", scores // 3)
  folded = random_backbones.fold(backbone)
  _assert_close(_run(folded, images), wanted)

  text = str(jax.make_jaxpr(lambda m, x: m(x))(folded, images))
  shapes = [tuple(map(int, sides.split(","))) for sides in re.findall(r"f32\[([\d,]+)\]", text)]
  held = [4 * int(np.prod(shape)) for shape in shapes if len(shape) > 3 and shape[-1] == tokens]
  assert held and max(held) <= scores // 3


def test_chunks_of_queries_have_their_biases(monkeypatch):
  """Seven queries in three chunks; the last one is padded."""
  rng = np.random.default_rng(0)
  parts = [jnp.asarray(rng.standard_normal((1, 7, 2, 4)), jnp.float32) for _ in range(3)]
  bias = jnp.asarray(rng.standard_normal((2, 7, 7)), jnp.float32)
  scores = jnp.einsum("bqhd,bkhd->bhqk", *parts[:2]) / 2 + bias
  wanted = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), parts[2])
  _assert_close(attention.attention(*parts, bias=bias), wanted)
  monkeypatch.setattr(attention, "_SCORE_BYTES", 2 * 3 * 7 * 4)
  _assert_close(attention.attention(*parts, bias=bias), wanted)


def test_chunks_have_gradients(monkeypatch):
  rng = np.random.default_rng(0)
  parts = [jnp.asarray(rng.standard_normal((1, 7, 2, 4)), jnp.float32) for _ in range(3)]

  def loss(parts):
    return jnp.sum(jnp.sin(attention.attention(*parts)))

  wanted = jax.jit(jax.grad(loss))(parts)
  monkeypatch.setattr(attention, "_SCORE_BYTES", 2 * 7 * 4 * 2)
  jax.clear_caches()
  _assert_close(jax.jit(jax.grad(loss))(parts), wanted)


def test_smaller_weights_drift_little():
  """Cosine similarity of each cell's features with those of float32, in the worst cell of the last tap."""
  backbone, images = _backbone("dinov3_vits16"), _images(64, 64)
  wanted = np.asarray(_run(backbone, images)[-3])
  sizes = {}
  # Twice what the worst of eight draws of weights lost: 0.000074, 0.00002, and 0.00021 with int8.
  for storage, options, least in (
    ("bfloat16", dict(dtype=jnp.bfloat16), 0.99985),
    ("bfloat16", {}, 0.99996),
    ("int8", {}, 0.9995),
  ):
    folded = random_backbones.fold(backbone, storage=storage, **options)
    found = np.asarray(_run(folded, images)[-3], np.float32)
    cosine = np.sum(found * wanted, -1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert least < cosine.min() < 1 - 1e-7, (storage, cosine.min())
    sizes[storage] = sum(leaf.nbytes for leaf in jax.tree.leaves(folded))
  assert sizes["int8"] < 0.65 * sizes["bfloat16"]


def test_blocks_are_read_one_at_a_time():
  backbone, images = _backbone("dinov2_vits14_reg4"), _images(42, 42)
  abstract = _shapes("dinov2_vits14_reg4")
  weights = dict(nnx.to_flat_state(nnx.state(backbone)))
  asked = []

  def read(path, module):
    asked.append(path)
    prefix = tuple(int(name) if name.isdigit() else name for name in path.split("/") if name)
    graphdef, shapes = nnx.split(module)
    leaves = [(key, weights[prefix + key]) for key, _ in nnx.to_flat_state(shapes)]
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))

  folded = abstract.fold(read=read)
  assert [path for path in asked if "blocks" in path] == [f"blocks/{number}" for number in range(3)]
  _assert_close(_run(folded, images), _run(backbone.fold(), images), 0)
  # What was read is every variable there is, once.
  shapes = stored.shapes(abstract)
  assert jax.tree.structure(folded) == jax.tree.structure(shapes)
  assert [leaf.shape for leaf in jax.tree.leaves(folded)] == [leaf.shape for leaf in jax.tree.leaves(shapes)]


def test_stacked_backbones_train():
  backbone, images = _backbone("dinov3_vits16"), _images(32, 32)
  program = backbone.stacked()
  _assert_close(_run(program, images), _run(backbone, images))
  assert all(
    isinstance(leaf, nnx.Param) and leaf.dtype == jnp.float32
    for leaf in jax.tree.leaves(program, is_leaf=stored.is_variable)
  )

  def loss(module):
    return jnp.mean(module(images, rng=None)[-1] ** 2)

  grads = jax.jit(jax.grad(loss))(program)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
  unfolded = jax.jit(jax.grad(loss))(backbone).blocks[0].mlp.fc1.kernel[...]
  np.testing.assert_allclose(
    grads.stages[0]["repeated"][0]["mlp"]["fc1"]["kernel"][0], unfolded, rtol=1e-3, atol=1e-6
  )


def test_unknown_storage():
  with pytest.raises(ValueError, match="'int4'.*float32, bfloat16, int8"):
    _backbone("deit_vits16").fold(storage="int4")


def test_static_fields():
  backbone = _backbone("clip_vitb16")
  folded = backbone.fold(storage="int8")
  assert dataclasses.asdict(folded.preprocessing) == dataclasses.asdict(backbone.preprocessing)
  assert (folded.storage, folded.dtype) == ("int8", jnp.float32)
  assert folded.sharding_rules == backbone.sharding_rules
