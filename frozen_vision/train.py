"""The one training loop."""

import collections
import dataclasses
import logging
import math
import pathlib
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from frozen_vision import checkpoint
from frozen_vision import curves
from frozen_vision import evaluate as evaluate_lib
from frozen_vision import fold
from frozen_vision import freeze
from frozen_vision import optimizer as optimizer_lib
from frozen_vision import run_log
from frozen_vision import train_step as step_lib
from frozen_vision.backbones import build
from frozen_vision.tasks import base
from frozen_vision.tasks import build as tasks_build

_logger = logging.getLogger(__name__)

# Options that may differ between a run and its continuation: they change no number.
_FREE_OPTIONS = (
    "log_every", "eval_every", "eval_batch_size", "checkpoint_every", "keep_checkpoints", "pictures",
    "tensorboard", "loader.*")


@dataclasses.dataclass(frozen=True)
class Model:
  """A task's model in parts.

  Attributes:
    graphdef: its structure; `nnx.merge(graphdef, trainable, frozen)` gives the module.
    trainable: what the optimizer sees.
    frozen: what nothing changes.
    feature_key: identifies the frozen features; None where some of the backbone trains.
    frozen_parameters: how many numbers are frozen in the canonical model, before folding.
    held_as: how the frozen ones are held, in words.
  """

  graphdef: nnx.GraphDef
  trainable: nnx.State
  frozen: nnx.State
  feature_key: dict[str, Any] | None
  frozen_parameters: int
  held_as: str

  @property
  def frozen_pass(self) -> bool:
    return self.feature_key is not None


def build_model(task: base.Task, config: ml_collections.ConfigDict) -> Model:
  """Builds a task's model with its weights and splits it by `config.trainable`.

  A wholly frozen backbone is folded, unless `config.backbone.fold` is off. Patterns and fingerprint are those
  of the backbone as it was before.

  Raises:
    ValueError: a pattern that matches nothing; a `frozen_dtype` that is unknown, or that asks for folding
      where it is off or something of the backbone trains.
  """
  module, patterns = task.build_model(), tuple(config.trainable)
  graphdef, trainable, frozen = freeze.partition(module, patterns)
  parameters = sum(leaf.size for leaf in jax.tree.leaves(frozen))
  held_as, key = config.frozen_dtype, None
  if held_as not in fold.HELD_AS:
    raise ValueError(f"config.frozen_dtype is {held_as!r}; known: {', '.join(fold.HELD_AS)}.")
  is_frozen = step_lib.backbone_is_frozen(trainable)
  folded = is_frozen and config.backbone.fold
  if is_frozen:
    key = build.feature_key(module.backbone, freeze.fingerprint(nnx.state(module.backbone, nnx.Param)))
    # Rounded, norms and position biases of a module are others than those that folding keeps in float32.
    key["held_as"] = held_as if folded or held_as == "float32" else f"{held_as}, unfolded"
  if folded:
    module.backbone = nnx.data(fold.fold(module.backbone, held_as=held_as))
    graphdef, trainable, frozen = freeze.partition(module, patterns)
  elif held_as == "int8":
    raise ValueError(
        "config.frozen_dtype=int8 is for a folded backbone: nothing of it may match config.trainable, and "
        "config.backbone.fold must be on. Take bfloat16 otherwise.")
  else:
    frozen = freeze.cast(frozen, jnp.dtype(held_as))
  return Model(
      graphdef, trainable, frozen, key, parameters, f"{held_as}, {'folded' if folded else 'as they train'}")


