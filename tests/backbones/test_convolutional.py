"""ResNet, EfficientNet and ConvNeXt: timm's golden outputs, folding, BatchNorm, checkpoints."""

import json
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import safetensors.numpy

from frozen_vision import convert
from frozen_vision.backbones import base, checkpoint, families
from frozen_vision.backbones.convnext import checkpoints as convnext
from frozen_vision.backbones.efficientnet import checkpoints as efficientnet
from frozen_vision.backbones.resnet import checkpoints as resnet
from frozen_vision.config import BackboneOptions
from frozen_vision.files import checkpoint_file, tensors, trees
from frozen_vision.freezing import feature_key, partition, prepare
from tests import golden_values, paths, random_backbones

# Golden file: (row, what the golden network has of its own, our names of timm's).
_GOLDEN = {
  "cnn_resnet50_v15": ("resnet50", dict(depths=(1, 2, 2, 1), finest_stride=2), resnet.torch_name),
  "cnn_resnet_rs": ("resnet_rs50", dict(depths=(1, 2, 2, 1), finest_stride=2), resnet.torch_name),
  "cnn_efficientnet_b0": ("efficientnet_b0", dict(finest_stride=2), efficientnet.timm_name),
  "cnn_tf_efficientnet_b0": ("tf_efficientnet_b0", dict(finest_stride=2), efficientnet.timm_name),
  "cnn_tf_efficientnet_lite0": ("efficientnet_lite0", dict(finest_stride=2), efficientnet.timm_name),
  "cnn_convnext": (
    "convnext_tiny",
    dict(depths=(1, 1, 2, 1), channels=(24, 48, 96, 192)),
    lambda ours, config: convnext.TIMM.name(ours),
  ),
}


def _lazy(arrays):
  return {
    name: tensors.LazyTensor(array.shape, array.dtype, lambda array=array: array)
    for name, array in arrays.items()
  }


def _golden(name):
  folder = paths.golden_dir()
  spec = json.loads((folder / f"{name}.json").read_text())
  # timm's feature extractor joins names with underscores: stages_0.blocks is stages.0.blocks of the network.
  state = {
    key.replace("stem_", "stem.").replace("stages_", "stages."): value
    for key, value in golden_values.state_dict(spec).items()
  }
  return spec, state, np.load(folder / f"{name}.npz")


def _load(name):
  """The golden network with its weights; what features do not need is zero."""
  row, changes, naming = _GOLDEN[name]
  spec, state, outputs = _golden(name)
  config = families.backbone_config(row, **changes)
  module = base.abstract(families.family_of(row).module, config)
  for ours, shape in trees.shapes(trees.weights(module)).items():
    if ours.startswith(("head/", "norm/")):
      state[naming(ours, config)] = np.zeros(shape[::-1], np.float32)
  mapped = checkpoint.map_convolutional(
    module,
    _lazy(state),
    lambda ours: naming(ours, config),
    (),
    path=pathlib.Path(name),
    source="timm",
    name=row,
  )
  graphdef, abstract = nnx.split(module)
  backbone = nnx.merge(graphdef, tensors.fill(abstract, mapped.leaves, pathlib.Path(name)))
  for _, part in nnx.iter_modules(backbone):
    part.set_attributes(use_running_average=True, raise_if_not_found=False)
  images = golden_values.values(spec["seed"], "images", (2, 3, *spec["image"])).transpose(0, 2, 3, 1)
  return backbone, jnp.asarray(images), spec, outputs


