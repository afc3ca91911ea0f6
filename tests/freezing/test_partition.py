"""Freezing is a partition: what it splits, what the compiled step computes, and what it never touches."""

import functools
import json
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.files import trees
from frozen_vision.freezing import partition as freeze
from frozen_vision.freezing import prepare
from frozen_vision.runs import state_leaves
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import loop, optimizer
from frozen_vision.training import step as train_step
from tests import tiny

_OPEN_END = ("backbone/stages/3/.*", "neck/.*", "head/.*")


class _Program:
  """The train step of a config with shapes for arrays: compiled, never run, and nothing allocated."""

  def __init__(self, config):
    config = tasks_build.read_config(config)
    self.task = task = tasks_build.build_task(config)
    model = prepare.prepare(
      functools.partial(nnx.eval_shape, task.build_model),
      nnx.eval_shape(lambda: prepare.open_source(config.backbone, config.seed)),
      trainable=tuple(config.trainable),
      storage=config.frozen_dtype,
      fold=config.backbone.fold,
    )
    self.graphdef, self.trainable, self.frozen = model.graphdef, model.trainable, model.frozen
    self.frozen_pass = model.frozen_pass
    self.tx = optimizer.build(
      config.optimizer, steps=config.steps, trainable=self.trainable, layer_of=model.layer_of
    )
    self.state = jax.eval_shape(
      lambda leaves: train_step.init_state(leaves, self.tx, seed=0, ema=True), self.trainable
    )
    with task.train_batches(0) as batches:
      self.batch = train_step.device_batch(next(batches))

  def forward(self, frozen, trainable, batch):
    return self.task.features(nnx.merge(self.graphdef, trainable, frozen), batch, None)

  def step(self, **options):
    return train_step.make_train_step(
      self.task, self.graphdef, self.tx, ema_decay=0.9, frozen_pass=self.frozen_pass, **options
    )


def _flops(function, *arguments):
  """Operations of the program that the compiler is given; it computes nothing that is not in there."""
  return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def _program(name, *, with_masks):
  config = tiny.detection()
  config.detection.head.with_masks = with_masks
  config.backbone.name = name
  config.backbone.overrides = {}
  return _Program(config)


@pytest.mark.parametrize("name, with_masks", [("swinv2_nano", True), ("swinv2_t", False)])
def test_no_gradient_of_a_frozen_leaf_is_computed(name, with_masks):
  program = _program(name, with_masks=with_masks)
  arguments = program.state, program.frozen, program.batch
  inputs = program.frozen, program.trainable, program.batch
  forward = _flops(program.forward, *inputs)
  step = _flops(program.step(), *arguments)
  features = jax.eval_shape(program.forward, *inputs)
  on_features = _flops(program.step(given_features=True), *arguments, features)
  assert 0.99 * forward <= step - on_features <= 1.01 * forward
  # A backbone that computes something: two operations per weight and position, at stride 32 at least.
  assert forward > 2 * freeze.num_bytes(program.frozen) / 4


@pytest.mark.slow
def test_the_compiled_step_returns_its_state_in_place_and_scalars():
  program = _program("swinv2_nano", with_masks=False)  # without masks it compiles faster
  arguments = program.state, program.frozen, program.batch
  step = jax.jit(program.step(), donate_argnums=0).lower(*arguments).compile()
  state, scalars = outputs = jax.eval_shape(program.step(), *arguments)

  def describe(tree):
    return state_leaves.describe(state_leaves.flatten(tree)[0])

  assert describe(state) == describe(program.state)
  assert not [path for path in describe(state) if "backbone" in path]
  assert all(leaf.shape == () for leaf in scalars.values())
  memory = step.memory_analysis()  # frozen weights are far larger than all that is returned
  assert memory.output_size_in_bytes <= freeze.num_bytes(outputs) + 64 * len(jax.tree.leaves(outputs))
  assert memory.alias_size_in_bytes >= freeze.num_bytes(state) - 8
  assert freeze.num_bytes(program.frozen) > 5 * memory.output_size_in_bytes


