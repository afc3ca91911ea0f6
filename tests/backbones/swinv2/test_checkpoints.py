"""Public SwinV2 checkpoints: total, strict, with the windows they were trained at, and the same numbers."""

import json
import pathlib

from flax import nnx
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from frozen_vision import convert as command
from frozen_vision.backbones import families
from frozen_vision.backbones.swinv2 import checkpoint_windows as windows_lib
from frozen_vision.backbones.swinv2 import checkpoints as convert
from frozen_vision.backbones.swinv2 import config as swinv2_config
from frozen_vision.files import tensors as weights
from frozen_vision.files import trees
from tests.backbones.swinv2 import checkpoint_sources as sources
from tests.files import pth_file

_SMALL = dict(embed_dim=8, depths=(1, 2), num_heads=(1, 2))
_WINDOWS = (4, 2)


@pytest.fixture(scope="module")
def small():
  """timm's state dict of a small network, with values."""
  state = sources.timm(8, (1, 2), (1, 2), classes=5)
  rng = np.random.default_rng(0)
  return {key: rng.standard_normal(value.shape).astype(np.float32) for key, value in state.items()}


def _sources(state):
  headless = {key: value for key, value in state.items() if not key.startswith("head.")}
  module = {f"module.{key}": value for key, value in sources.microsoft(state).items()}
  return {
    "timm": state,
    "Microsoft": sources.microsoft(state, _WINDOWS),
    "Microsoft, distributed": module,
    "Microsoft, large": {k.replace("cpb_mlp", "rpe_mlp"): v for k, v in sources.microsoft(state).items()},
    "SimMIM": sources.simmim(state),
    "Feature Distillation": sources.feature_distillation(state),
    "transformers": sources.transformers(state),
    "transformers, bare": sources.transformers(headless, prefix=""),
    "torchvision": sources.torchvision(state, _WINDOWS),
  }


def _lazy(state):
  return {key: weights.LazyTensor(v.shape, v.dtype, lambda v=v: v) for key, v in state.items()}


def _map(state, name=None, path="x.pth", **overrides):
  return convert.map_tensors(_lazy(state), pathlib.Path(path), name=name, **overrides)


@pytest.mark.parametrize(
  "variant,parameters",
  [
    ("swinv2_t", 28_347_154),
    ("swinv2_s", 49_728_418),
    ("swinv2_b", 87_918_816),
    ("swinv2_l", 196_739_932),
    ("swinv2_h", 658_036_370),
    ("swinv2_g", 3_001_940_680),
  ],
)
def test_every_key_of_every_source_and_size(variant, parameters):
  row = swinv2_config.VARIANTS[variant]
  state = sources.timm(row.embed_dim, row.depths, row.num_heads, extra_norm=row.extra_norm_interval)
  assert sum(value.size for value in state.values()) == parameters
  found = {"Microsoft": sources.microsoft(state, (8,) * 4), "SimMIM": sources.simmim(state)}
  if not row.extra_norm_interval:  # the others have no such networks.
    found |= {
      "timm": state,
      "transformers": sources.transformers(state),
      "torchvision": sources.torchvision(state, (8,) * 4),
    }
  for source, tensors in found.items():
    checkpoint = _map(tensors, path="swinv2_window8_256.pth")
    assert (checkpoint.source, checkpoint.name) == (source, variant)
    assert checkpoint.config.window_sizes == (8, 8, 8, 8)
    assert checkpoint.config.extra_norm_interval == row.extra_norm_interval
    head = 0 if source == "SimMIM" else 1000 * (8 * row.embed_dim + 1)
    numbers = sum(int(np.prod(leaf.shape)) for leaf in checkpoint.leaves.values())
    assert numbers + 1000 * (8 * row.embed_dim + 1) == parameters
    assert len(checkpoint.used) + len(checkpoint.ignored) + 2 * bool(head) == len(tensors)
    assert (checkpoint.head_leaves is None) == (not head)


