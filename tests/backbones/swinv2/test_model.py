"""SwinV2 against the reference implementation, and what its contract promises."""

import json
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.backbones import base, families
from frozen_vision.backbones.swinv2 import checkpoints as convert
from frozen_vision.backbones.swinv2 import model as swinv2
from frozen_vision.backbones.swinv2 import windows
from frozen_vision.files import tensors as weights
from tests import golden_values, paths, random_backbones

_PRETRAINED_WINDOWS = {"swinv2_w8": (0, 0, 0, 0), "swinv2_w12from8": (8, 8, 8, 4), "swinv2_w16": (0, 0, 0, 0)}


@pytest.mark.parametrize("name", ["swinv2_w8", "swinv2_w12from8", "swinv2_w16"])
def test_features_and_logits_equal_the_reference(name):
  folder = paths.golden_dir()
  spec = json.loads((folder / f"{name}.json").read_text())
  golden = np.load(folder / f"{name}.npz")
  tensors = {
    key: weights.LazyTensor(value.shape, value.dtype, lambda value=value: value)
    for key, value in golden_values.state_dict(spec).items()
  }
  checkpoint = convert.map_tensors(
    tensors,
    folder / name,
    depths=tuple(spec["depths"]),
    window_size=spec["window"],
    pretrained_window_sizes=_PRETRAINED_WINDOWS[name],
  )
  assert checkpoint.source == "timm" and not checkpoint.ignored
  assert checkpoint.config.num_heads == tuple(spec["heads"])
  graphdef, state = nnx.split(base.abstract(swinv2.SwinV2, checkpoint.config))
  backbone = nnx.merge(graphdef, weights.fill(state, checkpoint.leaves, folder / name))
  head = checkpoint.head()
  shape = (2, 3, spec["image"], spec["image"])
  images = golden_values.values(spec["seed"], "images", shape).transpose(0, 2, 3, 1)
  features, pooled = jax.jit(lambda module, x: (module(x), module.embed(x)))(backbone, images)
  logits = pooled @ head.kernel + head.bias
  np.testing.assert_array_less(
    np.abs(np.asarray(logits) - golden["logits"]).max(), 1e-5 * np.abs(golden["logits"]).max()
  )
  for stage, feature in enumerate(features):
    wanted = golden[f"stage{stage}"]
    found = np.asarray(feature).transpose(0, 3, 1, 2)[:, :: max(1, feature.shape[-1] // 16)]
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max(), stage


@pytest.mark.parametrize(
  "name, with_head, without_head, extra_norms",
  [
    ("swinv2_t", 28_347_154, None, []),
    ("swinv2_s", 49_728_418, None, []),
    ("swinv2_b", 87_918_816, 86_893_816, []),
    ("swinv2_l", 196_739_932, 195_202_932, []),
    ("swinv2_h", 658_036_370, 655_219_370, [5, 11, 17]),
    ("swinv2_g", 3_001_940_680, 2_997_843_680, [5, 11, 17, 23, 29, 35, 41]),
  ],
)
def test_parameter_counts_and_extra_norms(name, with_head, without_head, extra_norms):
  backbone = families.abstract_backbone(name)
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(backbone, nnx.Param)))
  assert count + 1000 * backbone.feature_specs[-1].channels + 1000 == with_head
  assert without_head is None or count == without_head
  assert not jax.tree.leaves(nnx.state(backbone, nnx.Not(nnx.Param)))
  found = [
    [i for i, block in enumerate(stage.blocks) if block.extra_norm is not None] for stage in backbone.stages
  ]
  assert found == [[], [], extra_norms, []]  # counted within the stage


@pytest.mark.parametrize(
  "window, pretrained, at_end, at_one",
  [
    (12, 12, 1.056642, 0.262832),
    (8, 8, 1.056642, 0.366512),
    (6, 6, 1.056642, 0.459504),
    (12, 0, 1.056642, 0.262832),
    (16, 12, 1.191330, 0.262832),
    (24, 12, 1.382633, 0.262832),
    (32, 12, 1.519126, 0.262832),
    (48, 12, 1.712253, 0.262832),
    (40, 12, 1.625320, 0.262832),
    (56, 12, 1.785851, 0.262832),
    (8, 6, 1.202936, 0.459504),
    (12, 6, 1.405744, 0.459504),
    (16, 6, 1.547952, 0.459504),
    (24, 6, 1.746771, 0.459504),
  ],
)
def test_position_coordinates(window, pretrained, at_end, at_one):
  side = 2 * window - 1
  table = windows.position_coordinates((window, window), pretrained).reshape(side, side, 2)
  np.testing.assert_allclose(table[-1, window - 1], [at_end, 0], atol=1e-6)
  np.testing.assert_allclose(table[window - 1, window], [0, at_one], atol=1e-6)
  np.testing.assert_array_equal(table, -table[::-1, ::-1])


