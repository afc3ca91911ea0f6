"""Plain ViTs against golden outputs of transformers, sizes of the table, and the backbone's contract."""

import json
import pathlib
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.backbones import base, families
from frozen_vision.backbones.vit import checkpoints
from frozen_vision.backbones.vit import model as vit
from frozen_vision.backbones.vit.config import VARIANTS
from frozen_vision.files import trees
from frozen_vision.files.tensors import LazyTensor
from frozen_vision.freezing import feature_key
from tests import golden_values, paths

# timm 1.0.31 on the meta device with num_classes=0, but for the terms added: Meta's and transformers' DINOv3
# have biases of queries and values in every block (as timm's _qkvb networks), and timm leaves out the
# position of the class token where there are registers.
_S, _B, _L = 21_665_664, 85_798_656, 303_301_632  # patches of 16, 14 x 14 learned positions
_COUNTS = {
  **{f"{name}_vits16": _S for name in ("deit", "augreg", "dino")},
  **{f"{name}_vitb16": _B for name in ("deit", "augreg", "dino", "mae")},
  **{f"{name}_vitl16": _L for name in ("deit", "augreg", "dino", "mae")},
  "dino_vits8": 21_670_272,
  **{f"{name}_vitb8": 85_807_872 for name in ("augreg", "dino")},
  # DeiT's without positions and biases of keys, with LayerScale and (27 x 27 + 3) or, of 16 x 16 patches of
  # 14, (31 x 31 + 3) biases of positions for each head.
  "fd_vitb16": _B - 197 * 768 - 12 * 768 + 24 * 768 + 732 * 12,
  "fd_vitl14": _L - 197 * 1024 - (768 - 588) * 1024 - 24 * 1024 + 48 * 1024 + 964 * 16,
  "mae_vith14": 630_764_800,
  "dinov2_vits14": 22_056_192,
  "dinov2_vitb14": 86_579_712,
  "dinov2_vitl14": 304_367_616,
  "dinov2_vitg14": 1_136_479_232,
  "dinov2_vits14_reg4": 22_057_344 + 384,
  "dinov2_vitb14_reg4": 86_582_016 + 768,
  "dinov2_vitl14_reg4": 304_370_688 + 1024,
  "dinov2_vitg14_reg4": 1_136_483_840 + 1536,
  "dinov3_vits16": 21_586_944 + 12 * 2 * 384,
  "dinov3_vits16plus": 28_683_264 + 12 * 2 * 384,
  "dinov3_vitb16": 85_641_216 + 12 * 2 * 768,
  "dinov3_vitl16": 303_079_424 + 24 * 2 * 1024,
  # L with a third matrix and its bias in every MLP; timm has none (test_parity has transformers').
  "dinov3_vitl16plus": 303_079_424 + 24 * 2 * 1024 + 24 * (1024 + 1) * 4096,
  "dinov3_vith16plus": 840_509_440 + 32 * 2 * 1280,
  "dinov3_vit7b16": 6_716_030_976,
  **{f"{name}_vitb32": 87_456_000 for name in ("clip", "openclip")},
  **{f"{name}_vitb16": 85_799_424 for name in ("clip", "openclip")},
  **{f"{name}_vitl14": 303_179_776 for name in ("clip", "openclip")},
  **{f"{name}_vitb16": 92_884_224 for name in ("siglip", "siglip2")},
  **{f"{name}_vitl16": 315_956_224 for name in ("siglip", "siglip2")},
  **{f"{name}_vitso400m14": 427_680_704 for name in ("siglip", "siglip2")},
  "siglip2_vitso400m16": 427_888_064,
  "siglip2_vitg16": 1_163_168_256,
}
_GOLDEN = {  # name of the row, and whether the reference's tokens have passed the final norm
  "vit_deit": ("deit_vits16", True),
  "vit_dinov2": ("dinov2_vits14", True),
  "vit_dinov3": ("dinov3_vits16", True),
  "vit_clip": ("clip_vitb16", False),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_counts(name):
  shapes = checkpoints.variable_shapes(VARIANTS[name])
  counts = {path: int(np.prod(shape, dtype=np.int64)) for path, shape in shapes.items()}
  counts.pop("periods", None)  # the references compute them
  assert sum(counts.values()) == _COUNTS[name]


def test_7b_without_a_weight():
  backbone = families.abstract_backbone("dinov3_vit7b16")
  state = nnx.state(backbone)
  sizes = {path: leaf.size for path, leaf in nnx.to_flat_state(state)}
  assert sum(sizes.values()) == _COUNTS["dinov3_vit7b16"] + 4096 // 32 // 4
  assert {"/".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(state)} == (
    checkpoints.variable_shapes(backbone.config)
  )


@pytest.mark.parametrize("name", _GOLDEN)
def test_golden_tokens(name):
  folder = paths.golden_dir()
  spec = json.loads((folder / f"{name}.json").read_text())
  wanted = np.load(folder / f"{name}.npz")["tokens"]
  row, normed = _GOLDEN[name]
  options = spec["config"]
  overrides = dict(
    embed_dim=options["hidden_size"],
    depth=options["num_hidden_layers"],
    num_heads=options["num_attention_heads"],
    patch_size=options["patch_size"],
    norm_epsilon=options["layer_norm_eps"],
    mlp_dim=options.get("intermediate_size") or options["hidden_size"] * options["mlp_ratio"],
    registers=options.get("num_register_tokens", 0),
    position_resize="bicubic",  # transformers resizes by size alone
  )
  tensors = {
    key: LazyTensor(value.shape, value.dtype, lambda value=value: value)
    for key, value in golden_values.state_dict(spec).items()
  }
  checkpoint = checkpoints.map_tensors(tensors, pathlib.Path(name), name=row, **overrides)
  backbone = base.abstract(vit.ViT, checkpoint.config)
  backbone = families.BackboneFile(backbone, checkpoint.leaves, checkpoint.path, None).load()
  if not normed:
    backbone.norm = lambda x: x
  images = golden_values.values(spec["seed"], "images", (len(wanted), 3, spec["image"], spec["image"]))
  found = jax.jit(backbone.token_sequence)(images.transpose(0, 2, 3, 1))
  assert found.shape == wanted.shape
  assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def _small(row, **changes):
  config = VARIANTS[row]
  registers = dict(registers=2) if config.registers else {}
  return config.replace(**dict(embed_dim=16, depth=4, num_heads=2, mlp_dim=32) | registers | changes)


@pytest.mark.parametrize("row", VARIANTS)
def test_contract(row):
  config, stride = _small(row, depth=2), VARIANTS[row].patch_size
  assert families.variants()[row] == VARIANTS[row]
  backbone = base.abstract(families.family_of(row).module, config)
  assert [(spec.stride, spec.channels) for spec in backbone.feature_specs] == [(stride, 16)] * 2
  images = jax.ShapeDtypeStruct((2, 50, 65, 3), jnp.float32)
  *maps, embedded = nnx.eval_shape(lambda module, x: (*module(x), module.embed(x)), backbone, images)
  assert [map_.shape for map_ in maps] == [(2, -(-50 // stride), -(-65 // stride), 16)] * 2
  assert embedded.shape == (2, backbone.embed_dim)
  depths = {path: backbone.depth_of(path) for path in trees.flatten(trees.weights(backbone))}
  assert set(depths.values()) == set(range(backbone.num_depths + 1)) == {0, 1, 2, 3}
  assert depths["patch_embed/proj/kernel"] == 0 and depths["blocks/1/norm1/scale"] == 2
  assert depths["norm/scale"] == backbone.num_depths
  no_decay = {path for path in depths if any(re.fullmatch(p, path) for p in backbone.no_weight_decay)}
  assert no_decay == {"positions", "registers"} & set(depths)
  rules = [pattern for pattern, _ in backbone.sharding_rules]
  assert all(any(re.fullmatch(rule, path) for rule in rules) for path in depths if path != "periods")
  assert json.loads(json.dumps(dict(backbone.feature_options()))) == backbone.feature_options()


def test_feature_options_are_what_changes_features():
  def key(**changes):
    backbone = base.abstract(vit.ViT, _small("dinov2_vits14", **changes))
    return feature_key.feature_key(backbone, "abc")

  default = key()
  assert default["family"] == "vit" and default["taps"] == [0, 1, 2, 3]
  assert key(taps=(0, 1, 2, 3)) == default == key(drop_path_rate=0.1) == key(layer_scale_init=1.0)
  others = [
    *(key(taps=(3,)), key(norm_taps=False), key(stride=16), key(mean=(0.5, 0.5, 0.5))),
    *(key(position_resize="bicubic"), key(activation="gelu_tanh"), key(norm_epsilon=1e-5)),
  ]
  assert all(other != default for other in others)


def test_published_taps_and_sizes():
  taps = {name: VARIANTS[name].tapped_blocks for name in ("dinov3_vits16", "dinov3_vitl16", "dinov3_vit7b16")}
  assert list(taps.values()) == [(2, 5, 8, 11), (5, 11, 17, 23), (9, 19, 29, 39)]
  assert VARIANTS["dinov3_vit7b16"].mlp_dim == 8192 and VARIANTS["dinov3_vith16plus"].mlp_dim == 5120
  assert VARIANTS["dinov3_vits16plus"].mlp_dim == 1536


def test_wrong_options():
  for changes, message in (
    (dict(num_heads=3), "num_heads = 3 does not divide embed_dim = 16"),
    (dict(taps=(2, 1)), r"taps = \(2, 1\); expected ascending numbers of blocks, 0 to 3"),
    (dict(taps=(4,)), r"taps = \(4,\)"),
    (dict(embed_dim=20, num_heads=2), "10 each, expected a multiple of 4"),
    (dict(class_token=False), "pooling = 'class' needs class_token"),
    (dict(widht=3), "Unknown backbone option 'widht'"),
  ):
    with pytest.raises(ValueError, match=message):
      _small("dinov3_vits16", **changes)


def test_stochastic_depth_and_registers_train():
  backbone = vit.ViT(_small("dinov3_vits16", drop_path_rate=0.5, layer_scale_init=1.0), rngs=nnx.Rngs(0))
  images = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
  run = jax.jit(lambda module, rng: module(images, rng=rng)[-1])
  still, moved, again = (run(backbone, rng) for rng in (None, jax.random.key(1), jax.random.key(1)))
  np.testing.assert_array_equal(moved, again)
  assert not np.allclose(still, moved)
  graphdef, trainable, rest = nnx.split(backbone, nnx.Param, ...)
  assert "periods" in rest and "periods" not in trainable  # it is no parameter: nothing trains it

  def loss(trainable):
    return jnp.sum(nnx.merge(graphdef, trainable, rest)(images)[-1] ** 2)

  grads = jax.jit(jax.grad(loss))(trainable)
  assert float(jnp.abs(grads["registers"].get_value()).max()) > 0


def test_saved_and_loaded_with_every_variable(tmp_path):
  backbone = vit.ViT(_small("dinov3_vits16"), rngs=nnx.Rngs(0))
  backbone.periods.set_value(backbone.periods.get_value().astype(jnp.bfloat16).astype(jnp.float32))
  path = tmp_path / "vit.safetensors"
  families.save_backbone(backbone, path, name="dinov3_vits16")
  loaded = families.load_backbone(path)
  assert isinstance(loaded, vit.ViT) and loaded.config == backbone.config
  found, wanted = (trees.flatten(trees.weights(module)) for module in (loaded, backbone))
  assert found.keys() == wanted.keys() and "periods" in found
  for key, value in wanted.items():
    np.testing.assert_array_equal(found[key], value)