def test_every_source_gives_the_same_weights(small, tmp_path):
  wanted = None
  for name, state in _sources(small).items():
    for path in (tmp_path / "x.pth", tmp_path / "x.safetensors"):
      if path.suffix == ".pth":
        # transposed in storage, as views may be.
        pth_file.write(
          path,
          {
            "model": {
              k: np.asfortranarray(v.astype(np.float32)) for k, v in state.items() if v.dtype != np.int64
            }
          },
        )
      else:
        safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, path)
      backbone = families.load_backbone(path, **_SMALL, window_sizes=_WINDOWS)
      found = trees.fingerprint(nnx.state(backbone, nnx.Param))
      wanted = wanted or found
      assert found == wanted, (name, path.suffix)
      head = convert.open_checkpoint(path, **_SMALL, window_sizes=_WINDOWS).head()
      if head is not None:
        np.testing.assert_array_equal(head.kernel, small["head.fc.weight"].T)
        np.testing.assert_array_equal(head.bias, small["head.fc.bias"])
      else:
        assert name in ("SimMIM", "Feature Distillation", "transformers, bare")
  leaves = trees.flatten(nnx.state(backbone, nnx.Param))
  np.testing.assert_array_equal(
    leaves["stages/1/blocks/0/attn/v_bias"], small["layers.1.blocks.0.attn.v_bias"]
  )


def test_one_error_lists_every_key_at_fault(small):
  state = sources.microsoft(small)
  state["extra"] = state.pop("layers.1.blocks.1.norm2.bias")
  state["layers.0.blocks.0.attn.proj.weight"] = np.zeros((8, 9))
  state["head.weight"] = np.zeros((5, 7))
  with pytest.raises(ValueError) as caught:
    _map(state, **_SMALL, window_sizes=_WINDOWS)
  message = str(caught.value)
  for part in (
    "5 keys at fault",
    "missing layers.1.blocks.1.norm2.bias (16,)",
    "unexpected extra (16,)",
    "layers.0.blocks.0.attn.proj.weight has shape (8, 9), expected (8, 8)",
    "classifier head.weight is (5, 7), expected (classes, 16)",
  ):
    assert part in message


def test_wrong_variants_and_no_variants(small):
  state = sources.microsoft(sources.timm(96, (2, 2, 6, 2), (3, 6, 12, 24)))
  with pytest.raises(ValueError, match="does not fit swinv2_s(.|\n)*missing layers.2.blocks.17.norm2.weight"):
    _map(state, "swinv2_s", window_size=8)
  with pytest.raises(ValueError, match="does not fit swinv2_b(.|\n)*proj.weight has shape"):
    _map(state, "swinv2_b", window_size=8)
  with pytest.raises(ValueError, match="shape of no known variant.*'depths': \\(1, 2\\)"):
    _map(sources.microsoft(small), window_size=4)
  without = {k: v for k, v in state.items() if not k.startswith("layers.2.blocks.5.")}
  with pytest.raises(ValueError, match="shape of no known variant"):
    _map(without, window_size=8)
  with pytest.raises(ValueError, match="no known SwinV2 checkpoint.*'a'"):
    _map({"a": np.zeros(1)})
  with pytest.raises(ValueError, match="is no SwinV2: 0 stages"):
    _map({"patch_embed.proj.weight": np.zeros((8, 3, 4, 4))})
  with pytest.raises(ValueError, match="Unknown backbone 'swinv2_x'; known: "):
    _map(state, "swinv2_x")


