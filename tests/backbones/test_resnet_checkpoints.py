"""ResNet checkpoints in the layouts of 14 self-supervised pretrainings: every key is used or explained."""

import numpy as np
import pytest

from frozen_vision.backbones import base, families
from frozen_vision.backbones.resnet import checkpoints, model
from frozen_vision.files import trees
from tests.files import bundle_file, pth_file

_TINY = dict(depths=(1, 1, 1, 1), width=4)
_MOCO = (
  "encoder_k.layer1.0.conv1.weight",
  "queue",
  "queue_ptr",
  "encoder_q.fc.0.weight",
  "encoder_q.fc.2.bias",
)


def _beside(*names):
  return {name: np.ones(2, np.float32) for name in names}


def _torchvision(prefix, *beside, wrapper=None, all_below="", extra=None):
  """A checkpoint with an encoder of torchvision's names below a prefix."""

  def content(config, weights):
    tensors = {prefix + checkpoints.torch_name(ours, config): value for ours, value in weights.items()}
    tensors |= {f"{prefix}bn1.num_batches_tracked": np.asarray(7, np.int64), **_beside(*beside)}
    tensors = {all_below + name: value for name, value in tensors.items()}
    return tensors if wrapper is None else {wrapper: tensors, "epoch": 200, **(extra or {})}

  return content


def _simclr_v2(config, weights):
  tensors = {checkpoints.simclr_v2_name(ours, config): value for ours, value in weights.items()}
  return {"resnet": tensors | _beside("fc.weight", "fc.bias"), "head": _beside("layers.0.weight")}


# What the released files, or those of the released training code, look like.
_LAYOUTS = {
  "InsDis": _torchvision(
    "encoder.", "head.0.weight", wrapper="model", all_below="module.", extra={"contrast": _beside("memory")}
  ),
  "PIRL": _torchvision(
    "encoder.", "head.weight", "head_jig.fc1.weight", wrapper="model", all_below="module."
  ),
  "InfoMin": _torchvision("encoder.", "head.0.weight", "head.2.bias", wrapper="model", all_below="module."),
  "MoCo v1": _torchvision("encoder_q.", *_MOCO, wrapper="state_dict", all_below="module."),
  "PCL": _torchvision("encoder_q.", *_MOCO, wrapper="state_dict", all_below="module."),
  "MoCo v3": _torchvision(
    "base_encoder.",
    *("base_encoder.fc.0.weight", "momentum_encoder.conv1.weight", "predictor.0.weight"),
    wrapper="state_dict",
    all_below="module.",
  ),
  "SimCLR v1": _torchvision("", "fc.weight", "fc.bias", wrapper="state_dict"),
  "SimCLR v2": _simclr_v2,
  "SeLa": _torchvision("", "projection_head.0.weight", "prototypes.prototypes0.weight", all_below="module."),
  "DeepCluster-v2": _torchvision("", "projection_head.3.bias", "prototypes.prototypes2.weight"),
  "SwAV": _torchvision("", "projection_head.1.running_mean", "prototypes.weight", all_below="module."),
  "BYOL": _torchvision("", "fc.weight", "fc.bias", wrapper="state_dict"),
  "BYOL, byol-pytorch": _torchvision(
    "online_encoder.net.",
    *(
      "online_encoder.projector.net.0.weight",
      "target_encoder.net.conv1.weight",
      "online_predictor.net.0.bias",
    ),
  ),
  "DINO": _torchvision(
    "backbone.", "head.mlp.0.weight", "head.last_layer.weight_v", wrapper="teacher", all_below="module."
  ),
  "Barlow Twins": _torchvision(
    "backbone.",
    "projector.0.weight",
    "bn.running_mean",
    "bn.running_var",
    wrapper="model",
    all_below="module.",
  ),
  "VICReg": _torchvision("backbone.", "projector.1.bias", wrapper="model", all_below="module."),
  "DINO, Barlow Twins and VICReg without heads": _torchvision(""),
}