def train(config: ml_collections.ConfigDict, workdir: str) -> dict[str, float]:
  """Trains, evaluates, draws, and leaves everything in `workdir`; continues what it finds there.

  Args:
    config: as `frozen_vision.config.base_config`, with the task's section.
    workdir: holds `config.json`, `metrics.jsonl`, `checkpoints/`, `best/`, `pictures/`, curves, TensorBoard
      events and the task's results.

  Returns:
    The last evaluation's metrics; empty if the run was interrupted before one.

  Raises:
    ValueError: a config that does not fit, a workdir of another config.
    FloatingPointError: a loss that is not finite.
  """
  task = tasks_build.build_task(config)
  _logger.info("%s%s", config.headline and config.headline + "\n", task.headline)
  if config.batch_size % config.accumulate:
    raise ValueError(
        f"batch_size {config.batch_size} is not a multiple of accumulate {config.accumulate}.")
  folder = pathlib.Path(workdir)
  checkpoint.claim_workdir(folder, config.to_dict(), ignore=_FREE_OPTIONS, is_writer=False)
  model = build_model(task, config)
  tx = optimizer_lib.build(
      config.optimizer, steps=config.steps, trainable=model.trainable,
      layer_of=task.layer_of)
  rate = jax.jit(optimizer_lib.schedule(config.optimizer, config.steps))
  state = step_lib.init_state(model.trainable, tx, seed=config.seed, ema=config.ema_decay > 0)
  _describe(model, state)

  with (
      checkpoint.Checkpoints(
          folder, keep=config.keep_checkpoints, best_metric=task.best_metric) as checkpoints,
      run_log.RunLog(folder, tensorboard=config.tensorboard) as log,
      run_log.compile_counter() as compilations,
      run_log.StopSignal() as stop,
  ):
    start = 0
    if checkpoints.latest_step() is not None:
      checkpoint.check_feature_key(checkpoints.read_meta()["feature_key"], model.feature_key)
      state, meta = checkpoints.restore(state)
      start = meta["step"]
      _logger.info("Continuing from step %d in %s.", start, folder)
    if start >= config.steps:
      if not (folder / "curves_train.png").exists():  # the run was killed just before it drew them
        curves.plot_curves(folder / "metrics.jsonl", folder / "curves.png")
      _logger.info("All %d steps are done; --mode=evaluate evaluates again.", config.steps)
      return {}
    log.resume_from(start or None)

    def save(step: int, metrics: dict[str, float] | None = None) -> None:
      _check_finite(jax.device_get(pending), step)
      meta = checkpoint.make_meta(
          config=config.to_dict(), feature_key=model.feature_key, examples=step * config.batch_size)
      if metrics is None:
        checkpoints.save(step, state, meta)
      elif task.best_metric in metrics:
        kept = {name: state[name] for name in ("trainable", "ema") if name in state}
        checkpoints.save_best(step, kept, meta, metrics)

    with task.train_batches(start * config.batch_size) as batches:
      batch = next(batches)
      steps, predict = _compile(task, model, tx, config, state, batch)
      rate(start)  # compiled now too, though logged later
      # Only now, so that a config that cannot run does not keep the workdir from the one that can.
      checkpoint.claim_workdir(folder, config.to_dict(), ignore=_FREE_OPTIONS)
      progress = run_log.Progress(config.steps, config.batch_size, start_step=start)
      metrics: dict[str, float] = {}
      first_evaluation, pending = None, []
      for step in range(start, config.steps):
        state, scalars = steps[task.phase_at(step)](state, model.frozen, step_lib.device_batch(batch))
        pending.append(scalars)
        done = step + 1
        if done < config.steps:
          with progress.waiting():
            batch = next(batches)
        if step == start:
          jax.block_until_ready(scalars)
        progress.step_done(done)
        if done % config.log_every == 0 or done == config.steps:
          pending = jax.device_get(pending)
          _check_finite(pending, done)
          values, pending = _mean(pending), []
          rates = progress.rates()
          _logger.info("%s", progress.line(values["loss"], rates))
          with progress.pause():  # the first write imports TensorFlow
            log.scalars(done, {
                **{f"train/{name}": value for name, value in values.items()},
                "train/learning_rate": float(rate(step)),
                **{f"speed/{name}": value for name, value in rates.items()},
            })
        finished = done == config.steps
        evaluates = finished or (config.eval_every and done % config.eval_every == 0)
        saves = finished or stop.requested or done % config.checkpoint_every == 0
        if evaluates or saves:
          jax.block_until_ready(scalars)  # so that no pause holds a step's time
        if evaluates:
          with progress.pause():
            metrics = _evaluate(task, predict, model, state, config, folder, log, done)
            save(done, metrics)
          if first_evaluation is None:
            first_evaluation = compilations.mark()
        if saves:
          with progress.pause():
            save(done)
        if saves and stop.requested and not finished:
          _logger.warning(
              "Stopped by %s; step %d is saved and the same command continues.", stop.signal_name, done)
          return metrics
    late = compilations.since(first_evaluation)
    log.scalars(config.steps, {"compilations/after_first_evaluation": len(late)})
    if late:
      _logger.warning("After the first evaluation %s", compilations.report(first_evaluation))
    checkpoints.wait()
  curves.plot_curves(folder / "metrics.jsonl", folder / "curves.png")
  _logger.info("Everything is in %s.", folder)
  return metrics


