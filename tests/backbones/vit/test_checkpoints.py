"""Public checkpoints of every layout load to the weights that were written; what does not fit is refused."""

import functools
import json

from flax import nnx
import numpy as np
import pytest
import safetensors.numpy

from frozen_vision.backbones import families
from frozen_vision.backbones.vit import checkpoints
from frozen_vision.backbones.vit import model as vit
from frozen_vision.backbones.vit.config import VARIANTS
from frozen_vision.files import trees
from tests.backbones.vit import checkpoint_sources as sources
from tests.files import pth_file

_SIZES = dict(embed_dim=16, depth=2, num_heads=2, mlp_dim=32)
_V3 = functools.partial(sources.meta, registers="storage_tokens", packed=False)
# layout -> (row, how a file of it is written)
_CASES = {
  "Meta DINO": ("dino_vits8", sources.meta),
  "Meta MAE": ("mae_vitb16", sources.meta),
  "Meta DINOv2": ("dinov2_vits14", sources.meta),
  "Meta DINOv2 with registers": ("dinov2_vits14_reg4", sources.meta),
  "Meta DINOv2-g": ("dinov2_vitg14", sources.meta),
  "Meta DINOv3": ("dinov3_vits16", _V3),
  "Meta DINOv3 SwiGLU": ("dinov3_vits16plus", _V3),
  "Meta DINOv3-7B": ("dinov3_vit7b16", _V3),
  "Feature Distillation of DINO": ("fd_vitb16", sources.feature_distillation),
  "Feature Distillation of CLIP": (
    "fd_vitl14",
    functools.partial(sources.feature_distillation, teacher="clip"),
  ),
  "SimMIM": ("fd_vitb16", functools.partial(sources.feature_distillation, teacher=None)),
  "timm": ("augreg_vits16", sources.timm),
  "timm DINOv2-g": ("dinov2_vitg14_reg4", sources.timm),
  "timm DINOv3": ("dinov3_vits16plus", sources.timm),
  "timm CLIP": ("clip_vitb16", sources.timm),
  "timm SigLIP": ("siglip_vitb16", sources.timm),
  "OpenCLIP": ("openclip_vitb16", sources.open_clip),
  "transformers ViT": ("deit_vits16", sources.transformers_vit),
  "transformers DINOv2": ("dinov2_vits14_reg4", sources.transformers_dino),
  "transformers DINOv2-g": ("dinov2_vitg14", sources.transformers_dino),
  "transformers DINOv3": ("dinov3_vits16", sources.transformers_dino),
  "transformers DINOv3-7B": ("dinov3_vit7b16", sources.transformers_dino),
  "transformers CLIP": ("clip_vitb16", sources.transformers_clip),
  "transformers SigLIP": ("siglip2_vitb16", sources.transformers_clip),
  "big_vision": ("siglip_vitb16", functools.partial(sources.big_vision, scanned=False)),
  "big_vision scanned": ("siglip2_vitb16", functools.partial(sources.big_vision, scanned=True)),
}


def _sizes(row):
  registers = dict(registers=2) if VARIANTS[row].registers else {}
  return _SIZES | registers | ({} if VARIANTS[row].positions == "rotary" else dict(position_grid=3))


def _weights(row):
  """{path: array} and config of a small ViT of the kind of a row."""
  config = VARIANTS[row].replace(**_sizes(row))
  rng = np.random.default_rng(0)
  shapes = checkpoints.variable_shapes(config)
  weights = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
  if "periods" in weights:
    weights["periods"] = vit.positions.rotary_periods(100.0, config.head_dim)
  return weights, config


def _write(path, state):
  """A file of the kind that the suffix says."""
  state = {key: np.ascontiguousarray(array) for key, array in state.items()}
  if path.suffix == ".safetensors":
    safetensors.numpy.save_file(state, path)
  elif path.suffix == ".npz":
    np.savez(path, **state)
  else:
    pth_file.write(path, {"model": state, "epoch": 3})
  return path


