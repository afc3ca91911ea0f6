"""The compiled programs of a run: a train step for each phase, a prediction for each evaluation."""

from collections.abc import Callable, Mapping, MutableMapping
import logging
import time
from typing import Any

from flax import nnx
import jax
import optax

from frozen_vision.config import Config
from frozen_vision.devices import sharding
from frozen_vision.freezing import cache, prepare
from frozen_vision.tasks import base
from frozen_vision.training import feature_store, feeds
from frozen_vision.training import step as step_lib

_logger = logging.getLogger(__name__)

# (what is evaluated of a state, batch of this process) -> predictions on the devices
Predict = Callable[[step_lib.State, base.Batch], base.Outputs]


def compile_steps(
  task: base.Task,
  model: prepare.Model,
  tx: optax.GradientTransformation,
  config: Config,
  state: step_lib.State,
  layout: Any,
  feed: feeds.Feed,
  batch: base.Batch,
  mesh: jax.sharding.Mesh,
) -> dict[Any, Callable[..., tuple[step_lib.State, step_lib.Scalars]]]:
  """{phase: train step}, compiled before the first one runs.

  Args:
    layout: shardings of `state`, which every step keeps.
    feed: of the batches. Where it has features, steps take them.
    batch: any batch of this process.

  Raises:
    CacheError: a loss that reads pixels, which a feed with features does not have.
  """
  store, inputs = feed.store, feed.inputs(batch)
  started = time.perf_counter()
  steps, flops = {}, 0.0
  for phase in task.phases:
    train_step = step_lib.make_train_step(
      task,
      model.graphdef,
      tx,
      phase=phase,
      accumulate=config.accumulate,
      ema_decay=task.average_decay or config.ema_decay,
      averaged_teacher=task.averaged_teacher,
      frozen_pass=model.frozen_pass,
      given_features=store is not None,
    )
    if store is not None:
      train_step = feature_store.restoring(train_step, store)
    arguments = state, model.frozen, *inputs
    traced = jax.jit(train_step, donate_argnums=0, out_shardings=(layout, sharding.replicated(mesh))).trace(
      *arguments
    )
    if store is not None and not store.check_unread(traced, arguments, batch=2):
      raise cache.CacheError(
        f"The loss of {type(task).__name__} reads the pixels beside the features, so training cannot do with "
        "cached features. Set --config.cache.views=0."
      )
    steps[phase] = traced.lower().compile()
    flops = (steps[phase].cost_analysis() or {}).get("flops", 0.0)
  _logger.info(
    "Compiled %d training programs in %.1f s; a training step is %.1f GFLOP by the compiler's count (a "
    "scanned body counts once).",
    len(steps),
    time.perf_counter() - started,
    flops / 1e9,
  )
  return steps


def compile_predictions(
  task: base.Task,
  model: prepare.Model,
  state: step_lib.State,
  mesh: jax.sharding.Mesh,
  cached: MutableMapping[str, feeds.CachedEvaluation] | None = None,
) -> dict[str, Predict]:
  """{evaluation: prediction}, compiled; evaluations with batches of the same shapes share a program.

  Args:
    cached: evaluations whose batches have features. Those whose predictions read pixels, too, are taken out.
  """
  started = time.perf_counter()
  programs: dict[Any, Any] = {}

  def compiled(evaluation: base.Evaluation) -> Predict:
    with evaluation.batches() as batches:
      example = step_lib.device_batch(next(batches))
    shapes = tuple(sorted((name, value.shape, str(value.dtype)) for name, value in example.items()))
    key = shapes, evaluation.largest_size
    if key not in programs:
      step = step_lib.make_predict_step(task, model.graphdef, evaluation.largest_size)
      lowered = jax.jit(step, out_shardings=sharding.batch_sharding(mesh)).lower(
        *evaluated(state), model.frozen, sharding.put_batch(example, mesh)
      )
      programs[key] = lowered.compile()
    program = programs[key]

    def predict(state: step_lib.State, batch: base.Batch) -> base.Outputs:
      placed = sharding.put_batch(step_lib.device_batch(batch), mesh)
      return program(*evaluated(state), model.frozen, placed)

    return predict

  def compiled_on_features(name: str) -> Predict | None:
    store = cached[name].store
    step = feature_store.restoring(
      step_lib.make_predict_step(task, model.graphdef, task.evaluations[name].largest_size), store
    )
    arguments = *evaluated(state), model.frozen, *store.inputs()
    traced = jax.jit(step, out_shardings=sharding.batch_sharding(mesh)).trace(*arguments)
    if not store.check_unread(traced, arguments, batch=3):
      return None
    program = programs[name] = traced.lower().compile()

    def predict(state: step_lib.State, batch: base.Batch) -> base.Outputs:
      return program(*evaluated(state), model.frozen, *store.place(batch))

    return predict

  predictions = {}
  for name, evaluation in task.evaluations.items():
    found = compiled_on_features(name) if cached and name in cached else None
    if found is None and cached:
      cached.pop(name, None)
    predictions[name] = found or compiled(evaluation)
  _logger.info("Compiled %d predictions in %.1f s.", len(programs), time.perf_counter() - started)
  return predictions


def evaluated(state: Mapping[str, Any]) -> tuple[nnx.State, nnx.State]:
  """(parameters, mutable variables) that are evaluated: the averages, where there are some."""
  if "ema" in state:
    return state["ema"], state["ema_mutable"]
  return state["trainable"], state["mutable"]
