"""Writes the golden files of TensorFlow's Model Garden: a ResNet-RS, and a checkpoint of TensorFlow's.

  python tests/references/garden_resnet.py FOLDER

Needs tensorflow, tf_keras and tf-models-official 2.20, not JAX. Writes `cnn_garden_resnet_rs.json` and `.npz`
(the names of a saved checkpoint, and features of the network with generated weights), and
`tensorflow_checkpoint/`, a checkpoint of a few arrays of every type that is read.
"""

import importlib
import json
import os
import pathlib
import sys
import types
from unittest import mock

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import numpy as np
import tensorflow as tf

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from tests import golden_values

_DEPTHS = (1, 2, 2, 1)
_SEED, _IMAGES = 0, (2, 97, 130, 3)
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
_PACKAGES = ("", ".core", ".modeling", ".vision", ".vision.modeling")
_PACKAGES += (".vision.modeling.backbones", ".vision.modeling.layers")


def _garden_resnet() -> types.ModuleType:
  """The Garden's module of ResNets alone: its packages, which import all of it, are passed over."""
  root = pathlib.Path(importlib.util.find_spec("official").submodule_search_locations[0])
  for name in _PACKAGES:
    package = types.ModuleType(f"official{name}")
    package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
    sys.modules[package.__name__] = package
  sys.modules["tensorflow_datasets"] = mock.MagicMock()
  for name in ("hyperparams", "tf_utils"):
    setattr(sys.modules["official.modeling"], name, importlib.import_module(f"official.modeling.{name}"))
  return importlib.import_module("official.vision.modeling.backbones.resnet")


def _spec(name: str, shape: tuple[int, ...]) -> dict:
  """How a weight is generated (tests/golden/README.md)."""
  match name.split("/")[-1]:
    case "kernel":
      return {"shape": shape, "scale": float(np.prod(shape[:-1]) ** -0.5), "offset": 0.0}
    case "moving_variance":
      return {"shape": shape, "scale": 0.1, "offset": 0.0, "exp": True}
    case "gamma":
      return {"shape": shape, "scale": 0.1, "offset": 1.0}
    case _:
      return {"shape": shape, "scale": 0.1, "offset": 0.0}


def _write_resnet(folder: pathlib.Path) -> None:
  resnet = _garden_resnet()
  widths = (64, 128, 256, 512)
  resnet.RESNET_SPECS[0] = [("bottleneck", *each) for each in zip(widths, _DEPTHS, strict=True)]
  network = resnet.ResNet(
    0,
    stem_type="v1",
    resnetd_shortcut=True,
    replace_stem_max_pool=True,
    se_ratio=0.25,
    activation="swish",
    norm_epsilon=1e-5,
  )
  pooled = tf.keras.layers.GlobalAveragePooling2D()(network(network.inputs)["5"])
  model = tf.keras.Model(network.inputs, tf.keras.layers.Dense(3)(pooled))
  optimizer = tf.keras.optimizers.SGD(0.1, momentum=0.9)
  optimizer.build(model.trainable_variables)
  step = tf.Variable(5, dtype=tf.int64)
  saved = tf.train.Checkpoint(backbone=network, model=model, optimizer=optimizer, global_step=step)
  reader = tf.train.load_checkpoint(saved.save(str(folder / "whole")))
  shapes = {name: tuple(shape) for name, shape in reader.get_variable_to_shape_map().items()}
  names = {name.removesuffix(_VALUE): shape for name, shape in shapes.items()}
  specs = {
    name: _spec(name, shape)
    for name, shape in sorted(names.items())
    if name.startswith("backbone/") and "OPTIMIZER" not in name
  }
  weights = golden_values.state_dict({"seed": _SEED, "state_dict": specs})
  left = {variable.ref(): variable.name for variable in network.variables}
  for name, variable in _named_variables(network).items():
    variable.assign(weights[f"backbone/{name}"])
    left.pop(variable.ref())
  if left:
    raise ValueError(f"Variables without a name in the checkpoint: {sorted(left.values())}.")
  for file in [*folder.glob("whole*"), folder / "checkpoint"]:
    file.unlink(missing_ok=True)
  images = golden_values.values(_SEED, "images", _IMAGES)
  outputs = network(images, training=False)
  spec = {
    "seed": _SEED,
    "source": "tf-models-official 2.20.0, ResNet-RS with one, two, two and one block",
    "images": _IMAGES,
    "beside": sorted(set(names) - set(specs)),
    "state_dict": specs,
  }
  (folder / "cnn_garden_resnet_rs.json").write_text(json.dumps(spec, indent=1) + "\n")
  maps = {f"stage{stage}": outputs[str(stage + 2)].numpy() for stage in range(4)}
  maps = {name: value[..., :: value.shape[-1] // 16] for name, value in maps.items()}
  np.savez_compressed(folder / "cnn_garden_resnet_rs.npz", **maps)


def _named_variables(network: tf.keras.Model) -> dict[str, tf.Variable]:
  """{path in an object-based checkpoint below the network: variable}."""
  layers = [layer for layer in network.layers if layer.weights]
  found = {}
  for number, layer in enumerate(layers):
    blocks = {name: part for name, part in vars(layer).items() if isinstance(part, tf.keras.layers.Layer)}
    squeeze = blocks.pop("_squeeze_excitation", None)
    if squeeze is not None:
      inner = {name: getattr(squeeze, name) for name in ("_se_reduce", "_se_expand")}
      blocks |= {f"_squeeze_excitation/{name}": part for name, part in inner.items()}
    for name, part in blocks.items() or [("", layer)]:
      path = "/".join(filter(None, (f"layer_with_weights-{number}", name)))
      for variable in part.variables:
        found[f"{path}/{variable.name.split('/')[-1].split(':')[0]}"] = variable
  return found


def _write_checkpoint(folder: pathlib.Path) -> None:
  rng = np.random.default_rng(0)
  arrays = {
    "float32": rng.normal(size=(3, 5)).astype(np.float32),
    "float64": rng.normal(size=4),
    "float16": rng.normal(size=(2, 2)).astype(np.float16),
    "bfloat16": tf.cast(rng.normal(size=7), tf.bfloat16),
    "int32": np.arange(6, dtype=np.int32).reshape(1, 2, 3),
    "int64": np.int64(-5),
    "int16": np.arange(3, dtype=np.int16),
    "int8": np.arange(3, dtype=np.int8) - 1,
    "uint8": np.arange(9, dtype=np.uint8),
    "bool": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
    "long": rng.normal(size=5000).astype(np.float32),
    "text": tf.constant("some words"),
  }
  variables = {name: tf.Variable(value) for name, value in arrays.items()}
  folder.mkdir(parents=True, exist_ok=True)
  tf.train.Checkpoint(**variables).write(str(folder / "ckpt-1"))
  known = {name: v.numpy() for name, v in variables.items() if name != "text"}
  known["bfloat16"] = known["bfloat16"].astype(np.float32)
  np.savez_compressed(folder / "values.npz", **known)


if __name__ == "__main__":
  target = pathlib.Path(sys.argv[1])
  target.mkdir(parents=True, exist_ok=True)
  _write_checkpoint(target / "tensorflow_checkpoint")
  _write_resnet(target)