@pytest.mark.parametrize("case", _CASES)
def test_every_layout(case, tmp_path):
  row, make = _CASES[case]
  weights, config = _weights(row)
  suffix = ".npz" if "big_vision" in case else ".pth" if "Meta" in case else ".safetensors"
  path = _write(tmp_path / f"weights{suffix}", make(weights, config))
  checkpoint = checkpoints.open_checkpoint(path, row, **_SIZES, registers=config.registers)
  assert checkpoint.config == config and checkpoint.name == row
  assert checkpoint.config.position_grid == config.position_grid
  found = {key: leaf.read() for key, leaf in checkpoint.leaves.items()}
  if case == "timm DINOv2-g":  # class token and its position are stored as their sum
    found["cls_token"] = found["cls_token"] - weights["positions"][0]
    found["positions"] = found["positions"] + np.pad(weights["positions"][:1], ((0, 9), (0, 0)))
  assert found.keys() == weights.keys() == checkpoints.variable_shapes(config).keys()
  for key, array in weights.items():
    np.testing.assert_allclose(
      found[key], array, rtol=0, atol=1e-6 if "timm DINOv2-g" == case else 0, err_msg=key
    )
  assert f"{len(checkpoint.used)} keys used" in checkpoint.summary()


def test_features_of_equal_weights_are_equal(tmp_path):
  weights, config = _weights("dinov3_vits16")
  images = np.random.default_rng(1).standard_normal((1, 32, 48, 3)).astype(np.float32)
  features = []
  for name, make in (
    ("a.pth", _V3),
    ("b.safetensors", sources.timm),
    ("c.safetensors", sources.transformers_dino),
  ):
    path = _write(tmp_path / name, make(weights, config))
    checkpoint = checkpoints.open_checkpoint(path, "dinov3_vits16", **_SIZES, registers=2)
    backbone = vit.ViT(checkpoint.config, rngs=nnx.Rngs(0))
    nnx.update(backbone, _state(backbone, checkpoint))
    features.append(backbone(images)[-1])
  np.testing.assert_array_equal(features[0], features[1])
  np.testing.assert_array_equal(features[0], features[2])


def _state(backbone, checkpoint):
  flat = nnx.to_flat_state(nnx.state(backbone))
  return nnx.from_flat_state(
    [(path, leaf.replace(checkpoint.leaves["/".join(map(str, path))].read())) for path, leaf in flat]
  )


def test_students_of_feature_distillation_are_vits_whatever_lies_beside_them(tmp_path):
  weights, config = _weights("fd_vitb16")
  for teacher in ("dino", "clip"):
    path = _write(tmp_path / f"{teacher}.pth", sources.feature_distillation(weights, config, teacher=teacher))
    backbone = families.load_backbone(path, prefer="fd_vitb16", **_SIZES)
    found = trees.flatten(trees.weights(backbone))
    assert found.keys() == weights.keys()
    for name, value in weights.items():
      np.testing.assert_array_equal(found[name], value, err_msg=name)
  state = sources.feature_distillation(weights, config)
  state["encoder.surplus"] = np.ones(2, np.float32)
  with pytest.raises(ValueError, match=r"unexpected encoder.surplus \(2,\)"):
    checkpoints.open_checkpoint(_write(tmp_path / "surplus.pth", state), "fd_vitb16", **_SIZES)
  state = {key.removeprefix("encoder."): array for key, array in state.items() if key.startswith("encoder.")}
  table = state.pop("rel_pos_bias.relative_position_bias_table")
  state |= {f"blocks.{i}.attn.relative_position_bias_table": table for i in range(2)}
  with pytest.raises(ValueError, match="for every block, such as blocks.0.* give the pretrained or"):
    checkpoints.open_checkpoint(_write(tmp_path / "tuned.pth", state), "fd_vitb16", **_SIZES)


def test_periods_are_those_of_the_checkpoint(tmp_path):
  import ml_dtypes

  weights, config = _weights("dinov3_vits16")
  weights["periods"] = weights["periods"].astype(ml_dtypes.bfloat16).astype(np.float32)
  path = _write(tmp_path / "meta.pth", _V3(weights, config))
  found = checkpoints.open_checkpoint(path, "dinov3_vits16", **_SIZES, registers=2).leaves["periods"].read()
  np.testing.assert_array_equal(found, weights["periods"])


def test_timm_without_biases_of_queries_and_values(tmp_path):
  weights, config = _weights("dinov3_vits16")
  state = {k: v for k, v in sources.timm(weights, config).items() if not k.endswith(("q_bias", "v_bias"))}
  path = _write(tmp_path / "timm.safetensors", state)
  checkpoint = checkpoints.open_checkpoint(path, "dinov3_vits16", **_SIZES, registers=2)
  assert checkpoint.config.qkv_bias == "none" and not any(key.endswith("v_bias") for key in checkpoint.leaves)


