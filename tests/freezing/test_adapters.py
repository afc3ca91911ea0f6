"""Adapters in frozen backbones: zero at first, alone in training, and known to whoever reads the run."""

import functools
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frozen_vision.backbones import families
from frozen_vision.config import AdapterOptions
from frozen_vision.devices import sharding
from frozen_vision.files import trees
from frozen_vision.freezing import adapters, cache, prepare
from frozen_vision.heads import files as head_files
from frozen_vision.layers import adapters as layers
from frozen_vision.layers import storage as stored
from frozen_vision.planning import flops, plan
from frozen_vision.prediction import predictor as predict
from frozen_vision.prediction import trained_head
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import loop
from frozen_vision.training import step as train_step
from tests import random_backbones, saved_runs, tiny, tiny_family

# Of every family: two equal blocks that are scanned, and a first block of another shape where it has one.
_ROWS = {
  "swinv2": (
    "swinv2_nano",
    dict(embed_dim=8, depths=(1, 4), num_heads=(1, 2), window_sizes=(4, 2), pretrained_window_sizes=(0, 0)),
  ),
  "resnet": ("resnet50", dict(depths=(1, 3), width=8)),
  "efficientnet": ("efficientnet_lite0", dict(width=0.25, depth=0.3)),
  "convnext": ("convnext_tiny", dict(depths=(1, 2, 1, 1), channels=(8, 16, 16, 16))),
  "vit": ("deit_vits16", dict(embed_dim=24, depth=2, num_heads=2, mlp_dim=48)),
}
_LINEAR = AdapterOptions("linear", "parallel")
_BOTTLENECK = AdapterOptions("bottleneck", "series", width=4)


class _Model(nnx.Module):
  def __init__(self, backbone):
    self.backbone = backbone


@functools.cache
def _backbone(family):
  name, fields = _ROWS[family]
  return random_backbones.build(name, **{**families.FAMILIES[family].random, **fields})


def _images(size=(33, 50)):
  return jnp.asarray(np.random.default_rng(0).standard_normal((1, *size, 3)), jnp.float32)


def _parts(program):
  """(structure, adapters, the rest) of a program in a model."""
  return nnx.split(_Model(nnx.data(program)), nnx.Param, ...)


def _features(graphdef, trained, frozen, images):
  return nnx.merge(graphdef, trained, frozen).backbone(images)


def _gradients(graphdef):
  """(adapters, the rest, images) -> (gradients of the adapters, features)."""

  def loss(trained, frozen, images):
    levels = _features(graphdef, trained, frozen, images)
    return sum(jnp.mean(jnp.sin(level)) for level in levels), levels

  return jax.grad(loss, has_aux=True)


def test_every_family_is_tested():
  assert set(_ROWS) == set(families.FAMILIES)


@pytest.mark.parametrize("options", [_LINEAR, _BOTTLENECK])
def test_a_new_adapter_changes_no_bit(options):
  x, y = (
    jnp.asarray(np.random.default_rng(1).standard_normal(s), jnp.float32)
    for s in ((2, 9, 6, 3), (2, 5, 3, 4))
  )
  width = options.width if options.kind == "bottleneck" else 0
  weights = layers.initial(jax.random.key(0), inputs=3, outputs=4, placement=options.placement, width=width)
  np.testing.assert_array_equal(layers.adapted(x, y, {"adapter": weights}), y)
  assert layers.adapted(x, y, {}) is y


def test_a_parallel_adapter_reads_the_cells_of_a_strided_block():
  x, y = jnp.arange(9.0).reshape(1, 3, 3, 1), jnp.zeros((1, 2, 2, 1))
  adapter = {"parallel": {"up": {"kernel": jnp.ones((1, 1))}}}
  found = layers.adapted(x, y, {"adapter": adapter})
  np.testing.assert_array_equal(found[0, ..., 0], [[0, 2], [6, 8]])


