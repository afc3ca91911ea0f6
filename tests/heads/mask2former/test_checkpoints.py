"""Published Mask2Former heads as ours: names, numbers and errors; tests/heads compares what they compute."""

import json
import pathlib
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.files import trees
from frozen_vision.heads.mask2former import checkpoints
from frozen_vision.heads.mask2former.config import Mask2FormerConfig
from frozen_vision.heads.mask2former.mask2former import Mask2Former
from tests import golden_values
from tests.files import pth_file

# Names and shapes as transformers has them.
_TESTS = pathlib.Path(__file__).resolve().parents[2]
SPEC = json.loads((_TESTS / "golden" / "mask2former_training.json").read_text())
SPECS = tuple(FeatureSpec(4 << i, channels) for i, channels in enumerate(SPEC["channels"]))
_FIELDS = (
  "hidden_dim",
  "mask_dim",
  "num_heads",
  "encoder_layers",
  "encoder_ffn_dim",
  "decoder_layers",
  "decoder_ffn_dim",
  "num_queries",
  "num_classes",
)

# From transformers' names to those of the official code, in this order.
OFFICIAL = (
  (
    r"model\.pixel_level_module\.encoder\.hidden_states_norms\.stage(\d)",
    lambda match: f"backbone.norm{int(match[1]) - 1}",
  ),
  (
    r"model\.pixel_level_module\.decoder\.encoder\.layers\.(\d+)\.self_attn_layer_norm",
    r"sem_seg_head.pixel_decoder.transformer.encoder.layers.\1.norm1",
  ),
  (
    r"model\.pixel_level_module\.decoder\.encoder\.layers\.(\d+)\.final_layer_norm",
    r"sem_seg_head.pixel_decoder.transformer.encoder.layers.\1.norm2",
  ),
  (
    r"model\.pixel_level_module\.decoder\.encoder\.layers\.(\d+)\.fc(\d)",
    r"sem_seg_head.pixel_decoder.transformer.encoder.layers.\1.linear\2",
  ),
  (r"model\.pixel_level_module\.decoder\.encoder\.", "sem_seg_head.pixel_decoder.transformer.encoder."),
  (r"model\.pixel_level_module\.decoder\.level_embed", "sem_seg_head.pixel_decoder.transformer.level_embed"),
  (r"model\.pixel_level_module\.decoder\.input_projections", "sem_seg_head.pixel_decoder.input_proj"),
  (r"model\.pixel_level_module\.decoder\.mask_projection", "sem_seg_head.pixel_decoder.mask_features"),
  (r"model\.pixel_level_module\.decoder\.(adapter|layer)_1\.0", r"sem_seg_head.pixel_decoder.\1_1"),
  (r"model\.pixel_level_module\.decoder\.(adapter|layer)_1\.1", r"sem_seg_head.pixel_decoder.\1_1.norm"),
  (
    r"model\.transformer_module\.decoder\.layers\.(\d+)\.self_attn_layer_norm",
    r"sem_seg_head.predictor.transformer_self_attention_layers.\1.norm",
  ),
  (
    r"model\.transformer_module\.decoder\.layers\.(\d+)\.self_attn",
    r"sem_seg_head.predictor.transformer_self_attention_layers.\1.self_attn",
  ),
  (
    r"model\.transformer_module\.decoder\.layers\.(\d+)\.cross_attn_layer_norm",
    r"sem_seg_head.predictor.transformer_cross_attention_layers.\1.norm",
  ),
  (
    r"model\.transformer_module\.decoder\.layers\.(\d+)\.cross_attn",
    r"sem_seg_head.predictor.transformer_cross_attention_layers.\1.multihead_attn",
  ),
  (
    r"model\.transformer_module\.decoder\.layers\.(\d+)\.fc(\d)",
    r"sem_seg_head.predictor.transformer_ffn_layers.\1.linear\2",
  ),
  (
    r"model\.transformer_module\.decoder\.layers\.(\d+)\.final_layer_norm",
    r"sem_seg_head.predictor.transformer_ffn_layers.\1.norm",
  ),
  (r"model\.transformer_module\.decoder\.layernorm", "sem_seg_head.predictor.decoder_norm"),
  (
    r"model\.transformer_module\.decoder\.mask_predictor\.mask_embedder\.(\d)\.0",
    r"sem_seg_head.predictor.mask_embed.layers.\1",
  ),
  (r"model\.transformer_module\.queries_embedder", "sem_seg_head.predictor.query_embed"),
  (r"model\.transformer_module\.queries_features", "sem_seg_head.predictor.query_feat"),
  (r"model\.transformer_module\.level_embed", "sem_seg_head.predictor.level_embed"),
  (r"class_predictor", "sem_seg_head.predictor.class_embed"),
)