def test_rows_are_found_by_shapes(tmp_path):
  """Full widths, names only: no array is read."""
  from frozen_vision.files.tensors import LazyTensor

  def tensors(row, make):
    config = VARIANTS[row]
    weights = {
      path: np.broadcast_to(np.float32(0), shape)
      for path, shape in checkpoints.variable_shapes(config).items()
    }
    return {k: LazyTensor(v.shape, v.dtype, lambda: None) for k, v in make(weights, config).items()}

  for row, make in (
    ("dinov2_vits14_reg4", sources.transformers_dino),
    ("dinov3_vits16", _V3),
    ("fd_vitb16", sources.feature_distillation),
    ("fd_vitl14", sources.feature_distillation),
    ("dinov3_vits16plus", sources.timm),
  ):
    assert checkpoints.map_tensors(tensors(row, make), tmp_path).name == row
  with pytest.raises(ValueError, match=r"several rows: \['clip_vitb16', 'openclip_vitb16'\].*Give name="):
    checkpoints.map_tensors(tensors("clip_vitb16", sources.open_clip), tmp_path)
  with pytest.raises(ValueError, match="fit no row of"):
    checkpoints.map_tensors(
      {
        k: v
        for k, v in tensors("dinov3_vits16", _V3).items()
        if not k.startswith(("blocks.10.", "blocks.11."))
      },
      tmp_path,
    )


def test_all_keys_at_fault_are_listed(tmp_path):
  weights, config = _weights("dinov2_vits14")
  state = sources.meta(weights, config)
  del state["blocks.1.attn.proj.bias"]
  state["blocks.1.attn.extra"] = np.ones(3, np.float32)
  state["norm.weight"] = np.ones(5, np.float32)
  path = _write(tmp_path / "weights.pth", state)
  with pytest.raises(ValueError) as caught:
    checkpoints.open_checkpoint(path, "dinov2_vits14", **_SIZES)
  message = str(caught.value)
  assert "3 keys at fault" in message and str(path) in message
  assert "missing blocks.1.attn.proj.bias for blocks/1/attn/proj/bias (16,)" in message
  assert "unexpected blocks.1.attn.extra (3,)" in message
  assert "norm.weight has shape (5,), expected (16,)" in message


def test_weights_of_another_row(tmp_path):
  weights, config = _weights("dinov2_vits14")
  path = _write(tmp_path / "weights.pth", sources.meta(weights, config))
  with pytest.raises(ValueError, match=r"missing register_tokens for registers \(4, 16\)"):
    checkpoints.open_checkpoint(path, "dinov2_vits14_reg4", **_SIZES)
  with pytest.raises(ValueError, match="Unknown backbone 'dinov2_vits15'.*Did you mean"):
    checkpoints.open_checkpoint(path, "dinov2_vits15")
  with pytest.raises(ValueError, match="backbone option 'widht'"):
    checkpoints.open_checkpoint(path, "dinov2_vits14", widht=3)
  with pytest.raises(ValueError, match="keys at fault"):  # the row's own sizes
    checkpoints.open_checkpoint(path, "dinov2_vits14")
  path = _write(tmp_path / "none.safetensors", {"a": np.ones(1, np.float32)})
  with pytest.raises(ValueError, match="keys of no known ViT checkpoint"):
    checkpoints.open_checkpoint(path, "dinov2_vits14")


def _write_shards(folder, state):
  keys = sorted(state)
  files = {"model-00001-of-00002.safetensors": keys[::2], "model-00002-of-00002.safetensors": keys[1::2]}
  for name, part in files.items():
    _write(folder / name, {key: state[key] for key in part})
  index = {"metadata": {}, "weight_map": {key: name for name, part in files.items() for key in part}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  return folder / "model.safetensors.index.json"


def test_shards(tmp_path):
  weights, config = _weights("dinov3_vit7b16")
  index = _write_shards(tmp_path, sources.transformers_dino(weights, config))
  for path in (index, tmp_path):
    checkpoint = checkpoints.open_checkpoint(path, "dinov3_vit7b16", **_SIZES, registers=2)
    for key, array in weights.items():
      np.testing.assert_array_equal(checkpoint.leaves[key].read(), array)
  (tmp_path / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(
    FileNotFoundError, match="is one of 2 shards, of which 1 are not beside it: model-00002"
  ):
    checkpoints.open_checkpoint(index, "dinov3_vit7b16", **_SIZES)
  _write(tmp_path / "model-00002-of-00002.safetensors", {"a": np.ones(1, np.float32)})
  with pytest.raises(ValueError, match="which the index says that it holds"):
    checkpoints.open_checkpoint(index, "dinov3_vit7b16", **_SIZES)
  index.write_text("{}")
  with pytest.raises(ValueError, match="is no index of shards"):
    checkpoints.open_checkpoint(index, "dinov3_vit7b16", **_SIZES)