def test_an_open_backbone_costs_its_backward_pass(tmp_path):
  """The test above would see a gradient of the backbone if there were one."""
  folder = tiny.image_folder(tmp_path)
  config = tiny.classification(folder, folder)
  config.classification.image_size = 32
  config.backbone.fold = False  # so that the three differ in their backward pass only
  flops = {}
  for policy in (("head/.*",), ("head/.*", "backbone/stages/3/.*"), (".*",)):
    config.trainable = policy
    program = _Program(config)
    flops[policy] = _flops(program.step(), program.state, program.frozen, program.batch)
  forward = _flops(program.forward, program.frozen, program.trainable, program.batch)
  frozen, partly, fully = flops.values()
  assert partly > frozen + 0.05 * forward
  assert fully > frozen + 1.5 * forward


def _bits(state):
  return {path: np.array(leaf).tobytes() for path, leaf in trees.flatten(state).items()}


def _run(config, steps):
  """(frozen bits before, after, trainable before, after) of some train steps."""
  config = tasks_build.read_config(config)
  task = tasks_build.build_task(config)
  model = loop.build_model(task, config)
  tx = optimizer.build(
    config.optimizer, steps=config.steps, trainable=model.trainable, layer_of=model.layer_of
  )
  state = train_step.init_state(model.trainable, tx, seed=0, ema=False)
  step = jax.jit(
    train_step.make_train_step(task, model.graphdef, tx, frozen_pass=model.frozen_pass), donate_argnums=0
  )
  before = _bits(model.frozen), _bits(state["trainable"])
  with task.train_batches(0) as batches:
    for _ in range(steps):
      state, scalars = step(state, model.frozen, train_step.device_batch(next(batches)))
  assert np.isfinite(scalars["loss"])
  after = _bits(model.frozen), _bits(state["trainable"])
  return model, before[0], after[0], before[1], after[1]


def test_frozen_arrays_are_bit_equal_after_50_steps():
  config = tiny.detection()
  config.optimizer.learning_rate = 1e-2
  model, frozen, frozen_after, trainable, trainable_after = _run(config, 50)
  assert model.feature_key is not None
  assert frozen and all(path.startswith("backbone/") for path in frozen)
  assert trainable and all(path.startswith(("neck/", "head/")) for path in trainable)
  assert frozen == frozen_after
  same = [path for path in trainable if trainable[path] == trainable_after[path]]
  assert not same


@pytest.mark.slow
def test_a_partly_open_backbone_trains_exactly_what_is_open():
  config = tiny.detection()
  config.detection.head.with_masks = False  # without them it compiles faster
  config.trainable = _OPEN_END
  config.backbone.overrides.drop_path_rate = 0.5
  model, frozen, frozen_after, trainable, trainable_after = _run(config, 3)
  assert model.feature_key is None  # features are no longer frozen, so nothing identifies them
  pattern = re.compile("|".join(_OPEN_END))
  assert all(pattern.fullmatch(path) for path in trainable)
  assert not any(pattern.fullmatch(path) for path in frozen)
  assert {path.split("/")[0] for path in trainable} == {"backbone", "neck", "head"}
  assert frozen == frozen_after
  assert not [path for path in trainable if trainable[path] == trainable_after[path]]
  # Stochastic depth stays in what trains, and nowhere else.
  backbone = nnx.merge(model.graphdef, model.trainable, model.frozen).backbone
  rates = [[block.drop_path for block in stage.blocks] for stage in backbone.stages]
  assert rates[:3] == [[0.0]] * 3 and rates[3] == [0.5]


def test_partition_is_complete_and_merges_back():
  config = tiny.detection()
  task = tasks_build.build_task(config)
  abstract = nnx.eval_shape(task.build_model)
  names = set(trees.path_string(path) for path, _ in nnx.to_flat_state(nnx.state(abstract)))
  for policy in (("neck/.*", "head/.*"), _OPEN_END, (".*",), (".*/bias",)):
    model = nnx.eval_shape(task.build_model)
    graphdef, trainable, frozen = freeze.partition(model, policy)
    paths = [{trees.path_string(path) for path, _ in nnx.to_flat_state(part)} for part in (trainable, frozen)]
    assert not paths[0] & paths[1] and paths[0] | paths[1] == names
    assert all(any(re.fullmatch(pattern, path) for pattern in policy) for path in paths[0])
    merged = nnx.merge(graphdef, trainable, frozen)
    assert {trees.path_string(path) for path, _ in nnx.to_flat_state(nnx.state(merged))} == names
  assert prepare.backbone_is_frozen(freeze.partition(model, ("neck/.*",))[1])
  assert not prepare.backbone_is_frozen(freeze.partition(model, (".*/bias",))[1])


