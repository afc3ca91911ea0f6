"""The state of the train step: what it holds, and checkpoints from before it had mutable parts."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frozen_vision.freezing import partition
from frozen_vision.runs import checkpoints as checkpoint
from frozen_vision.runs import workdir as workdir_lib
from frozen_vision.tasks import base
from frozen_vision.training import programs
from frozen_vision.training import step as step_lib


class _Normed(nnx.Module):
  """A BatchNorm and a layer that train on the batch itself."""

  def __init__(self):
    rngs = nnx.Rngs(0)
    self.norm = nnx.BatchNorm(2, momentum=0.5, rngs=rngs)
    self.layer = nnx.Linear(2, 1, rngs=rngs)


class _Task:
  """As much of a task as the train step needs; its own state counts examples."""

  def prepare(self, batch, rng, phase):
    return batch

  def features(self, model, batch, rng):
    return (batch["x"],)

  def loss(self, model, batch, features, rng, state):
    values = model.layer(model.norm(features[0]))
    return base.Losses({"square": jnp.mean(values**2)}, {}, state + len(features[0]))


def _parts(policy=(".*",)):
  return partition.split(_Normed(), policy)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_statistics_and_the_tasks_own_state_pass_from_step_to_step(accumulate):
  graphdef, trainable, mutable, frozen = _parts()
  tx = optax.sgd(0.0)
  state = step_lib.init_state(trainable, tx, seed=0, ema=False, mutable=mutable, task_state=jnp.int32(0))
  step = jax.jit(step_lib.make_train_step(_Task(), graphdef, tx, accumulate=accumulate, frozen_pass=False))
  x = np.array([[1, 2], [3, 6], [5, 10], [7, 14]], np.float32)
  mean = np.zeros(2)
  for _ in range(2):
    state, _ = step(state, frozen, {"x": x})
    for part in range(accumulate):  # each micro-batch has every so many-th example
      mean = 0.5 * mean + 0.5 * x[part::accumulate].mean(0)
  np.testing.assert_allclose(state["mutable"]["norm"]["mean"][...], mean, rtol=1e-6)
  assert int(state["task"]) == 8


@pytest.mark.parametrize("accumulate", [1, 2])
def test_given_features_take_the_place_of_computed_ones(accumulate):
  graphdef, trainable, mutable, frozen = _parts()
  tx = optax.sgd(0.1)
  x = np.array([[1, 2], [3, 6], [5, 10], [7, 14]], np.float32)
  results = []
  for given in (False, True):
    state = step_lib.init_state(trainable, tx, seed=0, ema=False, mutable=mutable, task_state=jnp.int32(0))
    step = step_lib.make_train_step(
      _Task(), graphdef, tx, accumulate=accumulate, frozen_pass=True, given_features=given
    )
    batch = {"x": x if not given else np.zeros_like(x)}
    results.append(jax.jit(step)(state, frozen, batch, *([(x,)] if given else [])))
  states = [(state["trainable"], state["mutable"], scalars) for state, scalars in results]
  jax.tree.map(np.testing.assert_array_equal, *states)
  with pytest.raises(TypeError, match="give it the features"):
    step(state, frozen, batch)


def test_statistics_are_averaged_with_the_parameters_that_they_belong_to(tmp_path):
  graphdef, trainable, mutable, frozen = _parts()
  tx = optax.sgd(0.0)
  state = step_lib.init_state(trainable, tx, seed=0, ema=True, mutable=mutable, task_state=jnp.int32(0))
  step = jax.jit(step_lib.make_train_step(_Task(), graphdef, tx, ema_decay=0.15, frozen_pass=False))
  x = np.array([[1, 2], [3, 6]], np.float32)
  newest = average = np.zeros(2)
  for decay in (0.1, 0.15):  # (1 + 0) / (10 + 0), then 0.15 < (1 + 1) / (10 + 1)
    state, _ = step(state, frozen, {"x": x})
    newest = 0.5 * newest + 0.5 * x.mean(0)
    average = decay * average + (1 - decay) * newest
  evaluated = programs.evaluated(state)
  np.testing.assert_allclose(evaluated[1]["norm"]["mean"][...], average, rtol=1e-6)
  assert evaluated[0] is state["ema"] and not np.allclose(average, newest)
  meta = workdir_lib.make_meta(config={}, feature_key=None, examples=0)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {name: part for name, part in state.items() if name != "ema_mutable"}, meta)
    checkpoints.save(2, state, meta)
    for at, wanted in ((1, newest), (2, average)):  # 1: as runs were saved before
      _, found, _ = checkpoints.restore_evaluated(trainable, mutable, averaged=True, step=at)
      np.testing.assert_allclose(found["norm"]["mean"][...], wanted, rtol=1e-6)


class _Counting(_Normed):
  """Counts its batches too."""

  def __init__(self):
    super().__init__()
    self.batches = nnx.BatchStat(jnp.int32(0))


class _CountingTask(_Task):
  def loss(self, model, batch, features, rng, state):
    model.batches[...] += 1
    return super().loss(model, batch, features, rng, state)


def test_a_count_is_not_averaged():
  graphdef, trainable, mutable, frozen = partition.split(_Counting(), (".*",))
  tx = optax.sgd(0.0)
  state = step_lib.init_state(trainable, tx, seed=0, ema=True, mutable=mutable, task_state=jnp.int32(0))
  step = jax.jit(step_lib.make_train_step(_CountingTask(), graphdef, tx, ema_decay=0.5, frozen_pass=False))
  program = step.lower(state, frozen, {"x": np.ones((2, 2), np.float32)}).compile()
  for _ in range(3):
    state, _ = program(state, frozen, {"x": np.ones((2, 2), np.float32)})
  count = programs.evaluated(state)[1]["batches"][...]
  assert count == 3 and count.dtype == jnp.int32


def test_a_norm_that_is_frozen_keeps_its_statistics():
  graphdef, trainable, mutable, frozen = _parts(("layer/.*",))
  assert not jax.tree.leaves(mutable)
  tx = optax.sgd(0.0)
  state = step_lib.init_state(trainable, tx, seed=0, ema=False, mutable=mutable, task_state=jnp.int32(0))
  step = jax.jit(step_lib.make_train_step(_Task(), graphdef, tx, frozen_pass=False))
  x = np.array([[1, 2], [3, 6]], np.float32)
  _, scalars = step(state, frozen, {"x": x})
  layer = _Normed().layer
  np.testing.assert_allclose(scalars["loss"], jnp.mean(layer(x / np.sqrt(1 + 1e-5)) ** 2), rtol=1e-5)


def test_a_checkpoint_from_before_mutable_state_continues_where_the_model_has_none(tmp_path):
  tx = optax.adam(1e-3)
  _, trainable, mutable, _ = _parts(("layer/.*",))
  state = step_lib.init_state(trainable, tx, seed=3, ema=True, mutable=mutable)
  old = {name: value for name, value in state.items() if name not in ("mutable", "task")}
  meta = workdir_lib.make_meta(config={}, feature_key=None, examples=0)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, old, meta)
    found, _ = checkpoints.restore(state)
    assert found.keys() == state.keys()
    for a, b in zip(jax.tree.leaves(found["trainable"]), jax.tree.leaves(state["trainable"]), strict=True):
      np.testing.assert_array_equal(a, b)
    # One that has statistics is told which are missing.
    _, trainable, mutable, _ = _parts()
    with pytest.raises(ValueError, match="missing mutable/norm/mean"):
      checkpoints.restore({"trainable": state["trainable"], "mutable": mutable}, partial=True)
