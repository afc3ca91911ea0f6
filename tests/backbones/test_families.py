"""Backbones by name; weights on disk; what identifies features; normalisation."""

import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from frozen_vision.backbones import base, families
from frozen_vision.backbones.swinv2 import config as swinv2_config
from frozen_vision.devices import sharding
from frozen_vision.files import trees
from frozen_vision.freezing import feature_key
from frozen_vision.layers import storage
from frozen_vision.tasks import build as tasks_build
from frozen_vision.tasks import common
from tests import tiny


def _backbone(seed=0, **changes):
  return families.build_backbone("swinv2_nano", rngs=nnx.Rngs(seed), **(tiny.SMALL_BACKBONE | changes))


@pytest.fixture(scope="module")
def backbone():
  return _backbone()


@pytest.fixture
def path(backbone, tmp_path):
  path = tmp_path / "folder" / "small.safetensors"
  families.save_backbone(backbone, path, name="small")
  assert [p.name for p in path.parent.iterdir()] == [path.name]
  return path


def _weights(backbone):
  return trees.flatten(nnx.state(backbone, nnx.Param))


def test_what_is_saved_is_loaded_bit_for_bit(backbone, path):
  loaded = families.load_backbone(path)
  found, wanted = _weights(loaded), _weights(backbone)
  assert list(found) == list(wanted)
  for key in wanted:
    np.testing.assert_array_equal(found[key], wanted[key])
  assert loaded.config == backbone.config
  images = jax.random.normal(jax.random.key(0), (1, 32, 32, 3))
  np.testing.assert_array_equal(jax.jit(loaded)(images)[-1], jax.jit(backbone)(images)[-1])

  def fingerprint(module):
    return trees.fingerprint(nnx.state(module, nnx.Param))

  assert fingerprint(loaded) == fingerprint(backbone)


def test_overrides_that_carry_no_weights(path):
  loaded = families.load_backbone(path, dtype=jnp.bfloat16, window_sizes=[8, 8, 4, 2])
  assert loaded.config.window_sizes == (8, 8, 4, 2)
  assert loaded.dtype == jnp.bfloat16
  assert all(leaf.dtype == jnp.float32 for leaf in _weights(loaded).values())
  with pytest.raises(ValueError, match="backbone option 'window_sise'.*Did you mean 'window_sizes'"):
    families.load_backbone(path, window_sise=4)


def test_half_precision_files(backbone, tmp_path):
  families.save_backbone(backbone, tmp_path / "half.safetensors", name="small", dtype=np.float16)
  loaded = _weights(families.load_backbone(tmp_path / "half.safetensors"))
  for key, value in _weights(backbone).items():
    np.testing.assert_array_equal(loaded[key], np.asarray(value).astype(np.float16).astype(np.float32))


def test_all_keys_at_fault_are_listed(path):
  tensors = safetensors.numpy.load_file(path)
  with safetensors.safe_open(path, framework="numpy") as file:
    header = file.metadata()
  tensors["extra/kernel"] = tensors.pop("patch_embed/proj/bias")
  tensors["norm/scale"] = np.ones(3, np.float32)
  safetensors.numpy.save_file(tensors, path, metadata=header)
  with pytest.raises(ValueError) as caught:
    families.load_backbone(path)
  message = str(caught.value)
  assert str(path) in message and "3 keys at fault" in message
  assert "missing patch_embed/proj/bias (8,)" in message
  assert "unexpected extra/kernel (8,)" in message
  assert "norm/scale has shape (3,), expected (64,)" in message


def test_files_that_are_none(path, tmp_path):
  with pytest.raises(FileNotFoundError, match="swinv2_q.*does not exist.*shipped weights"):
    families.load_backbone("swinv2_q")
  with pytest.raises(FileNotFoundError, match="is a directory"):
    families.load_backbone(tmp_path)
  broken = tmp_path / "broken.safetensors"
  broken.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(ValueError, match="broken.safetensors is not a complete safetensors file"):
    families.load_backbone(broken)
  broken.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
  with pytest.raises(ValueError, match="pointer of Git LFS.*git lfs pull"):
    families.load_backbone(broken)
  broken.write_text("no weights at all")
  with pytest.raises(ValueError, match="broken.safetensors is not a complete safetensors file"):
    families.load_backbone(broken)
  safetensors.numpy.save_file({"a": np.ones(1)}, broken)
  with pytest.raises(ValueError, match="keys of no known checkpoint of swinv2"):
    families.load_backbone(broken)


def test_weights_of_another_network_than_the_named_one(path):
  config = tiny.detection()
  config.backbone.weights = str(path)
  common.build_backbone(tasks_build.read_config(config))  # the same shape
  config.backbone.overrides = {}
  with pytest.raises(
    ValueError, match=r"with embed_dim = 8, .* but config.backbone.name = swinv2_nano has embed_dim = 32, "
  ):
    common.build_backbone(tasks_build.read_config(config))
  config.backbone.weights = str(path.with_name("absent.safetensors"))
  with pytest.raises(FileNotFoundError, match="config.backbone.weights: .*absent.safetensors does not exist"):
    common.build_backbone(tasks_build.read_config(config))