@pytest.mark.parametrize("family", _ROWS)
def test_gradients_are_those_of_adapters_and_of_inputs_alone(family):
  program, images = stored.shapes(_backbone(family)), _images()
  count = {}
  for remat in (False, True):
    options = AdapterOptions("linear", "parallel", remat=remat)
    graphdef, trained, frozen = _parts(adapters.attach(program, options, seed=0))
    assert all(re.fullmatch(adapters.PATTERN, path) for path in trees.flatten(trained))
    assert len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(_parts(program)[2]))
    count[remat] = flops.count(_gradients(graphdef), trained, frozen, images)
  forward = flops.count(lambda program, images: program(images), program, images)
  # Forward, back to the inputs of the blocks, and three of each adapter: no gradient of a frozen weight.
  adapted = flops.count(lambda *parts: _features(graphdef, *parts), trained, frozen, images)
  own = 3 * (adapted - forward)
  assert 1.4 < (count[False] - own) / forward < 2.05
  assert 0 < (count[True] - count[False]) / forward < 1.05


# An EfficientNet's program is that of a ResNet with other blocks.
@pytest.mark.parametrize("family", sorted(set(_ROWS) - {"efficientnet"}))
def test_features_are_the_frozen_ones_at_first_and_every_adapter_learns(family):
  program, images = random_backbones.fold(_backbone(family)), _images()
  graphdef, trained, frozen = _parts(adapters.attach(program, _LINEAR, seed=0))
  both = jax.jit(lambda *parts: (_gradients(graphdef)(*parts, images), program(images)))
  (gradients, levels), wanted = both(trained, frozen)
  for level, one in zip(levels, wanted, strict=True):  # programs that compilers fuse differently
    np.testing.assert_allclose(level, one, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(one))))
  for path, leaf in trees.flatten(gradients).items():
    assert np.any(np.asarray(leaf)), path


def test_a_stack_of_int8_blocks_is_moved_by_its_adapters():
  program = random_backbones.fold(_backbone("resnet"), storage="int8")
  adapted = adapters.attach(program, AdapterOptions("bottleneck", "parallel", width=4, stages=(1,)), seed=0)
  graphdef, trained, frozen = _parts(adapted)
  shapes = {path: leaf.shape for path, leaf in trees.flatten(trained).items()}
  assert shapes == {
    "backbone/stages/1/first/adapter/parallel/down/kernel": (32, 4),
    "backbone/stages/1/first/adapter/parallel/up/kernel": (4, 64),
    "backbone/stages/1/repeated/0/adapter/parallel/down/kernel": (2, 64, 4),
    "backbone/stages/1/repeated/0/adapter/parallel/up/kernel": (2, 4, 64),
  }
  before = program(_images())
  moved = nnx.merge(graphdef, jax.tree.map(jnp.ones_like, trained), frozen).backbone(_images())
  np.testing.assert_allclose(moved[0], before[0], rtol=1e-5, atol=1e-5 * float(jnp.max(before[0])))
  assert np.max(np.abs(moved[1] - before[1])) > 0.1


def test_what_cannot_have_adapters_is_refused():
  def prepared(options, **others):
    build = lambda backbone: _Model(backbone)  # noqa: E731
    return prepare.prepare(build, _backbone("vit"), adapters=options, **others)

  with pytest.raises(
    ValueError, match="config.adapters.kind=linear is for a folded backbone of which nothing"
  ):
    prepared(_LINEAR, trainable=("backbone/norm/.*",))
  with pytest.raises(ValueError, match="config.backbone.fold must be on"):
    prepared(_LINEAR, trainable=(), fold=False)
  with pytest.raises(
    ValueError, match=r"config.adapters.stages names \[2\]; this backbone has stages 0 to 1"
  ):
    prepared(AdapterOptions("linear", stages=(0, 2)), trainable=())
  other = tiny_family.Tiny(tiny_family.TinyConfig(depth=1), rngs=nnx.Rngs(0)).fold()
  with pytest.raises(ValueError, match="FoldedTiny takes no adapters; set --config.adapters.kind=none"):
    adapters.attach(other, _LINEAR, seed=0)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  return tiny.image_folder(tmp_path_factory.mktemp("images"))


def _config(images):
  """A linear classifier at 16 px."""
  config = tiny.classification(images, images)
  config.update(dict(trainable=("head/.*",), frozen_dtype="int8", steps=2, checkpoint_every=2))
  return config


