"""A family from outside of the package: everything works with it, and no line of the package knows it."""

import json
import os
import pathlib
import subprocess
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frozen_vision import export
from frozen_vision.backbones import families
from frozen_vision.files import tensors, trees
from frozen_vision.freezing import feature_key, partition, prepare
from frozen_vision.layers import storage
from frozen_vision.planning import plan
from frozen_vision.prediction import predictor
from frozen_vision.training import loop, optimizer
from tests import tiny, tiny_family

_ROOT = pathlib.Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("family")


@pytest.fixture
def family(monkeypatch):
  monkeypatch.setitem(families.FAMILIES, "tiny_family", tiny_family.FAMILY)


def _backbone(seed=0, **overrides):
  """A backbone whose batch statistics are those of no batch."""
  backbone = families.build_backbone("tiny_conv", rngs=nnx.Rngs(seed), **overrides)
  rng = np.random.default_rng(seed)

  def drawn(leaf):
    return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)

  nnx.update(backbone, jax.tree.map(drawn, nnx.state(backbone, nnx.BatchStat)))
  return backbone


def _images(count=2, height=37, width=54):
  return jax.random.normal(jax.random.key(1), (count, height, width, 3))


def _close(found, wanted, tolerance=1e-5):
  for one, other in zip(found, wanted, strict=True):
    np.testing.assert_allclose(one, other, atol=tolerance * float(jnp.abs(other).max()))


def _config(weights="random"):
  config = tiny.segmentation()
  config.backbone.update(dict(name="tiny_conv", weights=str(weights)))
  config.backbone.overrides = {}
  return config


def test_a_family_takes_at_most_80_lines():
  assert len((_ROOT / "tests" / "tiny_family.py").read_text().splitlines()) <= 80


def test_batch_statistics_are_weights_of_the_file_and_of_the_fingerprint(tmp_path):
  backbone, path = _backbone(), tmp_path / "conv.safetensors"
  fingerprint = families.save_backbone(backbone, path, name="tiny_conv")
  assert tensors.open_safetensors(path)[1]["family"] == "tiny_family"
  loaded = families.load_backbone(path)
  assert isinstance(loaded, tiny_family.Tiny) and loaded.config == backbone.config
  found, wanted = trees.flatten(trees.weights(loaded)), trees.flatten(trees.weights(backbone))
  assert found.keys() == wanted.keys() and "stages/0/0/norm/mean" in wanted
  for name, leaf in wanted.items():
    np.testing.assert_array_equal(found[name], leaf, err_msg=name)
  assert trees.fingerprint(trees.weights(loaded)) == fingerprint
  assert families.load_backbone(path, slope=0.2).config.slope == 0.2
  with pytest.raises(ValueError, match="backbone option 'slop'.*Did you mean 'slope'"):
    families.load_backbone(path, slop=0.2)

  other = _backbone()
  other.stages[1][0].norm.mean[...] += 1
  fingerprint = trees.fingerprint(trees.weights(other))
  assert fingerprint != trees.fingerprint(trees.weights(backbone))
  assert prepare.freeze(other).key != prepare.freeze(backbone).key


def test_frozen_an_image_has_the_same_features_alone_and_in_a_batch():
  class Model(nnx.Module):
    def __init__(self):
      self.backbone = _backbone()
      self.head = nnx.List([nnx.Linear(16, 2, rngs=nnx.Rngs(0)), nnx.BatchNorm(2, rngs=nnx.Rngs(0))])

  model, images, key = Model(), _images(3), jax.random.key(0)
  graphdef, trainable, frozen = partition.partition(model, ("head/.*",))
  assert "backbone/stages/0/0/norm/mean" in trees.flatten(frozen)
  together = nnx.merge(graphdef, trainable, frozen).backbone(images, rng=key)
  alone = nnx.merge(graphdef, trainable, frozen).backbone(images[:1], rng=key)
  _close([level[:1] for level in together], alone)
  assert not model.head[1].use_running_average  # it trains

  # What trains normalises by its batch, if it is given a key, and remembers.
  opened = Model()
  partition.partition(opened, ("backbone/stages/0/.*", "head/.*"))
  before = np.array(opened.backbone.stages[0][0].norm.mean[...])
  opened.backbone(images, rng=key)
  assert np.abs(opened.backbone.stages[0][0].norm.mean[...] - before).max() > 0
  assert opened.backbone.stages[1][0].norm.use_running_average


