"""Video Swin checkpoints under the names of each source; 2D weights inflated over time."""

import ast
import pathlib
import re

import jax
import numpy as np
import pytest

from frozen_vision.backbones.video_swin import checkpoints as convert
from frozen_vision.backbones.video_swin import model as video_swin
from frozen_vision.files import tensors
from tests import golden_values

_GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "golden" / "swin2d.npz"


def _lazy(state):
  return {
    key: tensors.LazyTensor(value.shape, value.dtype, lambda value=value: value)
    for key, value in state.items()
  }


def _torchvision_2d():
  """Weights of the golden 2D network, by the rule of their names (tests/references/video_swin.py)."""
  golden = np.load(_GOLDEN)
  state = {}
  for key, shape in zip(golden["names"].tolist(), golden["shapes"].tolist()):
    shape = ast.literal_eval(shape)
    is_norm = "norm" in key or key.startswith("features.0.2")
    scale = 0.1 if len(shape) == 1 else 0.5 if key.endswith("table") else 0.5 * np.prod(shape[1:]) ** -0.5
    state[key] = golden_values.values(0, key, shape, scale, float(is_norm and key.endswith("weight")))
  return state, golden


def _microsoft_2d(state):
  """The same weights under the names of Microsoft's Swin V1, with its buffers."""
  renamed = {}
  for key, value in state.items():
    key = re.sub(r"^features\.0\.0\.", "patch_embed.proj.", key)
    key = re.sub(r"^features\.0\.2\.", "patch_embed.norm.", key)
    key = re.sub(
      r"^features\.(\d+)\.(reduction|norm)\.",
      lambda m: f"layers.{int(m[1]) // 2 - 1}.downsample.{m[2]}.",
      key,
    )
    key = re.sub(r"^features\.(\d+)\.(\d+)\.", lambda m: f"layers.{int(m[1]) // 2}.blocks.{m[2]}.", key)
    renamed[key.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")] = value
  renamed["layers.0.blocks.0.attn.relative_position_index"] = np.zeros((16, 16), np.int64)
  renamed["layers.0.blocks.1.attn_mask"] = np.zeros((16, 16, 16), np.float32)
  return renamed


def _torchvision_3d():
  """A small 3D network of random numbers under torchvision's names."""
  rng = np.random.default_rng(0)
  shapes = {
    "patch_embed.proj.weight": (8, 3, 2, 4, 4),
    "patch_embed.proj.bias": (8,),
    "patch_embed.norm.weight": (8,),
    "patch_embed.norm.bias": (8,),
    "features.1.reduction.weight": (16, 32),
    "features.1.norm.weight": (32,),
    "features.1.norm.bias": (32,),
    "norm.weight": (16,),
    "norm.bias": (16,),
    "head.weight": (5, 16),
    "head.bias": (5,),
  }
  for n, d, heads in ((0, 8, 1), (2, 16, 2)):
    shapes |= {
      f"features.{n}.0.{name}": shape
      for name, shape in {
        "norm1.weight": (d,),
        "norm1.bias": (d,),
        "norm2.weight": (d,),
        "norm2.bias": (d,),
        "attn.relative_position_bias_table": (7 * 25, heads),
        "attn.qkv.weight": (3 * d, d),
        "attn.qkv.bias": (3 * d,),
        "attn.proj.weight": (d, d),
        "attn.proj.bias": (d,),
        "mlp.0.weight": (4 * d, d),
        "mlp.0.bias": (4 * d,),
        "mlp.3.weight": (d, 4 * d),
        "mlp.3.bias": (d,),
      }.items()
    }
  return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def _released(state):
  """The same weights under the names of the released code."""
  renamed = {}
  for key, value in state.items():
    key = re.sub(r"^head\.", "cls_head.fc_cls.", key)
    if not key.startswith("cls_head"):
      key = "backbone." + re.sub(
        r"^features\.(\d+)\.(reduction|norm)\.", lambda m: f"layers.{int(m[1]) // 2}.downsample.{m[2]}.", key
      )
    key = re.sub(r"features\.(\d+)\.(\d+)\.", lambda m: f"layers.{int(m[1]) // 2}.blocks.{m[2]}.", key)
    renamed[key.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")] = value
  return renamed


def test_both_names_of_video_swin_give_the_same_network():
  state = _torchvision_3d()
  checkpoints = [convert.map_tensors(_lazy(part), pathlib.Path("x")) for part in (state, _released(state))]
  assert [c.source for c in checkpoints] == ["torchvision", "Video-Swin-Transformer"]
  first, second = checkpoints
  assert first.config == second.config and first.config.window_size == (4, 3, 3)
  assert first.leaves.keys() == second.leaves.keys() and len(first.leaves) == len(state) - 2
  for key, leaf in first.leaves.items():
    np.testing.assert_array_equal(leaf.read(), second.leaves[key].read())
    assert leaf.shape == leaf.read().shape
  np.testing.assert_array_equal(first.head()[0], state["head.weight"].T)
  first.build()


def test_conversion_is_total_or_an_error():
  state = _torchvision_3d()
  missing = {key: value for key, value in state.items() if key != "features.2.0.mlp.3.bias"}
  with pytest.raises(ValueError, match="missing stages/1/blocks/0/mlp/fc2/bias"):
    convert.map_tensors(_lazy(missing), pathlib.Path("x")).build()
  with pytest.raises(ValueError, match=r"unexpected features\.0\.0\.attn\.logit_scale \(3,\)"):
    convert.map_tensors(_lazy(state | {"features.0.0.attn.logit_scale": np.ones(3)}), pathlib.Path("x"))
  wrong = state | {"features.0.0.attn.proj.weight": np.ones((8, 9), np.float32)}
  with pytest.raises(ValueError, match=r"attn/proj/kernel has shape \(9, 8\), expected \(8, 8\)"):
    convert.map_tensors(_lazy(wrong), pathlib.Path("x")).build()
  half = {key: value for key, value in state.items() if key != "head.bias"}
  with pytest.raises(ValueError, match="missing head.bias of the classifier"):
    convert.map_tensors(_lazy(half), pathlib.Path("x"))
  with pytest.raises(ValueError, match="keys of no known checkpoint"):
    convert.map_tensors(_lazy({"conv1.weight": np.ones((8, 3, 7, 7))}), pathlib.Path("x"))
  with pytest.raises(ValueError, match="Unknown options .'window'."):
    convert.map_tensors(_lazy(state), pathlib.Path("x"), window=3)


@pytest.mark.parametrize("frames", [4, 32])
def test_inflated_weights_reproduce_the_2d_network_on_a_still_clip(frames):
  """4 frames fit into a window of 8; 32 are two windows in time, shifted in every second block."""
  state, golden = _torchvision_2d()
  checkpoint = convert.map_tensors(_lazy(state), _GOLDEN)
  assert checkpoint.source == "torchvision 2D" and checkpoint.config.window_size == (8, 4, 4)
  model = checkpoint.build()
  images = golden_values.values(0, "images", (2, 3, 64, 64)).transpose(0, 2, 3, 1)[:1]
  clips = np.repeat(images[:, None], frames, axis=1)
  features = np.asarray(jax.jit(lambda x: model.norm(model(x)[-1]))(clips))
  wanted = golden["features"][:1]
  assert features.shape == (1, frames // 2, 4, 4, 64)
  largest = np.abs(wanted).max()
  assert np.abs(features - wanted[:, None]).max() <= 1e-5 * largest
  kernel, bias = checkpoint.head()
  logits = features.mean((1, 2, 3)) @ kernel + bias
  np.testing.assert_allclose(logits, golden["logits"][:1], atol=1e-5 * np.abs(golden["logits"]).max())


def test_microsofts_2d_names_give_the_same_inflated_network():
  state, _ = _torchvision_2d()
  first = convert.map_tensors(_lazy(state), _GOLDEN)
  second = convert.map_tensors(_lazy(_microsoft_2d(state)), _GOLDEN)
  assert second.source == "Swin Transformer 2D" and len(second.ignored) == 2
  assert first.leaves.keys() == second.leaves.keys() and first.config == second.config
  for key, leaf in first.leaves.items():
    np.testing.assert_array_equal(leaf.read(), second.leaves[key].read())


@pytest.mark.parametrize("window", [3, 7])
def test_biases_are_resized_as_by_pytorch_and_repeated_over_time(window):
  state, golden = _torchvision_2d()
  table = state["features.1.0.attn.relative_position_bias_table"]
  wanted = golden[f"bias_window{window}"]
  found = convert.inflate_bias(table, (3, window, window), 4).reshape(5, -1, table.shape[1])
  for offset in found:
    np.testing.assert_allclose(offset, wanted, atol=1e-5)
  np.testing.assert_array_equal(
    convert.inflate_bias(table, (2, 4, 4), 4).reshape(3, -1, table.shape[1])[1], table
  )
  checkpoint = convert.map_tensors(_lazy(state), _GOLDEN, window_size=(2, window, window))
  leaf = checkpoint.leaves["stages/0/blocks/0/attn/position_bias"]
  assert leaf.shape == leaf.read().shape == (3 * (2 * window - 1) ** 2, 1)


def test_a_window_that_the_weights_do_not_tell_is_asked_for():
  state = _torchvision_3d()
  rows = 9 * 25  # (5, 3, 3), or (13, 2, 2)
  for key in list(state):
    if key.endswith("bias_table"):
      state[key] = np.zeros((rows, state[key].shape[1]), np.float32)
  with pytest.raises(ValueError, match="give window_size="):
    convert.map_tensors(_lazy(state), pathlib.Path("x"))
  checkpoint = convert.map_tensors(_lazy(state), pathlib.Path("x"), window_size=(5, 3, 3))
  assert checkpoint.config == video_swin.VideoSwinConfig(8, (1, 1), (1, 2), (5, 3, 3))