def _assert_golden(features, spec, outputs, tolerance=1e-5):
  assert [x.shape[-1] for x in features] == spec["channels"]
  for index, x in enumerate(features):
    wanted = outputs[f"stage{index}"]
    found = np.asarray(x).transpose(0, 3, 1, 2)[:, :: max(1, x.shape[-1] // 16)]
    np.testing.assert_allclose(found, wanted, atol=tolerance * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize("name", _GOLDEN)
def test_features_equal_timms_folded_and_unfolded(name):
  backbone, images, spec, outputs = _load(name)
  run = jax.jit(lambda program, x: program(x))
  # Lite0's last map is 0.96e-5 away as users compile, and 1.05e-5 as tests do.
  tolerance = 2e-5 if "lite0" in name else 1e-5
  _assert_golden(run(backbone, images), spec, outputs, tolerance)
  specs = backbone.feature_specs
  assert [s.channels for s in specs] == spec["channels"] and [s.stride for s in specs] == spec["reductions"]
  folded = random_backbones.fold(backbone, storage="float32")
  # Weights that are multiplied first round elsewhere: 1.1e-5 in Lite0's last map.
  _assert_golden(run(folded, images), spec, outputs, tolerance=2e-5)


def test_features_equal_model_gardens():
  folder = paths.golden_dir()
  spec = json.loads((folder / "cnn_garden_resnet_rs.json").read_text())
  options = dict(same_padding=True, pool_every_shortcut=True, activation="swish")
  config = families.backbone_config("resnet_rs50", depths=(1, 2, 2, 1), **options)
  module = base.abstract(families.family_of("resnet_rs50").module, config)
  weights = golden_values.state_dict(spec)
  graphdef, abstract = nnx.split(module)
  leaves = {
    ours: weights.pop(f"backbone/{resnet.garden_name(ours, config)}").reshape(shape)
    for ours, shape in trees.shapes(trees.weights(module)).items()
  }
  assert not weights
  backbone = nnx.merge(graphdef, tensors.fill(abstract, _lazy(leaves), folder))
  for _, part in nnx.iter_modules(backbone):
    part.set_attributes(use_running_average=True, raise_if_not_found=False)
  outputs = np.load(folder / "cnn_garden_resnet_rs.npz")
  images = golden_values.values(spec["seed"], "images", spec["images"])
  for program in (backbone, random_backbones.fold(backbone, storage="float32")):
    for stage, found in enumerate(jax.jit(lambda program, x: program(x))(program, images)):
      wanted = outputs[f"stage{stage}"]
      found = np.asarray(found)[..., :: found.shape[-1] // 16]
      np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)


# timm 1.0.31 on the meta device, num_classes=0.
@pytest.mark.parametrize(
  "row, count",
  [
    ("resnet18", 11_176_512),
    ("resnet50", 23_508_032),
    ("resnet_rs101", 61_569_696),
    ("resnet_rs200", 91_160_992),
    ("tf_efficientnet_b7", 63_786_960),
    ("efficientnet_lite0", 3_371_008),
    ("convnext_tiny", 27_820_128),
    ("convnext_large", 196_230_336),
  ],
)
def test_parameter_counts(row, count):
  abstract = families.abstract_backbone(row)
  assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract, nnx.Param))) == count


def _far_statistics(backbone):
  """Running statistics far from (0, 1), as pretrained ones are."""
  rng = np.random.default_rng(0)
  for path, leaf in nnx.to_flat_state(nnx.state(backbone, nnx.BatchStat)):
    values = rng.uniform(0.1, 4, leaf.shape) if path[-1] == "var" else rng.normal(1, 2, leaf.shape)
    leaf.set_value(jnp.asarray(values, jnp.float32))
  return backbone