def test_folded_it_has_the_same_features_with_every_storage():
  backbone, images = _backbone(), _images()
  wanted = backbone(images)
  for spec, level in zip(backbone.feature_specs, wanted, strict=True):
    assert level.shape == (2, -(-37 // spec.stride), -(-54 // spec.stride), spec.channels)
  sizes = {}
  for kind, least in (("float32", 0.999999), ("bfloat16", 0.9995), ("int8", 0.995)):
    folded = jax.jit(lambda program, images: program(images))
    program = backbone.fold(storage=kind)
    sizes[kind] = sum(leaf.nbytes for leaf in jax.tree.leaves(program))
    for found, level in zip(folded(program, images), wanted, strict=True):
      cosine = (found * level).sum() / jnp.sqrt((found**2).sum() * (level**2).sum())
      assert cosine >= least, (kind, cosine)
  assert sizes["int8"] < sizes["bfloat16"] < sizes["float32"]
  _close(backbone.fold()(images), wanted)
  np.testing.assert_allclose(backbone.fold().embed(images), backbone.embed(images), rtol=1e-4, atol=1e-6)
  with pytest.raises(ValueError, match="storage is 'float16'; known kinds of storage: float32, bfloat16"):
    backbone.fold(storage="float16")


@pytest.mark.parametrize("kind", storage.KINDS)
def test_read_from_its_file_block_by_block_it_is_the_same_program(tmp_path, kind):
  families.save_backbone(_backbone(), tmp_path / "conv.safetensors", name="tiny_conv")
  file = families.open_backbone(tmp_path / "conv.safetensors")
  found, wanted = prepare.freeze(file, storage=kind), prepare.freeze(file.load(), storage=kind)
  assert found.key == wanted.key
  for one, other in zip(*map(jax.tree.leaves, (found.program, wanted.program)), strict=True):
    np.testing.assert_array_equal(one, other)


def test_its_options_are_in_the_feature_key():
  keys = [feature_key.feature_key(_backbone(slope=slope), "abc") for slope in (0.1, 0.2)]
  assert keys[0]["slope"] == 0.1 and keys[0] != keys[1]


def test_learning_rates_decay_by_its_depths():
  config = _config()
  config.trainable, config.optimizer.layer_decay = (".*",), 0.5
  config.optimizer.update(dict(name="sgd", schedule="constant", weight_decay=0.0, momentum=0.0))
  task = plan.build_task(config)
  model = loop.build_model(task, config)
  tx = optimizer.build(
    config.optimizer,
    steps=1,
    trainable=model.trainable,
    layer_of=model.layer_of,
    no_weight_decay=model.no_weight_decay,
  )
  ones = jax.tree.map(jnp.ones_like, model.trainable)
  updates, _ = tx.update(ones, tx.init(model.trainable), model.trainable)
  found = {path: float(-leaf.ravel()[0]) for path, leaf in trees.flatten(updates).items()}
  peak = config.optimizer.learning_rate
  for stage in range(4):
    assert np.isclose(found[f"backbone/stages/{stage}/1/conv/kernel"], peak * 0.5 ** (4 - stage))
  assert {rate for path, rate in found.items() if path.startswith("head/")} == {np.float32(peak)}
  assert isinstance(tx, optax.GradientTransformation)


@pytest.mark.slow
def test_on_8_devices_a_step_is_that_of_one():
  command = [sys.executable, "-m", "tests.mesh_run", "segmentation", "linear", "tiny_conv"]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  process = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=600)
  assert process.returncode == 0, process.stdout + process.stderr
  report = json.loads(process.stdout.splitlines()[-1])
  assert list(report) == ["4x2", "2x4"]
  for mesh, row in report.items():
    assert max(row[part] for part in ("scalars", "updated", "gradients", "predictions")) < 1e-4, (mesh, row)
    pieces = 4 if mesh == "2x4" else 8
    assert 1 / pieces <= row["frozen_share"] < 0.5, (mesh, row)


def test_it_trains_predicts_is_exported_and_planned(tmp_path):
  path, run = tmp_path / "conv.safetensors", tmp_path / "run"
  families.save_backbone(_backbone(), path, name="tiny_conv")
  config = _config(path)
  config.update(dict(steps=2, checkpoint_every=2))
  metrics = loop.train(config, str(run))
  assert loop.evaluate(config, str(run))["mIoU"] == metrics["mIoU"]

  picture = np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8)
  head = predictor.Predictor(None, {"segment": run}, image_size=64)
  [result] = head([picture])["segment"]
  assert result.labels.shape == (50, 60)
  meta = export.export(head, tmp_path / "segment.jaxexport", platforms=("cpu",))
  assert meta["images"] == [1, 64, 64, 3] and (tmp_path / "segment.jaxexport").stat().st_size

  other = _backbone(seed=1)
  given = predictor.Predictor(other, {"segment": run}, image_size=64)
  assert "weights" in given.heads["segment"].differs and "it does not fit" in given.describe()

  report = plan.plan(config, str(tmp_path / "plan"), "cpu:1")
  frozen = sum(leaf.nbytes for leaf in jax.tree.leaves(_backbone().fold()))
  assert report["bytes_per_device"]["frozen_weights"] == frozen
  assert report["finetune"]["model_flops_per_step"] > 1.4 * report["model_flops_per_step"]
