"""The one training loop."""

import collections
from collections.abc import Callable
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

from frozen_vision.backbones import families as backbones_build
from frozen_vision.devices import processes as distributed
from frozen_vision.devices import sharding
from frozen_vision.files import trees
from frozen_vision.freezing import feature_key
from frozen_vision.freezing import partition as freeze
from frozen_vision.layers import storage as stored
from frozen_vision.runs import checkpoints as checkpoint
from frozen_vision.runs import curves
from frozen_vision.runs import log as run_log
from frozen_vision.tasks import base, common
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import evaluation as evaluate_lib
from frozen_vision.training import optimizer as optimizer_lib
from frozen_vision.training import step as step_lib

_logger = logging.getLogger(__name__)

# Options that may differ between a run and its continuation: they change no number.
_FREE_OPTIONS = (
  "log_every",
  "eval_every",
  "eval_batch_size",
  "checkpoint_every",
  "keep_checkpoints",
  "pictures",
  "tensorboard",
  "loader.*",
  "mesh.*",
)


@dataclasses.dataclass(frozen=True)
class Model:
  """A task's model in parts.

  Attributes:
    graphdef: its structure; `nnx.merge(graphdef, trainable, frozen)` gives the module.
    trainable: what the optimizer sees.
    frozen: what nothing changes.
    feature_key: identifies the frozen features; None where some of the backbone trains.
    frozen_parameters: how many numbers are frozen in the canonical model, before folding.
    storage: how the frozen ones are stored, in words.
  """

  graphdef: nnx.GraphDef
  trainable: nnx.State
  frozen: nnx.State
  feature_key: dict[str, Any] | None
  frozen_parameters: int
  storage: str

  @property
  def frozen_pass(self) -> bool:
    return self.feature_key is not None