@pytest.mark.parametrize(
  "row, changes",
  [
    ("resnet18", dict(depths=(1, 3, 1, 1), width=8)),
    ("resnet_rs50", dict(depths=(1, 3, 1, 1), width=8, same_padding=True, activation="swish")),
    ("efficientnet_lite0", dict(width=0.25, depth=0.5)),
    ("tf_efficientnet_b0", dict(width=0.25, depth=0.5)),
    ("convnext_tiny", dict(depths=(1, 3, 1, 1), channels=(8, 16, 24, 32), layer_scale=0.5)),
  ],
)
def test_folded_equals_unfolded_and_an_image_is_the_same_in_every_batch(row, changes):
  backbone = _far_statistics(random_backbones.build(row, **changes))
  images = jnp.asarray(np.random.default_rng(1).standard_normal((2, 45, 70, 3)), "float32")
  model = nnx.Dict(backbone=backbone, head=nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
  frozen = nnx.merge(*partition.partition(model, ("head/.*",))).backbone
  folded = random_backbones.fold(frozen, storage="float32")
  key = jax.random.key(0)  # tasks pass one on in training; it has no effect

  @jax.jit
  def run(program, images, rng=None):
    return (*program(images, rng=rng), program.embed(images, rng=rng))

  wanted = run(frozen, images)
  found_all = run(folded, images, key)
  for spec, found, expected in zip((*frozen.feature_specs, None), found_all, wanted, strict=True):
    if spec is not None:
      assert found.shape == (2, -(-45 // spec.stride), -(-70 // spec.stride), spec.channels)
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()), rtol=0)
  company = images.at[1].set(3 * images[1] + 2)
  for other in (run(frozen, company), run(folded, company, key)):
    for found, expected in zip(other, wanted, strict=True):
      assert np.abs(found[1] - expected[1]).max() > 1e-4 * np.abs(expected[1]).max()
      np.testing.assert_allclose(found[0], expected[0], atol=1e-5 * float(jnp.abs(expected).max()), rtol=0)


@pytest.mark.parametrize(
  "changes",
  [
    dict(pooled_shortcut=True),
    dict(pooled_shortcut=True, pool_every_shortcut=True),
    dict(activation="swish"),
    dict(same_padding=True),
  ],
)
def test_what_changes_features_and_no_weight_changes_the_key_of_a_resnet(changes):
  keys = [
    feature_key.feature_key(families.abstract_backbone("resnet18", **options), "abc")
    for options in ({}, changes)
  ]
  assert keys[0] != keys[1]


def test_images_of_simclrs_wide_resnets_are_rgb_in_0_to_1():
  for row in ("resnet50_x2", "resnet50_x4"):
    backbone = families.abstract_backbone(row, depths=(1,) * 4)
    images = np.full((1, 2, 2, 3), 51, np.uint8)
    np.testing.assert_allclose(backbone.preprocessing.normalise(images), 0.2, rtol=1e-6)


def test_the_named_row_decides_where_shapes_fit_several(tmp_path, capsys):
  config = families.backbone_config("efficientnet_b0")
  module = families.abstract_backbone("efficientnet_b0")
  state = {
    efficientnet.timm_name(ours, config): np.zeros(
      [shape[axis] for axis in (3, 2, 0, 1)] if len(shape) == 4 else shape, np.float16
    )
    for ours, shape in trees.shapes(trees.weights(module)).items()
  }
  path = tmp_path / "timm.safetensors"
  safetensors.numpy.save_file(state, path)
  for row in ("efficientnet_b0", "tf_efficientnet_b0"):
    found = prepare.open_source(BackboneOptions(name=row, weights=str(path)), 0)
    assert found.module.config == families.backbone_config(row)
  with pytest.raises(ValueError, match="has the sizes of tf_efficientnet_b0, efficientnet_b0; give the name"):
    families.open_backbone(path)
  ours = tmp_path / "ours.safetensors"
  convert.main([str(path), str(ours), "--name=tf_efficientnet_b0", "--dtype=float16"])
  assert "tf_efficientnet_b0, as saved by timm" in capsys.readouterr().out
  assert families.open_backbone(ours).module.config == families.backbone_config("tf_efficientnet_b0")
  for arguments, message in (
    ([str(path), "--head=head.safetensors", "--name=efficientnet_b0"], "classifiers of SwinV2 only"),
    ([str(path), "--window=8", "--name=efficientnet_b0"], "backbone option 'window_sizes'"),
    ([str(ours)], "is a file of frozen_vision already"),
  ):
    with pytest.raises(SystemExit, match=message):
      convert.main([*arguments, str(tmp_path / "other.safetensors")])


_IMAGENET = dict(broccoli=937, refrigerator=760)


@pytest.mark.parametrize("file, wanted", [("000000062554", "broccoli"), ("000000073326", "refrigerator")])
def test_lite0_from_its_package_names_what_photographs_show(file, wanted):
  found = sorted(paths.data_dir("coco_subset").rglob(f"{file}.jpg"))
  image = Image.open(found[0]).convert("RGB")
  side = min(image.size)
  left, top = ((length - side) // 2 for length in image.size)
  image = image.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BICUBIC)
  backbone = families.load_backbone("efficientnet_lite0")
  classifier = checkpoint_file.open_checkpoint(
    families.published_weights()["efficientnet_lite0"].local_path()
  ).tensors
  folded = backbone.fold()
  images = backbone.preprocessing.normalise(jnp.asarray(image)[None])
  embedding = jax.jit(lambda folded, x: folded.embed(x))(folded, images)
  logits = embedding @ classifier["_fc.weight"].read().T + classifier["_fc.bias"].read()
  assert int(jnp.argmax(logits)) == _IMAGENET[wanted]
