"""configs/kinetics_video_swin.py: every variant is read, and the giant's recipe is traced at full size."""

import importlib.util
import json
import pathlib

from flax import nnx
import jax
import pytest

from frozen_vision.backbones import families
from frozen_vision.data.video import sources
from frozen_vision.freezing import partition as freeze
from frozen_vision.tasks import action
from frozen_vision.tasks import build as tasks_build

_PATH = pathlib.Path(__file__).resolve().parents[2] / "configs" / "kinetics_video_swin.py"


@pytest.fixture(scope="module")
def module():
  spec = importlib.util.spec_from_file_location("kinetics_video_swin", _PATH)
  loaded = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(loaded)
  return loaded


def test_every_variant_is_a_config_that_is_read(module):
  for variant in module.VARIANTS:
    config = module.get_config(variant)
    specs = families.backbone_config(config.backbone.name, **config.backbone.overrides).feature_specs
    for head in ("video_swin", "attentive", "average"):
      options = tasks_build.read_config(module.get_config(f"{module.VARIANTS[variant]},head={head}")).action
      assert options.head.name == head
      nnx.eval_shape(lambda o=options, s=specs: action.build_head(o, s, 400, rngs=nnx.Rngs(0)))
    weights = {"": "shipped", "fights": "shipped", "files": "efficientnet_lite0"}
    fetched = variant if variant.startswith("dino") else f"weights/{variant}.safetensors"
    assert config.backbone.weights == weights.get(variant, fetched)
    if variant not in weights:
      assert config.backbone.name == variant
    assert f":{variant}" in module.__doc__
  assert module.get_config("").headline.startswith("DEMO")
  with pytest.raises(ValueError, match="no variant 'swinv2_x'; known: .*:fights, .*:swinv2_g"):
    module.get_config("swinv2_x")


def test_the_demo_builds_its_task(module):
  task = tasks_build.build_task(module.get_config())
  assert task.headline == "Action recognition: 6,000 training and 200 validation videos, 6 classes."


def test_the_giant_recipe_is_traced_at_full_size(module, monkeypatch):
  """16 frames of 384 px, in passes of 16; nothing is in memory."""
  config = module.get_config("swinv2_g")
  config.backbone.weights = "random"  # the paper's weights were never published
  names = [str(number) for number in range(400)]
  monkeypatch.setattr(
    action, "_open_sources", lambda *_: [sources.VideoList([pathlib.Path("v.mp4")], [0], names)] * 2
  )
  task = tasks_build.build_task(config)
  graphdef, trainable, frozen = freeze.partition(nnx.eval_shape(task.build_model), tuple(config.trainable))

  def count(state):
    return sum(leaf.size for leaf in jax.tree.leaves(state)) / 1e6

  assert set(trainable) == {"head"} and 2900 < count(frozen) < 3100 and 30 < count(trainable) < 100
  shape = jax.ShapeDtypeStruct
  batch = dict(
    clip=shape((2, 16, 384, 384, 3), "uint8"), label=shape((2,), "int32"), readable=shape((2,), "bool")
  )

  def loss(trainable, frozen, batch):
    model = nnx.merge(graphdef, trainable, frozen)
    features = task.features(model, batch, None)
    assert [x.shape for x in features] == [(2, 16, 12, 12, 4096)] and features[0].dtype == "bfloat16"
    return task.loss(model, batch, features, jax.random.key(0), None)

  losses = jax.eval_shape(loss, trainable, frozen, batch)
  assert {name: value.shape for name, value in losses.terms.items()} == {"cross_entropy": ()}
  assert set(losses.metrics) == {"top1", "unreadable"}


def test_the_configuration_is_json(module):
  for variant in module.VARIANTS:
    json.dumps(module.get_config(variant).to_dict())