def evaluate(config: ml_collections.ConfigDict, workdir: str) -> dict[str, float]:
  """Evaluates the newest checkpoint of a workdir: the trained part is all that it needs to hold.

  Raises:
    FileNotFoundError: no checkpoint there.
    ValueError: a checkpoint of other features or of another model.
  """
  task = tasks_build.build_task(config)
  _logger.info("%s%s", config.headline and config.headline + "\n", task.headline)
  folder = pathlib.Path(workdir)
  model = build_model(task, config)
  weights = "ema" if config.ema_decay > 0 else "trainable"
  with (
      checkpoint.Checkpoints(folder) as checkpoints,
      run_log.RunLog(folder, tensorboard=config.tensorboard) as log,
  ):
    meta = checkpoints.read_meta()
    checkpoint.check_feature_key(meta["feature_key"], model.feature_key)
    state, meta = checkpoints.restore({weights: model.trainable}, partial=True)
    _logger.info("Evaluating step %d of %s.", meta["step"], folder)
    predict = jax.jit(step_lib.make_predict_step(task, model.graphdef, frozen_pass=model.frozen_pass))
    return _evaluate(task, predict, model, state, config, folder, log, meta["step"])


def _describe(model: Model, state: step_lib.State) -> None:
  """Says what trains and what does not."""
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6
  _logger.info(
      "Parameters: %.2f M train, %.2f M are frozen (%.1f MB held as %s); optimizer and averages %.1f MB.",
      count(model.trainable), model.frozen_parameters / 1e6, freeze.num_bytes(model.frozen) / 1e6,
      model.held_as,
      freeze.num_bytes([state["opt_state"], state.get("ema")]) / 1e6)


def _compile(
    task: base.Task, model: Model, tx: Any, config: ml_collections.ConfigDict, state: step_lib.State,
    batch: base.Batch,
) -> tuple[dict[Any, Any], Any]:
  """All programs of the run, before the first step: {phase: train step}, and the prediction."""
  started = time.perf_counter()
  steps, flops = {}, 0.0
  for phase in task.phases:
    train_step = step_lib.make_train_step(
        task, model.graphdef, tx, phase=phase, accumulate=config.accumulate,
        ema_decay=config.ema_decay, frozen_pass=model.frozen_pass)
    lowered = jax.jit(train_step, donate_argnums=0).lower(
        state, model.frozen, step_lib.device_batch(batch))
    steps[phase] = lowered.compile()
    flops = (steps[phase].cost_analysis() or {}).get("flops", 0.0)
  with task.eval_batches() as batches:
    example = next(batches)
  predict_step = step_lib.make_predict_step(task, model.graphdef, frozen_pass=model.frozen_pass)
  predict = jax.jit(predict_step).lower(
      _evaluated(state), model.frozen, step_lib.device_batch(example)).compile()
  _logger.info(
      "Compiled %d programs in %.1f s; a training step is %.1f GFLOP by the compiler's count (a scanned "
      "body counts once).", len(steps) + 1, time.perf_counter() - started, flops / 1e9)
  return steps, predict


def _evaluated(state: step_lib.State) -> nnx.State:
  """The parameters that are evaluated: the average, where there is one."""
  return state.get("ema", state.get("trainable"))


def _mean(pending: list[dict[str, np.ndarray]]) -> dict[str, float]:
  """Means of the scalars since the last line."""
  values = collections.defaultdict(list)
  for scalars in pending:
    for name, value in scalars.items():
      values[name].append(float(value))
  return {name: float(np.mean(value)) for name, value in values.items()}


def _check_finite(pending: list[dict[str, np.ndarray]], step: int) -> None:
  """Stops a run that has failed, before its state is saved.

  Raises:
    FloatingPointError: a loss or a gradient is not finite; names the terms that are not.
  """
  for scalars in pending:
    if not math.isfinite(scalars["loss"]) or not math.isfinite(scalars["grad_norm"]):
      bad = sorted(name for name, value in scalars.items() if not math.isfinite(value))
      raise FloatingPointError(
          f"Not finite before step {step}: {bad}. The last checkpoint is from before; lower "
          "optimizer.learning_rate or set optimizer.clip_norm.")


def _evaluate(
    task: base.Task, predict: Any, model: Model, state: step_lib.State,
    config: ml_collections.ConfigDict, folder: pathlib.Path, log: run_log.RunLog, step: int,
) -> dict[str, float]:
  """Evaluates, writes results and pictures, and says the metrics."""
  parameters = _evaluated(state)
  metrics, pictures, evaluator = evaluate_lib.evaluate(
      task, lambda batch: predict(parameters, model.frozen, batch), num_pictures=config.pictures)
  task.write_results(evaluator, folder)
  log.scalars(step, {f"eval/{name}": value for name, value in metrics.items()})
  log.images(step, pictures)
  _logger.info(
      "Evaluation at step %d: %s", step,
      "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
  return metrics