def test_position_coordinates_of_flat_windows_are_finite():
  table = windows.position_coordinates((1, 4), 0).reshape(1, 7, 2)
  assert np.isfinite(table).all() and (table[..., 0] == 0).all()
  np.testing.assert_allclose(table[0, -1, 1], 1.056642, atol=1e-6)
  assert np.isfinite(windows.position_coordinates((2, 2), 1)).all()


@pytest.mark.parametrize("window", [(2, 3), (4, 4)])
def test_position_index_against_a_plain_loop(window):
  height, width = window
  cells = [(y, x) for y in range(height) for x in range(width)]
  index = np.asarray(windows.position_index(window))
  table = [(dy, dx) for dy in range(1 - height, height) for dx in range(1 - width, width)]
  for i, (y, x) in enumerate(cells):
    for j, (y2, x2) in enumerate(cells):
      assert table[index[i, j]] == (y - y2, x - x2)


@pytest.mark.parametrize(
  "size, window, shift",
  [
    ((8, 8), (4, 4), (2, 2)),
    ((8, 12), (4, 4), (2, 2)),
    ((4, 12), (4, 4), (0, 2)),
    ((6, 9), (2, 3), (1, 1)),
    ((3, 10), (3, 5), (0, 2)),
  ],
)
def test_shift_regions_against_a_plain_loop(size, window, shift):
  regions = windows.shift_regions(size, window, shift)

  def apart(p, q, length, rolled):
    """Whether the cyclic shift, and nothing else, brought two positions into one window."""
    return (p + rolled >= length) != (q + rolled >= length)  # one of the two came from the other end

  number = 0
  for top in range(0, size[0], window[0]):
    for left in range(0, size[1], window[1]):
      cells = [(top + y, left + x) for y in range(window[0]) for x in range(window[1])]
      for i, (y, x) in enumerate(cells):
        for j, (y2, x2) in enumerate(cells):
          masked = apart(y, y2, size[0], shift[0]) or apart(x, x2, size[1], shift[1])
          assert (regions[number, i] != regions[number, j]) == masked
      number += 1
  assert regions.shape == (number, len(cells)) and regions.dtype == np.int32


def test_no_regions_without_a_shift():
  assert windows.shift_regions((8, 8), (4, 4), (0, 0)) is None