def _adapted(images):
  config = _config(images)
  config.adapters.update(dict(kind="bottleneck", placement="parallel", width=4))
  return config


def test_some_steps_change_adapters_and_head_alone(images):
  config = _adapted(images)
  task = tasks_build.build_task(config)
  model = loop.build_model(task, config)
  assert not model.frozen_pass and model.feature_key["adapters"]["width"] == 4
  frozen = jax.tree.map(np.array, model.frozen)
  tx = optax.sgd(0.1)
  state = train_step.init_state(model.trainable, tx, seed=0, ema=False, mutable=model.mutable)
  start = jax.tree.map(np.array, state["trainable"])
  step = jax.jit(train_step.make_train_step(task, model.graphdef, tx, frozen_pass=model.frozen_pass))
  with task.train_batches(0) as batches:
    for _ in range(3):
      state, _ = step(state, model.frozen, train_step.device_batch(next(batches)))
  for before, after in zip(jax.tree.leaves(frozen), jax.tree.leaves(model.frozen), strict=True):
    np.testing.assert_array_equal(before, after)
  changed = trees.flatten(state["trainable"])
  assert {path.split("/")[0] for path in changed} == {"backbone", "head"}
  for path, leaf in trees.flatten(start).items():
    assert np.any(leaf != changed[path]), path


def test_a_run_with_adapters_is_evaluated_and_predicted(tmp_path, images):
  config, plain = _adapted(images), _config(images)
  workdir = tmp_path / "run"
  metrics = loop.train(config, workdir)
  # A head without adapters on the same backbone does not share its pass.
  saved_runs.save_run(tmp_path / "plain", plain, saved_runs.CLASSES["classification"])
  predictor = predict.Predictor(None, {"adapted": workdir, "plain": tmp_path / "plain"})
  assert [[head.name for head in one.heads] for one in predictor.passes] == [["adapted"], ["plain"]]
  kept = trees.flatten(predictor.heads["adapted"].trainable)
  up = [leaf for path, leaf in kept.items() if path.endswith("up/kernel")]
  assert up and all(np.any(np.asarray(leaf)) for leaf in up)
  assert {path.split("/")[0] for path in kept} == {"backbone", "head"}
  assert loop.evaluate(config, workdir)["top1"] == metrics["top1"]

  with pytest.raises(ValueError, match="adapters"):
    loop.evaluate(plain, workdir)
  config.cache.path = str(tmp_path / "cache")
  with pytest.raises(cache.CacheError, match="config.adapters trains inside the backbone"):
    loop.evaluate(config, workdir)


def test_frozen_parts_of_a_head_come_back_beside_adapters(tmp_path):
  config, classes = tiny.segmentation(), saved_runs.CLASSES["segmentation"]
  head = nnx.state(tasks_build.build_task(config, classes).build_model().head, nnx.Param)
  leaves = {f"head/{path}": 1 + np.asarray(leaf) for path, leaf in trees.flatten(head).items()}
  head_files.save(tmp_path / "head.safetensors", leaves, source="a test")
  config.segmentation.init.path = str(tmp_path / "head.safetensors")
  config.trainable = ("head/layers/0/.*",)
  config.adapters.kind = "linear"
  model = saved_runs.save_run(tmp_path / "run", config, classes)
  found = trained_head.load("segment", tmp_path / "run", prepare.Backbones())
  assert set(trees.flatten(found.trainable)) == set(trees.flatten(model.trainable))
  assert any(path.endswith("adapter/parallel/up/kernel") for path in trees.flatten(found.trainable))
  np.testing.assert_array_equal(
    trees.flatten(found.frozen)["head/layers/1/kernel"], leaves["head/layers/1/kernel"]
  )


def test_adapters_are_planned_as_they_train(images):
  config = _adapted(images)
  task = tasks_build.build_task(config)
  program = plan.make_program(task, config, sharding.make_mesh(devices=jax.devices()[:1]))
  model = loop.build_model(task, config)
  assert jax.tree.map(jnp.shape, program.state["trainable"]) == jax.tree.map(jnp.shape, model.trainable)
  assert plan.finetuned(config).adapters.kind == "none" and not program.frozen_pass