def transformers_state(*, norms=False):
  found = golden_values.state_dict(SPEC)
  found["criterion.empty_weight"] = np.ones(10, np.float32)
  found["model.pixel_level_module.encoder.embeddings.norm.weight"] = np.ones(8, np.float32)
  for i, spec in enumerate(SPECS if norms else ()):
    for kind in ("weight", "bias"):
      name = f"model.pixel_level_module.encoder.hidden_states_norms.stage{i + 1}.{kind}"
      found[name] = golden_values.values(0, name, (spec.channels,))
  return found


def official_state(**options):
  """The same numbers under the official names, where query, key and value are one array."""
  state = transformers_state(**options)
  for layer in range(SPEC["decoder_layers"]):
    prefix = f"model.transformer_module.decoder.layers.{layer}.self_attn"
    for kind in ("weight", "bias"):
      parts = [state.pop(f"{prefix}.{projection}_proj.{kind}") for projection in "qkv"]
      state[f"{prefix}.in_proj_{kind}"] = np.concatenate(parts)
  found = {"pixel_mean": np.zeros((3, 1, 1), np.float32)}
  for name, value in state.items():
    for pattern, replacement in OFFICIAL:
      if re.match(pattern, name):
        name = re.sub(pattern, replacement, name, count=1)
        break
    found[name.replace("model.pixel_level_module.encoder.embeddings", "backbone.patch_embed")] = value
  assert not any(name.startswith("model.") for name in found)
  return found


def head_state(dtype=None, **changes):
  config = Mask2FormerConfig(**{name: SPEC[name] for name in _FIELDS} | dict(input_norm=False) | changes)
  state = nnx.state(nnx.eval_shape(lambda: Mask2Former(SPECS, config, rngs=nnx.Rngs(0))))
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), state)