def build_model(
  task: base.Task, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh | None = None
) -> Model:
  """Builds a task's model with its weights and splits it by `config.trainable`.

  A wholly frozen backbone is folded, unless `config.backbone.fold` is off. Patterns and fingerprint are those
  of the backbone as it was before. One that lies in a file of ours is read, folded and spread block by block:
  it is never whole in one place.

  Args:
    mesh: where the weights go; None leaves them on the default device.

  Raises:
    ValueError: a pattern that matches nothing; a `frozen_dtype` that is unknown, or that asks for folding
      where it is off or something of the backbone trains.
  """
  patterns, source = tuple(config.trainable), common.open_backbone(config)
  on_disk = isinstance(source, backbones_build.BackboneFile)
  module = task.build_model(source.module if on_disk else source)
  graphdef, trainable, frozen = freeze.partition(module, patterns)
  parameters = sum(leaf.size for leaf in jax.tree.leaves(frozen))
  storage, key = config.frozen_dtype, None
  stored.check(storage, "config.frozen_dtype")
  is_frozen = step_lib.backbone_is_frozen(trainable)
  folded = is_frozen and config.backbone.fold
  if on_disk and not (folded and source.fingerprint):
    module.backbone, on_disk = source.load(), False
    graphdef, trainable, frozen = freeze.partition(module, patterns)
  if is_frozen:
    fingerprint = source.fingerprint if on_disk else freeze.fingerprint(trees.weights(module.backbone))
    key = feature_key.feature_key(module.backbone, fingerprint, storage=storage, folded=folded)
  if folded:
    canonical = module.backbone
    if on_disk:
      module.backbone = nnx.data(stored.shapes(canonical, storage=storage))
      graphdef, trainable, frozen = freeze.partition(module, patterns)
      where = sharding.frozen_shardings(
        frozen, mesh or sharding.make_mesh(devices=jax.local_devices()[:1]), config.mesh.frozen
      )
      shardings = nnx.merge(graphdef, trainable, where).backbone
      module.backbone = nnx.data(canonical.fold(storage=storage, read=source.read, shardings=shardings))
      source.check()
    else:
      module.backbone = nnx.data(canonical.fold(storage=storage))
    graphdef, trainable, frozen = freeze.partition(module, patterns)
  elif storage == "int8":
    raise ValueError(
      "config.frozen_dtype=int8 is for a folded backbone: nothing of it may match config.trainable, and "
      "config.backbone.fold must be on. Take bfloat16 otherwise."
    )
  else:
    frozen = freeze.cast(frozen, jnp.dtype(storage))
  model = Model(
    graphdef, trainable, frozen, key, parameters, f"{storage}, {'folded' if folded else 'as they train'}"
  )
  return model if mesh is None else _place(model, mesh, config.mesh.frozen)


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
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.model)
  sharding.check_batch(config.batch_size, mesh, "batch_size", config.accumulate)
  sharding.check_batch(config.eval_batch_size, mesh, "eval_batch_size")
  folder, is_writer = pathlib.Path(workdir), jax.process_index() == 0
  checkpoint.claim_workdir(folder, config.to_dict(), ignore=_FREE_OPTIONS, is_writer=False)
  model = build_model(task, config, mesh)
  tx = optimizer_lib.build(
    config.optimizer, steps=config.steps, trainable=model.trainable, layer_of=task.layer_of
  )
  rate = jax.jit(optimizer_lib.schedule(config.optimizer, config.steps))
  state = step_lib.init_state(model.trainable, tx, seed=config.seed, ema=config.ema_decay > 0)
  layout = sharding.state_shardings(state, mesh, config.mesh.frozen)
  state = sharding.put(state, layout)
  _describe(model, state, mesh)

  with (
    jax.set_mesh(mesh),
    checkpoint.Checkpoints(folder, keep=config.keep_checkpoints, best_metric=task.best_metric) as checkpoints,
    run_log.RunLog(folder, tensorboard=config.tensorboard, is_writer=is_writer) as log,
    run_log.compile_counter() as compilations,
    run_log.StopSignal() as stop,
  ):
    start = 0
    if checkpoints.latest_step() is not None:
      checkpoint.check_feature_key(
        feature_key.current(checkpoints.read_meta()["feature_key"]), model.feature_key
      )
      state, meta = checkpoints.restore(state)
      start = meta["step"]
      _logger.info("Continuing from step %d in %s.", start, folder)
    if start >= config.steps:
      # Without them the run was killed just before it drew them; without metrics only checkpoints were kept.
      if is_writer and (folder / "metrics.jsonl").exists() and not (folder / "curves_train.png").exists():
        curves.plot_curves(folder / "metrics.jsonl", folder / "curves.png")
      _logger.info("All %d steps are done; --mode=evaluate evaluates again.", config.steps)
      return {}
    log.resume_from(start or None)

    def save(step: int, metrics: dict[str, float] | None = None) -> None:
      _check_finite(jax.device_get(pending), step)
      meta = checkpoint.make_meta(
        config=config.to_dict(),
        feature_key=model.feature_key,
        examples=step * config.batch_size,
        classes=list(task.classes),
      )
      if metrics is None:
        checkpoints.save(step, state, meta)
      elif task.best_metric in metrics:
        kept = {name: state[name] for name in ("trainable", "ema") if name in state}
        checkpoints.save_best(step, kept, meta, metrics)

    with task.train_batches(start * config.batch_size) as batches:
      batch = next(batches)
      steps, predict = _compile(task, model, tx, config, state, layout, batch, mesh)
      rate(start)  # compiled now too, though logged later
      # Only now, so that a config that cannot run does not keep the workdir from the one that can.
      checkpoint.claim_workdir(folder, config.to_dict(), ignore=_FREE_OPTIONS, is_writer=is_writer)
      progress = run_log.Progress(config.steps, config.batch_size, start_step=start)
      metrics: dict[str, float] = {}
      first_evaluation, pending = None, []
      for step in range(start, config.steps):
        placed = sharding.put_batch(step_lib.device_batch(batch), mesh)
        with jax.transfer_guard("disallow"):  # nothing else moves between host and devices in a step
          state, scalars = steps[task.phase_at(step)](state, model.frozen, placed)
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
            log.scalars(
              done,
              {
                **{f"train/{name}": value for name, value in values.items()},
                "train/learning_rate": float(rate(step)),
                **{f"speed/{name}": value for name, value in rates.items()},
              },
            )
        finished = done == config.steps
        evaluates = finished or (config.eval_every and done % config.eval_every == 0)
        stops = stop.agreed(done)
        saves = finished or stops or done % config.checkpoint_every == 0
        if evaluates or saves:
          jax.block_until_ready(scalars)  # so that no pause holds a step's time
        if evaluates:
          with progress.pause():
            metrics = _evaluate(task, predict, state, config, folder, log, done)
            save(done, metrics)
          if first_evaluation is None:
            first_evaluation = compilations.mark()
        if saves:
          with progress.pause():
            save(done)
        if stops and not finished:
          _logger.warning(
            "Stopped by %s; step %d is saved and the same command continues.", stop.signal_name, done
          )
          return metrics
    late = compilations.since(first_evaluation)
    log.scalars(config.steps, {"compilations/after_first_evaluation": len(late)})
    if late:
      _logger.warning("After the first evaluation %s", compilations.report(first_evaluation))
    checkpoints.wait()
  if is_writer:
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
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.model)
  sharding.check_batch(config.eval_batch_size, mesh, "eval_batch_size")
  folder = pathlib.Path(workdir)
  model = build_model(task, config, mesh)
  weights = "ema" if config.ema_decay > 0 else "trainable"
  with (
    jax.set_mesh(mesh),
    checkpoint.Checkpoints(folder) as checkpoints,
    run_log.RunLog(folder, tensorboard=config.tensorboard, is_writer=jax.process_index() == 0) as log,
  ):
    meta = checkpoints.read_meta()
    checkpoint.check_feature_key(feature_key.current(meta["feature_key"]), model.feature_key)
    state, meta = checkpoints.restore({weights: model.trainable}, partial=True)
    _logger.info("Evaluating step %d of %s.", meta["step"], folder)
    predict = _compile_prediction(task, model, _evaluated(state), mesh)
    distributed.wait_for_all("evaluation")
    return _evaluate(task, predict, state, config, folder, log, meta["step"])


