"""The compiled programs of a run: a train step for each phase, a prediction for each evaluation."""

from collections.abc import Callable, Mapping
import logging
import time
from typing import Any

import jax
import optax

from frozen_vision.config import Config
from frozen_vision.devices import sharding
from frozen_vision.freezing import prepare
from frozen_vision.tasks import base
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
  batch: base.Batch,
  mesh: jax.sharding.Mesh,
) -> dict[Any, Callable[..., tuple[step_lib.State, step_lib.Scalars]]]:
  """{phase: train step}, compiled before the first one runs.

  Args:
    layout: shardings of `state`, which every step keeps.
    batch: any batch of this process.
  """
  started = time.perf_counter()
  steps, flops = {}, 0.0
  for phase in task.phases:
    train_step = step_lib.make_train_step(
      task,
      model.graphdef,
      tx,
      phase=phase,
      accumulate=config.accumulate,
      ema_decay=config.ema_decay,
      frozen_pass=model.frozen_pass,
    )
    lowered = jax.jit(train_step, donate_argnums=0, out_shardings=(layout, sharding.replicated(mesh))).lower(
      state, model.frozen, sharding.put_batch(step_lib.device_batch(batch), mesh)
    )
    steps[phase] = lowered.compile()
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
  task: base.Task, model: prepare.Model, state: step_lib.State, mesh: jax.sharding.Mesh
) -> dict[str, Predict]:
  """{evaluation: prediction}, compiled; evaluations with batches of the same shapes share a program."""
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
        evaluated(state), state["mutable"], model.frozen, sharding.put_batch(example, mesh)
      )
      programs[key] = lowered.compile()
    program = programs[key]

    def predict(state: step_lib.State, batch: base.Batch) -> base.Outputs:
      placed = sharding.put_batch(step_lib.device_batch(batch), mesh)
      return program(evaluated(state), state["mutable"], model.frozen, placed)

    return predict

  predictions = {name: compiled(evaluation) for name, evaluation in task.evaluations.items()}
  _logger.info("Compiled %d predictions in %.1f s.", len(programs), time.perf_counter() - started)
  return predictions


def evaluated(state: Mapping[str, Any]) -> Any:
  """The parameters that are evaluated: the average, where there is one."""
  return state.get("ema", state.get("trainable"))