def flat(state):
  return {trees.path_string(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


@pytest.mark.parametrize("norms", (False, True))
def test_every_number_of_the_source_arrives_once(norms):
  source = transformers_state(norms=norms)
  found = flat(checkpoints.convert(source, head_state(input_norm=norms)))
  dropped = ("criterion.empty_weight", "model.pixel_level_module.encoder.embeddings.norm.weight")
  numbers = np.sort(np.concatenate([np.ravel(x) for x in found.values()]))
  expected = np.sort(np.concatenate([np.ravel(x) for name, x in source.items() if name not in dropped]))
  np.testing.assert_array_equal(numbers, expected)


def test_official_names_are_the_same_head():
  ours, theirs = (
    flat(checkpoints.convert(source, head_state(input_norm=True)))
    for source in (transformers_state(norms=True), official_state(norms=True))
  )
  assert ours.keys() == theirs.keys()
  for path in ours:
    np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


def test_one_error_lists_everything_that_is_wrong():
  source = transformers_state()
  pixel, layer = "model.pixel_level_module.decoder", "model.transformer_module.decoder.layers"
  source[f"{pixel}.adapter_2.0.weight"] = np.zeros((32, 16, 1, 1), np.float32)
  source["model.transformer_module.input_projections.0.weight"] = np.zeros((32, 32, 1, 1), np.float32)
  source["sem_seg_head.predictor.query_feat.weight"] = np.zeros((6, 32), np.float32)  # again
  source[f"{pixel}.layer_1.0.weight"] = np.zeros((32, 32), np.float32)
  source["class_predictor.bias"] = np.zeros(151, np.float32)
  source[f"{layer}.1.cross_attn.in_proj_bias"] = np.zeros(95, np.float32)
  del source[f"{layer}.3.fc1.weight"], source[f"{pixel}.level_embed"]
  with pytest.raises(ValueError) as error:
    checkpoints.convert(source, head_state())
  for line in (
    "10 keys at fault:\n  missing ",
    r"missing pixel_decoder/level_embed \(3, 32\)",
    r"missing transformer_decoder/layers/3/ffn/hidden/kernel \(32, 48\)",
    r"unexpected .*decoder.adapter_2.0.weight \(32, 16, 1, 1\)",
    r"unexpected .*transformer_module.input_projections.0.weight \(32, 32, 1, 1\)",
    r"unexpected sem_seg_head.predictor.query_feat.weight \(6, 32\)",
    r"layer_1.0.weight is \(32, 32\), expected one for pixel_decoder/outputs/0/conv/kernel \(3, 3, 32, 32\)",
    r"class_predictor.bias is \(151,\), expected one for transformer_decoder/classes/bias \(10,\)",
    r"proj_bias is \(95,\), expected one for transformer_decoder/layers/1/cross_attention/key/bias \(32,\)",
  ):
    assert re.search(line, str(error.value)), (line, str(error.value))


def test_norms_of_the_backbone_name_the_option():
  with pytest.raises(ValueError, match="input_norm=False"):
    checkpoints.convert(transformers_state(), head_state(input_norm=True))
  for source in (transformers_state(norms=True), official_state(norms=True)):
    with pytest.raises(ValueError, match="input_norm=True"):
      checkpoints.convert(source, head_state())


@pytest.mark.parametrize("input_norm", (False, True))
def test_kept_parameters_stay(input_norm):
  """A head for other classes, whose backbone has norms of its own or none."""
  found = flat(
    checkpoints.convert(
      transformers_state(norms=True),
      head_state(num_classes=3, input_norm=input_norm),
      keep=("transformer_decoder/classes/.*", "pixel_decoder/norms/.*"),
    )
  )
  untouched = {path for path, x in found.items() if isinstance(x, jax.ShapeDtypeStruct)}
  norms = {f"pixel_decoder/norms/{i}/{leaf}" for i in range(4) for leaf in ("scale", "bias")}
  classes = {"transformer_decoder/classes/kernel", "transformer_decoder/classes/bias"}
  assert untouched == (classes | norms if input_norm else classes)


def test_dtype_of_the_state_is_kept():
  source = {name: x.astype(np.float16) for name, x in transformers_state().items()}
  for dtype in (jnp.float32, jnp.bfloat16):
    found = flat(checkpoints.convert(source, head_state(dtype)))
    assert {x.dtype for x in found.values()} == {jnp.dtype(dtype)}


def test_other_modules_are_refused():
  with pytest.raises(ValueError, match=r"state of a Mask2Former head, found one with \['bias', 'kernel'\]"):
    checkpoints.convert({}, nnx.state(nnx.eval_shape(lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)))))


def test_reading_files(tmp_path):
  source = transformers_state()
  path = tmp_path / "model.safetensors"
  safetensors.numpy.save_file(source, path)
  zipped = pth_file.write(tmp_path / "model.pth", {"model": source})
  for file in (path, zipped):
    found = checkpoints.read_state_dict(file)
    assert found.keys() == source.keys()
    np.testing.assert_array_equal(found["class_predictor.weight"], source["class_predictor.weight"])
  with pytest.raises(FileNotFoundError, match="nothing.safetensors does not exist"):
    checkpoints.read_state_dict(tmp_path / "nothing.safetensors")
  (tmp_path / "model.pkl").write_bytes(b"1")
  with pytest.raises(ValueError, match="model.pkl cannot be read as a .pth file"):
    checkpoints.read_state_dict(tmp_path / "model.pkl")