@pytest.fixture
def network(monkeypatch):
  """The config of a tiny `resnet50`, and values of its variables in PyTorch's layout."""
  config = model.VARIANTS["resnet50"].replace(**_TINY)
  monkeypatch.setitem(model.VARIANTS, "resnet50", config)
  backbone = base.abstract(model.ResNet, config)
  rng = np.random.default_rng(0)
  weights = {}
  for path, shape in trees.shapes(trees.weights(backbone)).items():
    shape = tuple(shape[axis] for axis in (3, 2, 0, 1)) if len(shape) == 4 else shape
    weights[path] = rng.uniform(0.5, 1, shape).astype(np.float32)
  return config, weights


def _save(tmp_path, content):
  return pth_file.write(tmp_path / "checkpoint.pth", content)


@pytest.mark.parametrize("name", _LAYOUTS)
def test_an_encoder_is_found_and_everything_beside_it_is_named(tmp_path, network, name):
  config, weights = network
  source = families.open_backbone(_save(tmp_path, _LAYOUTS[name](config, weights)))
  if name == "SimCLR v2":
    config = config.replace(**model.SIMCLR_IMAGES)
  assert source.module.config == config
  for path, leaf in source.leaves.items():
    value = weights[path]
    wanted = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
    np.testing.assert_array_equal(leaf.read(), wanted, err_msg=path)


@pytest.mark.parametrize("name", _LAYOUTS)
def test_one_surplus_key_is_an_error(tmp_path, network, name):
  content = _LAYOUTS[name](*network)
  tensors = content
  for key in ("model", "state_dict", "teacher", "resnet"):
    tensors = tensors.get(key, tensors)
  first = next(iter(tensors))
  # Where a head is expected in another layout, and beside the encoder's own names.
  surplus = first.rpartition("conv1")[0] + "bn9.weight" if "conv1" in first else "net.9.weight"
  tensors[surplus] = np.ones(2, np.float32)
  with pytest.raises(ValueError, match=f"unexpected.*{surplus.removeprefix('module.')}"):
    families.open_backbone(_save(tmp_path, content))


def test_a_head_of_another_pretraining_does_not_pass(tmp_path, network):
  content = _LAYOUTS["MoCo v1"](*network)
  content["state_dict"]["module.prototypes.weight"] = np.ones(2, np.float32)
  with pytest.raises(ValueError, match="unexpected.*prototypes.weight"):
    families.open_backbone(_save(tmp_path, content))


@pytest.fixture
def garden(network, monkeypatch, tmp_path):
  """Tensors of a tiny ResNet-RS in Model Garden's layout, its config, and a file for them."""
  tiny = dict(depths=(1, 2, 1, 1), width=8)
  config = model.VARIANTS["resnet_rs50"].replace(**tiny)
  monkeypatch.setitem(model.VARIANTS, "resnet_rs50", config)
  backbone = base.abstract(model.ResNet, config)
  rng = np.random.default_rng(0)
  tensors = {}
  for path, shape in trees.shapes(trees.weights(backbone)).items():
    shape = (1, 1, *shape) if len(shape) == 2 else shape
    tensors[f"backbone/{checkpoints.garden_name(path, config)}"] = rng.uniform(0.5, 1, shape).astype(
      np.float32
    )
  beside = ("model/layer_with_weights-1/kernel", "optimizer/momentum", "head/conv/kernel", "global_step")
  slot = "backbone/layer_with_weights-0/kernel/.OPTIMIZER_SLOT/optimizer/average"
  return tensors | _beside(*beside, slot), config, tmp_path / "ckpt-62400.index"


def test_a_checkpoint_of_model_garden_is_loaded(garden):
  tensors, config, path = garden
  source = families.open_backbone(bundle_file.write(path, tensors))
  assert source.module.config == config.replace(
    same_padding=True, pool_every_shortcut=True, activation="swish"
  )
  for ours, leaf in source.leaves.items():
    wanted = tensors[f"backbone/{checkpoints.garden_name(ours, config)}"]
    np.testing.assert_array_equal(leaf.read(), wanted.reshape(leaf.shape), err_msg=ours)


def test_one_surplus_variable_of_model_garden_is_an_error(garden):
  tensors, _, path = garden
  tensors["backbone/layer_with_weights-9/_conv4/kernel"] = np.ones(2, np.float32)
  with pytest.raises(ValueError, match="unexpected.*layer_with_weights-9/_conv4/kernel"):
    families.open_backbone(bundle_file.write(path, tensors))