def _place(model: Model, mesh: jax.sharding.Mesh, over: sharding.Over) -> Model:
  """Puts a model's weights where `sharding` says."""
  trainable = sharding.state_shardings({"trainable": model.trainable}, mesh, over)["trainable"]
  return dataclasses.replace(
    model,
    trainable=sharding.put(model.trainable, trainable),
    frozen=sharding.put(model.frozen, sharding.frozen_shardings(model.frozen, mesh, over)),
  )


def _describe(model: Model, state: step_lib.State, mesh: jax.sharding.Mesh) -> None:
  """Says what trains and what does not, and on what."""

  def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6

  _logger.info(
    "Parameters: %.2f M train, %.2f M are frozen (%.1f MB stored as %s); optimizer and averages %.1f MB.",
    count(model.trainable),
    model.frozen_parameters / 1e6,
    freeze.num_bytes(model.frozen) / 1e6,
    model.storage,
    freeze.num_bytes([state["opt_state"], state.get("ema")]) / 1e6,
  )
  if mesh.size > 1:
    first = mesh.devices.flat[0]
    held = sum(
      math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
      for leaf in jax.tree.leaves(model.frozen)
    )
    _logger.info(
      "Mesh: data %d x model %d on %d processes, %s; frozen weights take %.1f MB of each device.",
      *mesh.devices.shape,
      jax.process_count(),
      first.device_kind,
      held / 1e6,
    )


def _compile(
  task: base.Task,
  model: Model,
  tx: Any,
  config: ml_collections.ConfigDict,
  state: step_lib.State,
  layout: Any,
  batch: base.Batch,
  mesh: jax.sharding.Mesh,
) -> tuple[dict[Any, Any], Any]:
  """All programs of the run, before the first step: {phase: train step}, and the prediction."""
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
  predict = _compile_prediction(task, model, _evaluated(state), mesh)
  _logger.info(
    "Compiled %d programs in %.1f s; a training step is %.1f GFLOP by the compiler's count (a scanned "
    "body counts once).",
    len(steps) + 1,
    time.perf_counter() - started,
    flops / 1e9,
  )
  distributed.wait_for_all("training")
  return steps, predict


def _compile_prediction(
  task: base.Task, model: Model, parameters: nnx.State, mesh: jax.sharding.Mesh
) -> Callable[[nnx.State, base.Batch], Any]:
  """(parameters, batch of this process) -> predictions on the devices."""

  def place(batch):
    return sharding.put_batch(step_lib.device_batch(batch), mesh)

  with task.eval_batches() as batches:
    example = next(batches)
  step = step_lib.make_predict_step(task, model.graphdef, frozen_pass=model.frozen_pass)
  compiled = (
    jax.jit(step, out_shardings=sharding.batch_sharding(mesh))
    .lower(parameters, model.frozen, place(example))
    .compile()
  )
  return lambda parameters, batch: compiled(parameters, model.frozen, place(batch))


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
        "optimizer.learning_rate or set optimizer.clip_norm."
      )


def _evaluate(
  task: base.Task,
  predict: Any,
  state: step_lib.State,
  config: ml_collections.ConfigDict,
  folder: pathlib.Path,
  log: run_log.RunLog,
  step: int,
) -> dict[str, float]:
  """Evaluates, writes results and pictures, and says the metrics."""
  parameters = _evaluated(state)
  metrics, pictures, evaluator = evaluate_lib.evaluate(
    task,
    lambda batch: predict(parameters, batch),
    num_pictures=config.pictures if jax.process_index() == 0 else 0,
  )
  task.write_results(evaluator, folder)
  log.scalars(step, {f"eval/{name}": value for name, value in metrics.items()})
  log.images(step, pictures)
  _logger.info(
    "Evaluation at step %d: %s", step, "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
  )
  return metrics