def test_random_weights_are_no_identity():
  config = tiny.detection()
  config.backbone.overrides = dict(embed_dim=8, depths=(1,) * 4, num_heads=(1,) * 4)

  def scale():
    return common.build_backbone(tasks_build.read_config(config)).stages[0].blocks[0].norm1.scale[...]

  np.testing.assert_array_equal(scale(), 1)
  config.backbone.weights = "init"
  np.testing.assert_array_equal(scale(), 0)


def test_names_and_options():
  with pytest.raises(ValueError, match="Unknown backbone 'swinv2_tt'.*Did you mean 'swinv2_t'"):
    families.backbone_config("swinv2_tt")
  with pytest.raises(ValueError, match="backbone option 'depth'.*Did you mean 'depths'"):
    families.backbone_config("swinv2_t", depth=(1, 1, 1, 1))
  assert families.backbone_config("swinv2_b", window_size=24).window_sizes == (24,) * 4
  assert families.backbone_config("swinv2_b", window_sizes=[24, 24, 24, 12]).window_sizes == (24, 24, 24, 12)
  with pytest.raises(ValueError, match=r"window_sizes = \(8, 8\) has 2 entries.*one per stage"):
    families.backbone_config("swinv2_b", window_sizes=(8, 8))
  with pytest.raises(ValueError, match=r"num_heads\[0\] = 5 does not divide the stage's 128 channels"):
    families.backbone_config("swinv2_b", num_heads=(5, 8, 16, 32))


def test_feature_key_changes_with_what_changes_features(backbone):
  key = feature_key.feature_key(backbone, "abc")
  assert json.loads(json.dumps(key)) == key and key["weights"] == "abc"

  def abstract(**changes):
    return nnx.eval_shape(lambda: _backbone(**changes))

  others = [
    abstract(window_sizes=(8, 4, 4, 2)),
    abstract(pretrained_window_sizes=(8, 8, 4, 2)),
    abstract(dtype=jnp.bfloat16),
  ]
  keys = [feature_key.feature_key(other, "abc") for other in others]
  keys += [feature_key.feature_key(backbone, "abd"), feature_key.feature_key(backbone, "abc", levels=2)]
  assert all(other != key for other in keys)
  # Stochastic depth does nothing in a frozen backbone, nor does how it was initialised.
  assert feature_key.feature_key(abstract(drop_path_rate=0.5, residual_norm_init=0.0), "abc") == key


def test_fingerprint_sees_values_shapes_and_names():
  def of(**values):
    module = nnx.Module()
    for name, value in values.items():
      setattr(module, name, nnx.Param(jnp.asarray(value, jnp.float32)))
    return trees.fingerprint(nnx.state(module))

  base = of(a=[[1, 2]], b=[3])
  assert base == of(b=[3], a=[[1, 2]])
  assert (
    len({base, of(a=[1, 2], b=[3]), of(a=[[1, 2]], c=[3]), of(a=[[1, 3]], b=[3]), of(a=[[3, 2]], b=[1])}) == 5
  )


def test_normalise():
  images = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), np.uint8)
  sizes = np.array([[4, 6], [3, 2]], np.int32)
  wanted = ((images / 255.0 - base.IMAGENET_MEAN) / base.IMAGENET_STD).astype(np.float32)
  np.testing.assert_allclose(base.normalise(jnp.asarray(images)), wanted, atol=1e-5)
  wanted[1, 3:] = 0
  wanted[1, :, 2:] = 0
  found = base.normalise(jnp.asarray(images), jnp.asarray(sizes))
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  np.testing.assert_array_equal(np.asarray(found)[1, 3:], 0)


def _shallow(row):
  """A backbone of the row's widths, as shapes."""
  config = families.backbone_config(row)
  if hasattr(config, "depths"):
    few = dict(depths=tuple(min(depth, 2) for depth in config.depths))
  else:
    few = dict(depth=1) if hasattr(config, "mlp_dim") else {}
  return families.abstract_backbone(row, **few)


@pytest.mark.parametrize(
  "row",
  ["swinv2_g", "resnet50_x4", "efficientnet_lite0", "convnext_xlarge"]
  + ["dinov2_vits14", "dinov2_vitg14", "siglip_vitso400m14", "mae_vith14", "clip_vitl14", "dinov3_vit7b16"],
)
def test_a_rule_says_how_every_large_leaf_is_split(row, monkeypatch):
  monkeypatch.setattr(sharding, "_REPLICATED_PART", 0.0)
  mesh, backbone = sharding.make_mesh(), _shallow(row)
  for network in (backbone, storage.shapes(backbone, storage="float32")):
    holder = nnx.Dict(backbone=network if isinstance(network, nnx.Module) else nnx.data(network))
    sharding.frozen_shardings(nnx.state(holder), mesh, rules={"backbone": backbone.sharding_rules})


def test_one_contract_for_every_variant():
  for name, config in swinv2_config.VARIANTS.items():
    abstract = families.abstract_backbone(name, depths=(1, 1, 1, 1))
    assert [spec.stride for spec in abstract.feature_specs] == [4, 8, 16, 32]
    assert [spec.channels for spec in abstract.feature_specs] == [
      config.embed_dim * 2**stage for stage in range(4)
    ]