@pytest.mark.parametrize(
  "name,window_sizes,pretrained",
  [
    ("swinv2_tiny_patch4_window8_256.pth", (8, 8, 8, 8), (8, 8, 8, 8)),
    ("swinv2_tiny_patch4_window16_256.pth", (16, 16, 16, 8), (16, 16, 16, 8)),
    ("swinv2_base_patch4_window12to16_192to256_22kto1k_ft.pth", (16, 16, 16, 8), (12, 12, 12, 6)),
    ("swinv2_large_patch4_window12to24_192to384_22kto1k_ft.pth", (24, 24, 24, 12), (12, 12, 12, 6)),
    ("swinv2_base_window12_192.ms_in22k/model.safetensors", (12, 12, 12, 6), (12, 12, 12, 6)),
    (
      "swinv2-base-patch4-window12to24-192to384-22kto1k-ft/model.safetensors",
      (24, 24, 24, 12),
      (12, 12, 12, 6),
    ),
    ("simmim_pretrain__swinv2_base__img192_window12__800ep.pth", (12, 12, 12, 6), (12, 12, 12, 6)),
  ],
)
def test_windows_of_names(name, window_sizes, pretrained):
  state = sources.timm(96, (2, 2, 6, 2), (3, 6, 12, 24))
  config = _map(state, path=name).config
  assert (config.window_sizes, config.pretrained_window_sizes) == (window_sizes, pretrained)


def test_untold_windows_of_the_pretraining_are_warned_of(caplog):
  state = sources.timm(96, (2, 2, 6, 2), (3, 6, 12, 24))
  _map(state, window_sizes=(32, 32, 32, 32), pretrained_window_sizes=(16, 16, 16, 8))
  assert not caplog.text
  _map(state, window_sizes=(32, 32, 32, 32))
  assert "does not tell the windows of its pretraining" in caplog.text
  assert "the released weights of swinv2_t have (16, 16, 16, 8)" in caplog.text


def test_windows_of_keys_configs_and_arguments(tmp_path):
  state = sources.timm(96, (2, 2, 6, 2), (3, 6, 12, 24))
  windows, pretrained = (24, 24, 24, 12), (12, 12, 12, 6)

  def of(checkpoint):
    return (checkpoint.config.window_sizes, checkpoint.config.pretrained_window_sizes)

  # What the keys say goes before the name; arguments go before both.
  held = sources.microsoft(state, windows, pretrained)
  assert of(_map(held, path="swinv2_tiny_window8_256.pth")) == (windows, pretrained)
  assert of(_map(held, window_sizes=(32, 32, 32, 16))) == ((32, 32, 32, 16), pretrained)
  with pytest.raises(ValueError, match="does not tell its windows"):
    _map(state, path="model.safetensors")
  assert of(_map(state, window_size=16)) == ((16,) * 4, (0,) * 4)
  table = "layers.0.blocks.0.attn.relative_coords_table"
  with pytest.raises(ValueError, match=f"{table}.*log-spaced"):
    _map(held | {table: held[table] * 2})
  path = tmp_path / "model.safetensors"
  (tmp_path / "config.json").write_text(json.dumps({"architecture": "swinv2_tiny_window16_256"}))
  assert of(_map(state, path=path)) == ((16, 16, 16, 8),) * 2
  (tmp_path / "config.json").write_text(
    json.dumps({"window_size": 24, "image_size": 384, "pretrained_window_sizes": [12, 12, 12, 6]})
  )
  assert of(_map(state, path=path)) == (windows, pretrained)
  assert windows_lib.effective(7, 224, 4) == (7, 7, 7, 7)


def test_torchvision_is_refused_where_it_computes_something_else(small, tmp_path):
  path = tmp_path / "swin_v2_t.safetensors"
  state = sources.torchvision(small, (4, 4))
  safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, path)
  backbone = families.load_backbone(path, **_SMALL)
  assert backbone.config.window_sizes == backbone.config.pretrained_window_sizes == (4, 4)
  backbone(np.zeros((1, 40, 40, 3), np.float32))  # maps of 10 and 5
  with pytest.raises(ValueError, match="map of 2 x 2 is smaller than its window of 4"):
    backbone(np.zeros((1, 16, 16, 3), np.float32))
  with pytest.raises(ValueError, match="whole patch"):
    backbone(np.zeros((1, 42, 40, 3), np.float32))
  for overrides in (dict(window_sizes=(8, 4)), dict(pretrained_window_sizes=(8, 4))):
    with pytest.raises(
      ValueError, match=r"torchvision's.*\(8, 4\), its own are \(4, 4\).*whole_windows=False"
    ):
      families.load_backbone(path, **_SMALL, **overrides)
    other = families.load_backbone(path, **_SMALL, **overrides, whole_windows=False)
    other(np.zeros((1, 10, 10, 3), np.float32))