def test_a_pattern_that_matches_nothing_is_an_error():
  task = tasks_build.build_task(tiny.detection())
  model = nnx.eval_shape(task.build_model)
  with pytest.raises(ValueError, match=r"pattern 'nek/\.\*' matches no parameter; paths begin with"):
    freeze.partition(model, ("head/.*", "nek/.*"))
  with pytest.raises(ValueError, match="'backbone' matches no parameter"):  # whole paths
    freeze.partition(model, ("backbone",))


class _Layers(nnx.Module):
  def __init__(self):
    rngs = nnx.Rngs(0)
    self.body = nnx.Sequential(nnx.Linear(2, 2, rngs=rngs), nnx.Dropout(0.5))
    self.norm = nnx.BatchNorm(2, rngs=rngs)
    self.head = nnx.Linear(2, 2, rngs=rngs)


def test_what_is_no_parameter_stays_with_the_frozen_part():
  graphdef, trainable, frozen = freeze.partition(_Layers(), ("head/.*", "norm/.*"))
  assert set(trees.flatten(trainable)) == {"head/kernel", "head/bias", "norm/scale", "norm/bias"}
  assert {"norm/mean", "norm/var"} < set(trees.flatten(frozen))
  merged = nnx.merge(graphdef, trainable, frozen)
  assert merged.body.layers[1].deterministic


@pytest.mark.parametrize(
  "policy, mutable",
  [(("norm/.*", "head/.*"), {"norm/mean", "norm/var"}), (("head/.*",), set()), (("body/.*",), set())],
)
def test_statistics_change_where_their_norm_trains(policy, mutable):
  graphdef, trainable, rest = freeze.partition(_Layers(), policy)
  found, frozen = freeze.split_mutable(trainable, rest)
  assert set(trees.flatten(found)) == mutable
  assert set(trees.flatten(frozen)) == set(trees.flatten(rest)) - mutable
  merged = nnx.merge(graphdef, trainable, found, frozen)
  assert merged.norm.use_running_average is (not mutable)


def test_a_teacher_never_trains():
  model = _Layers()
  model.teacher = _Layers()
  graphdef, trainable, frozen = freeze.partition(model, (".*",))
  assert not [path for path in trees.flatten(trainable) if path.startswith("teacher/")]
  assert "teacher/head/kernel" in trees.flatten(frozen)
  mutable, _ = freeze.split_mutable(trainable, frozen)
  assert set(trees.flatten(mutable)) == {"norm/mean", "norm/var"}
  assert nnx.merge(graphdef, trainable, frozen).teacher.norm.use_running_average
  with pytest.raises(ValueError, match="matches no parameter"):
    freeze.partition(model, ("teacher/.*",))


def test_cast_and_size():
  state = nnx.state(_Layers(), nnx.Param)
  half = freeze.cast(state, jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
  assert freeze.num_bytes(state) == 4 * (6 + 4 + 6) == 2 * freeze.num_bytes(half)
  integers = nnx.State({"a": jnp.arange(3)})
  assert freeze.cast(integers, jnp.bfloat16)["a"].dtype == jnp.int32


def test_checkpoints_hold_no_frozen_leaf(tmp_path):
  config = tiny.segmentation()
  config.steps = config.checkpoint_every = 2
  loop.train(config, tmp_path)
  model = loop.build_model(tasks_build.build_task(config), config)
  trainable = set(trees.flatten(model.trainable))
  for folder in ("checkpoints/2", "best/2"):
    record = json.loads((tmp_path / folder / "meta" / "metadata").read_text())
    paths = set(record["leaves"])
    assert not [path for path in paths if "backbone" in path]
    assert "backbone" not in (tmp_path / folder / "state" / "_METADATA").read_text()
    for part in ("trainable", "ema"):
      assert {path for path in paths if path.startswith(part)} == {f"{part}/{path}" for path in trainable}
    assert record["meta"]["feature_key"]["weights"] == model.feature_key["weights"]
