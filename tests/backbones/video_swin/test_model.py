"""Video Swin against torchvision's, and what its parts promise."""

import json
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.backbones.swinv2 import model as swinv2
from frozen_vision.backbones.video_swin import checkpoints as convert
from frozen_vision.backbones.video_swin import model as video_swin
from frozen_vision.backbones.video_swin import windows
from frozen_vision.files import tensors
from tests import golden_values, paths, reference_scripts


def lazy(state):
  return {
    key: tensors.LazyTensor(value.shape, value.dtype, lambda value=value: value)
    for key, value in state.items()
  }


def error(found, wanted):
  """Largest difference over the largest magnitude."""
  assert found.shape == wanted.shape
  return float(np.abs(np.asarray(found) - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("name", ["video_swin_16x112", "video_swin_12x100x124"])
def test_features_and_logits_equal_the_golden_ones(name):
  folder = paths.golden_dir()
  spec = json.loads((folder / f"{name}.json").read_text())
  golden = np.load(folder / f"{name}.npz")
  checkpoint = convert.map_tensors(lazy(golden_values.state_dict(spec)), folder / name)
  assert checkpoint.source == "torchvision" and not checkpoint.ignored
  assert checkpoint.config == video_swin.VideoSwinConfig(
    spec["embed_dim"], tuple(spec["depths"]), tuple(spec["heads"]), tuple(spec["window"])
  )
  model = checkpoint.build()
  clip = golden_values.values(spec["seed"], "clip", spec["clip"]).transpose(0, 2, 3, 4, 1)
  features = jax.jit(lambda x: model.norm(model(x)[-1]))(clip)
  assert error(features[..., ::8], golden["features"]) <= 1e-5
  kernel, bias = checkpoint.head()
  assert error(np.asarray(features).mean((1, 2, 3)) @ kernel + bias, golden["logits"]) <= 1e-5


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  folder = tmp_path_factory.mktemp("video_swin")
  return reference_scripts.run("video_swin.py", folder, packages=("torch", "torchvision"))


@pytest.mark.slow
def test_the_whole_tiny_model_equals_torchvision(reference):
  checkpoint = convert.open_checkpoint(reference / "swin3d_t.pth")
  assert (checkpoint.source, checkpoint.name) == ("torchvision", "video_swin_t")
  assert checkpoint.config == video_swin.VARIANTS["video_swin_t"]
  assert set(checkpoint.ignored.values()) == {"recomputed here"} and len(checkpoint.ignored) == 12
  model = checkpoint.build()
  kernel, bias = checkpoint.head()
  wanted = np.load(reference / "clips.npz")
  apply = jax.jit(lambda model, x: (model.norm(model(x)[-1]), model.embed(x)))
  for index in range(4):
    features, pooled = apply(model, wanted[f"clips{index}"])
    assert error(features, wanted[f"features{index}"]) <= 1e-5, index
    assert error(np.asarray(pooled) @ kernel + bias, wanted[f"logits{index}"]) <= 1e-5, index


@pytest.mark.parametrize(
  "name, count",
  [
    # torchvision's documented numbers of parameters, with 400 classes.
    ("video_swin_t", 28_158_070),
    ("video_swin_s", 49_816_678),
    ("video_swin_b", 88_048_984),
  ],
)
def test_parameter_counts(name, count):
  config = video_swin.VARIANTS[name]
  model = nnx.eval_shape(lambda: video_swin.VideoSwin(config, rngs=nnx.Rngs(0)))
  found = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
  assert found + 400 * model.feature_specs[-1].channels + 400 == count


@pytest.mark.parametrize("window", [(1, 2, 3), (3, 2, 2)])
def test_position_index_against_a_plain_loop(window):
  cells = [(t, y, x) for t in range(window[0]) for y in range(window[1]) for x in range(window[2])]
  offsets = [range(1 - side, side) for side in window]
  table = [(t, y, x) for t in offsets[0] for y in offsets[1] for x in offsets[2]]
  index = np.asarray(windows.position_index(window))
  assert windows.table_rows(window) == len(table)
  for i, cell in enumerate(cells):
    for j, other in enumerate(cells):
      assert table[index[i, j]] == tuple(a - b for a, b in zip(cell, other))


@pytest.mark.parametrize(
  "size, window, shift",
  [((4, 4, 8), (2, 2, 4), (1, 1, 2)), ((2, 6, 4), (2, 3, 2), (0, 1, 1)), ((8, 3, 5), (4, 3, 5), (2, 0, 0))],
)
def test_shift_regions_against_a_plain_loop(size, window, shift):
  regions = windows.shift_regions(size, window, shift)
  number = 0
  for start in np.ndindex(*(length // side for length, side in zip(size, window))):
    cells = [tuple(s * w + o for s, w, o in zip(start, window, offset)) for offset in np.ndindex(*window)]
    for i, p in enumerate(cells):
      for j, q in enumerate(cells):
        # Only the cyclic shift brought them together: one of the two came from the other end.
        apart = any(s and ((a + s >= n) != (b + s >= n)) for a, b, n, s in zip(p, q, size, shift))
        assert (regions[number, i] != regions[number, j]) == apart
    number += 1
  assert len(regions) == number
  assert windows.shift_regions(size, window, (0, 0, 0)) is None


@pytest.mark.parametrize(
  "size, shifted, window, shift",
  [
    ((16, 14, 14), True, (8, 7, 7), (4, 3, 3)),
    ((16, 14, 14), False, (8, 7, 7), (0, 0, 0)),
    ((8, 14, 7), True, (8, 7, 7), (0, 3, 0)),
    ((3, 4, 20), True, (3, 4, 7), (0, 0, 3)),
  ],
)
def test_windows_shrink_to_the_map(size, shifted, window, shift):
  assert windows.effective_window(size, (8, 7, 7), shifted) == (window, shift)


@pytest.fixture(scope="module")
def small():
  config = video_swin.VideoSwinConfig(8, (2, 1), (1, 2), (2, 3, 3), drop_path_rate=0.5)
  return video_swin.VideoSwin(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("size", [(8, 32, 32), (5, 33, 20), (1, 3, 1)])
def test_any_input_size(small, size):
  features = jax.eval_shape(small, jax.ShapeDtypeStruct((2, *size, 3), jnp.float32))
  for spec, feature in zip(small.feature_specs, features, strict=True):
    assert feature.shape == (
      2,
      -(-size[0] // 2),
      -(-size[1] // spec.stride),
      -(-size[2] // spec.stride),
      spec.channels,
    )


def test_without_rng_nothing_is_random_and_with_one_branches_are_dropped(small):
  clips = jax.random.normal(jax.random.key(1), (4, 4, 16, 16, 3))
  embed = jax.jit(lambda clips, key: small.embed(clips, rng=key))
  plain = small.embed(clips)
  np.testing.assert_allclose(embed(clips, None), plain, atol=1e-5)
  first = embed(clips, jax.random.key(3))
  np.testing.assert_array_equal(first, embed(clips, jax.random.key(3)))
  assert not np.array_equal(first, embed(clips, jax.random.key(4)))
  x = swinv2.drop_path(jnp.ones((2000, 2, 3)), 0.25, jax.random.key(0))
  assert set(np.unique(x)) == {0.0, np.float32(1 / 0.75)}
  np.testing.assert_array_equal(x.min((1, 2)), x.max((1, 2)))  # whole examples
  assert abs(float((x[:, 0, 0] == 0).mean()) - 0.25) < 0.04


def test_attention_crosses_frames_and_stays_inside_windows(small):
  """A change in one frame reaches the frames of its window, and no others, in an unshifted block."""
  block = video_swin.Block(8, 2, (2, 4, 4), shifted=False, rngs=nnx.Rngs(1))
  x = jax.random.normal(jax.random.key(0), (1, 6, 4, 4, 8))
  changed = np.abs(np.asarray(block(x.at[0, 2, 1, 1, 0].add(3.0)) - block(x))).max((0, 2, 3, 4))
  assert (changed[[2, 3]] > 1e-6).all() and (changed[[0, 1, 4, 5]] == 0).all()


def test_heads_must_divide_channels():
  with pytest.raises(ValueError, match="num_heads.1. = 3 does not divide the stage's 16 channels"):
    video_swin.VideoSwinConfig(8, (1, 1), (1, 3))
  with pytest.raises(ValueError, match="has 1 entries"):
    video_swin.VideoSwinConfig(8, (1, 1), (1,))