def test_heads_of_22k_classes():
  head = convert.Head(np.arange(8.0).reshape(2, 4), np.arange(4.0))
  chosen = head.select([3, 0])
  np.testing.assert_array_equal(chosen.kernel, [[3, 0], [7, 4]])
  np.testing.assert_array_equal(chosen.bias, [3, 0])
  with pytest.raises(ValueError, match="4..4 of a head of 4 classes"):
    head.select([4])


def test_the_command_line(small, tmp_path, capsys):
  # A row of the table: the smallest there is.
  row = swinv2_config.VARIANTS["swinv2_nano"]
  rng = np.random.default_rng(0)
  state = {
    key: rng.standard_normal(value.shape).astype(np.float32) * 0.1
    for key, value in sources.timm(row.embed_dim, row.depths, row.num_heads, classes=7).items()
  }
  source = pth_file.write(
    tmp_path / "x.pth", {"model": sources.microsoft(state), "config": pth_file.Call("yacs.config", "CfgNode")}
  )
  out, head, rows = (tmp_path / name for name in ("out.safetensors", "head.safetensors", "rows.txt"))
  rows.write_text("6\n0\n")
  command.main(
    [
      str(source),
      str(out),
      "--window",
      "16",
      "--image-size",
      "256",
      "--pretrained-window",
      "12",
      "--pretrained-image-size",
      "192",
      "--head",
      str(head),
      "--head-classes",
      str(rows),
    ]
  )
  printed = capsys.readouterr().out
  backbone = families.load_backbone(out, "swinv2_nano")
  fingerprint = trees.fingerprint(nnx.state(backbone, nnx.Param))
  assert printed.splitlines()[-1] == f"fingerprint {fingerprint}"
  assert weights.read_fingerprint(out) == fingerprint
  assert "swinv2_nano, as saved by Microsoft" in printed and "config: not a tensor of the model" in printed
  assert backbone.config.window_sizes == (16, 16, 16, 8)
  assert backbone.config.pretrained_window_sizes == (12, 12, 12, 6)
  np.testing.assert_array_equal(
    safetensors.numpy.load_file(head)["kernel"], state["head.fc.weight"][[6, 0]].T
  )
  # The same weights, straight from the public file.
  same = families.load_backbone(source, window_sizes=(16, 16, 16, 8))
  assert trees.fingerprint(nnx.state(same, nnx.Param)) == fingerprint
  with pytest.raises(ValueError, match="holds a swinv2_nano, expected a swinv2_t"):
    families.load_backbone(out, "swinv2_t")
  for dtype in ("float16", "bfloat16"):
    command.main([str(source), str(out), "--window", "8", "--dtype", dtype])
    half = families.load_backbone(out)
    assert weights.read_fingerprint(out) == trees.fingerprint(nnx.state(half, nnx.Param)) != fingerprint
  with pytest.raises(SystemExit, match="error: .*does not tell its windows"):
    command.main([str(source), str(out)])
  data = bytearray(out.read_bytes())
  data[-1] ^= 1
  out.write_bytes(data)
  with pytest.raises(ValueError, match="was damaged or changed"):
    families.load_backbone(out)


def test_numbers_that_the_file_cannot_hold(tmp_path):
  leaves = {"x": weights.LazyTensor((1,), np.dtype(np.float32), lambda: np.full(1, 1e6, np.float32))}
  with pytest.raises(ValueError, match="x .* is not finite as float16"):
    weights.write(tmp_path / "x.safetensors", leaves, metadata={}, dtype=np.float16)
  with pytest.raises(ValueError, match="not int8"):
    weights.write(tmp_path / "x.safetensors", leaves, metadata={}, dtype=np.int8)
  assert not list(tmp_path.iterdir())