@pytest.mark.parametrize("size", [(16, 24), (15, 22), (3, 24)])
def test_large_windows_in_groups_change_nothing(size, monkeypatch):
  window = (min(4, size[0]), 4)
  qkv = jax.random.normal(jax.random.key(0), (2, *size, 12))
  bias = jax.random.normal(jax.random.key(1), (2, window[0] * 4, window[0] * 4))
  scale = jnp.array([3.0, 5.0])
  groups = []

  def attention(x, found, regions):
    groups.append(x.shape)
    assert found == window
    return windows.cosine_attention(x, found, scale, bias, regions)

  def run(x):
    return windows.attend_in_windows(x, 4, True, attention, 2)

  wanted, wanted_gradient = _output_and_gradient(run, qkv)
  whole = set(groups)
  for most in (1, 4, 6, 12, 24):
    groups.clear()
    monkeypatch.setattr(windows, "_MOST_SCORES", most * 2 * (window[0] * 4) ** 2)
    found, gradient = _output_and_gradient(run, qkv)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.testing.assert_allclose(gradient, wanted_gradient, atol=5e-5)
    in_group = {shape[1] * shape[2] // (window[0] * 4) for shape in groups}
    assert max(in_group) <= most and all(shape[0] == 2 for shape in groups)
    if most < 6:  # every map here has more windows
      assert not whole & set(groups)


def _output_and_gradient(run, x):
  """`run` of x, and the gradient of a sum over it; traced anew at every call."""

  def loss(x):
    y = run(x)
    return jnp.sum(jnp.sin(y)), y

  gradient, y = jax.jit(jax.grad(loss, has_aux=True))(x)
  return y, gradient


@pytest.mark.parametrize("window", [(2, 5), (4, 3), (1, 1)])
def test_pairs_by_slices_are_those_that_are_gathered(window, monkeypatch):
  table = jax.random.normal(jax.random.key(0), ((2 * window[0] - 1) * (2 * window[1] - 1), 3))
  wanted = windows.pair_bias(table, window)
  assert wanted.shape == (3, window[0] * window[1], window[0] * window[1])
  monkeypatch.setattr(windows, "_MOST_PAIRS", 0)
  by_head = windows.pair_bias(table, window)
  assert by_head.shape == (3, 2 * window[0] - 1, 2 * window[1] - 1)
  np.testing.assert_array_equal(windows._pairs_of_table(by_head), wanted)


@pytest.mark.parametrize("size", [(8, 12), (7, 9), (3, 12)])
def test_heads_in_groups_change_nothing(size, monkeypatch):
  window = (min(4, size[0]), 4)
  qkv = jax.random.normal(jax.random.key(0), (2, *size, 24))
  table = jax.random.normal(jax.random.key(1), ((2 * window[0] - 1) * 7, 4))
  scale = jnp.array([3.0, 5.0, 2.0, 4.0])

  def run(inputs):
    qkv, table = inputs

    def attention(x, found, regions):
      return windows.cosine_attention(x, found, scale, windows.pair_bias(table, found), regions)

    return windows.attend_in_windows(qkv, 4, True, attention, 4)

  wanted, wanted_gradients = _output_and_gradient(run, (qkv, table))
  monkeypatch.setattr(windows, "_MOST_PAIRS", 0)
  for at_once in (1, 2, 4):
    monkeypatch.setattr(windows, "_MOST_SCORES", at_once * (window[0] * 4) ** 2)
    scores = f"f32[2,{at_once},{window[0] * 4},{window[0] * 4}]"  # a window of both images
    assert scores in str(jax.make_jaxpr(lambda inputs: run(inputs))((qkv, table)))
    found, gradients = _output_and_gradient(run, (qkv, table))
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    for gradient, wanted_gradient in zip(gradients, wanted_gradients):
      np.testing.assert_allclose(gradient, wanted_gradient, atol=5e-5)


_SMALL = dict(embed_dim=8, depths=(2, 1, 1, 1), num_heads=(1, 2, 4, 8), window_sizes=(4, 4, 4, 2))
_features = jax.jit(lambda module, images: module(images))


@pytest.fixture(scope="module")
def small():
  return random_backbones.build("swinv2_nano", **_SMALL)


@pytest.mark.parametrize("size", [(64, 64), (50, 70), (33, 128), (4, 4), (1, 37)])
def test_any_input_size(small, size):
  images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
  for spec, feature in zip(small.feature_specs, jax.eval_shape(small, images), strict=True):
    assert feature.shape == (2, -(-size[0] // spec.stride), -(-size[1] // spec.stride), spec.channels)


def test_what_is_padded_inside_is_zeros_at_the_right_and_at_the_bottom(small):
  images = jax.random.normal(jax.random.key(1), (2, 50, 69, 3))
  features = _features(small, images)
  padded = _features(small, jnp.pad(images, ((0, 0), (0, 2), (0, 3), (0, 0))))
  for found, wanted in zip(features, padded):
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_maps_that_windows_do_not_divide_are_padded_and_cropped():
  config = swinv2.SwinV2Config(8, (2,), (2,), (8,), (0,))
  block = swinv2.Block(config, 0, 1, 0.0, dtype=jnp.float32, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (1, 20, 12, 8))
  padded = jax.jit(block._attend)(jnp.pad(x, ((0, 0), (0, 4), (0, 4), (0, 0))))
  np.testing.assert_allclose(jax.jit(block._attend)(x), padded[:, :20, :12], atol=1e-6)


def test_without_rng_nothing_is_random(small):
  random = families.abstract_backbone("swinv2_nano", drop_path_rate=0.9, **_SMALL)
  nnx.update(random, nnx.state(small))
  images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
  program = _features.lower(small, images)
  assert _features.lower(random, images).as_text() == program.as_text()
  wanted = program.compile()(small, images)
  draw = jax.jit(lambda random, key: random(images, rng=key)[-1])

  def with_rng(key):
    return draw(random, key)

  first = with_rng(jax.random.key(3))
  np.testing.assert_array_equal(first, with_rng(jax.random.key(3)))
  assert not np.array_equal(first, with_rng(jax.random.key(4)))
  assert not np.array_equal(first, wanted[-1])


def test_drop_path():
  backbone = families.abstract_backbone("swinv2_nano", drop_path_rate=0.8, **_SMALL)
  rates = [block.drop_path for stage in backbone.stages for block in stage.blocks]
  np.testing.assert_allclose(rates, [0, 0.2, 0.4, 0.6, 0.8])
  x = jnp.ones((2000, 2, 3))
  dropped = np.asarray(swinv2.drop_path(x, 0.25, jax.random.key(0)))
  assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
  np.testing.assert_array_equal(dropped.min((1, 2)), dropped.max((1, 2)))  # whole examples
  assert abs((dropped[:, 0, 0] == 0).mean() - 0.25) < 0.04


def test_a_fresh_backbone_is_the_identity_in_every_block():
  config = families.backbone_config("swinv2_nano", window_sizes=(4, 4, 4, 2))
  block = swinv2.Block(config, 0, 1, 0.0, dtype=jnp.float32, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (1, 8, 8, 32))
  np.testing.assert_array_equal(jax.jit(block)(x), x)
