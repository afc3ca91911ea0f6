"""The one training loop."""

from collections.abc import Mapping
import functools
import logging
import os
import pathlib
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from frozen_vision.config import Config, ConfigLike
from frozen_vision.data import fingerprint, reports, shared_memory
from frozen_vision.devices import processes as distributed
from frozen_vision.devices import sharding
from frozen_vision.freezing import feature_key, prepare
from frozen_vision.freezing import partition as freeze
from frozen_vision.runs import checkpoints as checkpoint
from frozen_vision.runs import curves
from frozen_vision.runs import log as run_log
from frozen_vision.runs import workdir as workdir_lib
from frozen_vision.tasks import base, common
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import evaluation as evaluation_lib
from frozen_vision.training import feeds, hosts, programs
from frozen_vision.training import optimizer as optimizer_lib
from frozen_vision.training import run as run_lib
from frozen_vision.training import step as step_lib

_logger = logging.getLogger(__name__)

# Options that may differ between a run and its continuation: they change no number.
FREE_OPTIONS = (
  "headline",
  "log_every",
  "eval_every",
  "eval_batch_size",
  "checkpoint_every",
  "keep_checkpoints",
  "pictures",
  "tensorboard",
  "loader.*",
  "cache.path",
  "data.allow_drops",
  "data.allow_changes",
  "mesh.*",
  "classification.fine_tuning.*",
  "classification.probe.*",
)


def build_model(
  task: base.Task,
  config: ConfigLike,
  mesh: jax.sharding.Mesh | None = None,
  *,
  with_teacher: bool = False,
) -> prepare.Model:
  """Builds a task's model with its weights and splits it by `config.trainable`; see `prepare.prepare`.

  Args:
    mesh: where the weights go; None leaves them on the default device.
    with_teacher: attach the task's second frozen network, which only training needs.
  """
  config = tasks_build.read_config(config)
  return prepare.prepare(
    task.build_model,
    prepare.open_source(config.backbone, config.seed),
    trainable=config.trainable,
    adapters=config.adapters,
    seed=config.seed,
    storage=config.frozen_dtype,
    fold=config.backbone.fold,
    mesh=mesh,
    over=config.mesh.frozen,
    teacher=task.build_teacher() if with_teacher else None,
    fold_teacher=task.folds_teacher,
    teacher_settings=task.teacher_settings,
  )


def train(config: ConfigLike, workdir: str | os.PathLike[str]) -> dict[str, float]:
  """Trains, evaluates, draws, and leaves everything in `workdir`; continues what it finds there.

  Args:
    config: as `load_config` gives it, or anything that `tasks.build.read_config` reads.
    workdir: holds `config.json`, `metrics.jsonl`, `checkpoints/`, `best/`, `pictures/`, curves, TensorBoard
      events and the task's results.

  Returns:
    The last evaluation's metrics; empty if the run was interrupted before one.

  Raises:
    ValueError: a config that does not fit, a workdir or checkpoint of another config or other classes, or a
      workdir that is no path.
    LockedError: another process is writing to the workdir.
    FloatingPointError: a loss that is not finite.
  """
  config = tasks_build.read_config(config)
  folder, is_writer = workdir_lib.local_folder(workdir), jax.process_index() == 0
  with workdir_lib.hold(folder, is_writer=is_writer), shared_memory.of_run(folder):
    return _train(config, folder, is_writer)


def _train(config: Config, folder: pathlib.Path, is_writer: bool) -> dict[str, float]:
  """`train`, in a workdir that nobody else writes to."""
  task, config, report, mesh = _open(config, "train")
  sharding.check_batch(config.batch_size, mesh, "batch_size", config.accumulate)
  _claim(folder, config, task, is_writer=False)
  _keep_classes(task, folder)
  model = build_model(task, config, mesh, with_teacher=True)
  tx = optimizer_lib.of_run(config, model)
  state, layout = initial_state(task, model, tx, config, mesh)
  _describe(model, state, mesh)

  with (
    jax.set_mesh(mesh),
    checkpoint.Checkpoints(folder, keep=config.keep_checkpoints, best_metric=task.best_metric) as checkpoints,
    run_log.RunLog(folder, tensorboard=config.tensorboard, is_writer=is_writer) as log,
    run_log.CompileCounter() as compilations,
    run_log.StopSignal() as stop,
    feeds.cached_evaluations(task, model, config, mesh) as cached,
  ):
    data = _fingerprints(report)
    hosts.compare_weights(model, state["trainable"], checkpoints.latest_step())
    state, start, pending = _restore(checkpoints, state, task, model, config, folder, data)
    log.resume_from(start or None)
    run = run_lib.Run(task, config, model, folder, checkpoints, log, compilations, data, pending=pending)
    run.cached, run.frozen_head = cached, common.frozen_head(config, model.frozen)
    if start >= config.steps:
      run.predictions = programs.compile_predictions(task, model, state, mesh, cached)
      metrics = run.evaluate_missed(state, start)
      checkpoints.wait()
      _draw_curves(folder, is_writer, again=bool(metrics))
      _logger.info("All %d steps are done; --mode=evaluate evaluates again.", config.steps)
      return metrics
    with feeds.open_feed(task, model, config, mesh, start) as feed:
      batch = next(feed)
      run.steps = programs.compile_steps(task, model, tx, config, state, layout, feed, batch, mesh)
      run.predictions = programs.compile_predictions(task, model, state, mesh, cached)
      run.rate = jax.jit(optimizer_lib.schedule(config.optimizer, config.steps))
      run.rate(start)  # compiled now too, though logged later
      distributed.wait_for_all("training")
      # Only now, so that a config that cannot run does not keep the workdir from the one that can.
      _claim(folder, config, task, is_writer=is_writer)
      if is_writer:
        reports.write(report, folder)
      run.progress = run_log.Progress(config.steps, config.batch_size, start_step=start)
      metrics, finished = run.train(state, start, batch, feed, stop)
    if not finished:
      return metrics
    run.report_compilations()
    checkpoints.wait()
  _draw_curves(folder, is_writer, again=True)
  _logger.info("Everything is in %s.", folder)
  return metrics


def _draw_curves(folder: pathlib.Path, is_writer: bool, *, again: bool) -> None:
  """Draws the curves of a finished run, if they are absent or damaged, or `again`."""
  path = folder / "curves.png"
  # Without metrics only the checkpoints were kept, and there is nothing to draw.
  if not is_writer or not (folder / "metrics.jsonl").exists() or (not again and curves.are_whole(path)):
    return
  try:
    curves.plot_curves(folder / "metrics.jsonl", path)
  except OSError as error:  # a run does not end for its pictures
    _logger.warning("The curves could not be written: %s. The same command draws them again.", error)


def evaluate(config: ConfigLike, workdir: str | os.PathLike[str]) -> dict[str, float]:
  """Evaluates the newest checkpoint of a workdir: the trained part is all that it needs to hold.

  Raises:
    FileNotFoundError: no checkpoint there.
    LockedError: another process is writing to the workdir.
    ValueError: a checkpoint of other features, of other classes or of another model.
  """
  config = tasks_build.read_config(config)
  folder, is_writer = workdir_lib.local_folder(workdir), jax.process_index() == 0
  with workdir_lib.hold(folder, is_writer=is_writer), shared_memory.of_run(folder):
    return _evaluate(config, folder, is_writer)


def _evaluate(config: Config, folder: pathlib.Path, is_writer: bool) -> dict[str, float]:
  """`evaluate`, in a workdir that nobody else writes to."""
  task, config, _, mesh = _open(config, "evaluate")
  _keep_classes(task, folder)
  model = build_model(task, config, mesh, with_teacher=task.teacher_in_evaluation)
  with (
    jax.set_mesh(mesh),
    checkpoint.Checkpoints(folder) as checkpoints,
    run_log.RunLog(folder, tensorboard=config.tensorboard, is_writer=is_writer) as log,
    feeds.cached_evaluations(task, model, config, mesh) as cached,
  ):
    meta = checkpoints.read_meta()
    hosts.compare_weights(model, None, meta["step"])
    _check_features(meta, model, config)
    if task.teacher_in_evaluation:
      _check_teacher(meta, model, folder)
    common.check_frozen_head(meta.get("frozen_head"), config, model.frozen, str(folder))
    workdir_lib.check_classes(meta.get("classes"), task.classes, where=str(folder))
    trainable, mutable, meta = checkpoints.restore_evaluated(
      model.trainable, model.mutable, averaged=config.ema_decay > 0
    )
    state = {"trainable": trainable, "mutable": mutable}
    _logger.info("Evaluating step %d of %s.", meta["step"], folder)
    predictions = programs.compile_predictions(task, model, state, mesh, cached)
    distributed.wait_for_all("evaluation")
    return evaluation_lib.evaluate_all(
      task,
      {name: functools.partial(predict, state) for name, predict in predictions.items()},
      folder,
      log,
      meta["step"],
      at_end=True,
      num_pictures=config.pictures,
      cached=cached,
    )


def extract(config: ConfigLike) -> None:
  """Fills the feature cache of a config ahead of training: all views of its training data, and evaluations.

  Several processes each write their part. What is there already is kept.

  Raises:
    ValueError: a config without a cache, or features that cannot be cached.
    CacheError: a full disk, or a folder that cannot be written to.
    LockedError: another process is writing the same features.
  """
  config = tasks_build.read_config(config)
  if not config.cache.path:
    raise ValueError("--mode=extract needs --config.cache.path=FOLDER, and --config.cache.views=K to fill.")
  task, config, _, mesh = _open(config, "extract")
  sharding.check_batch(config.batch_size, mesh, "batch_size", config.accumulate)
  model = build_model(task, config, mesh, with_teacher=True)
  with jax.set_mesh(mesh), feeds.cached_evaluations(task, model, config, mesh, strict=True) as cached:
    hosts.compare_weights(model, None, None)
    distributed.wait_for_all("extraction")
    for evaluation in cached.values():
      evaluation.fill()
    if config.cache.views:
      with feeds.Cached(task, model, config, mesh, strict=True) as feed:
        feed.fill()
  _logger.info("The features are in %s.", config.cache.path)


def _open(config: Config, mode: str) -> tuple[base.Task, Config, dict[str, Any], jax.sharding.Mesh]:
  """The task of a config with its data.

  Returns:
    (task, the config as the data settle it, the report on the data, the mesh of the run).

  Raises:
    DroppedError: much of the data would be left out.
    ValueError: another host of the run has other data, another config or other versions.
  """
  task = tasks_build.build_task(config)
  _logger.info("%s%s", config.headline and config.headline + "\n", task.headline)
  report = reports.check(task.data, allow_drops=config.data.allow_drops)
  config = task.settle(config)
  hosts.compare_start(config, _fingerprints(report), mode)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.model)
  sharding.check_batch(config.eval_batch_size, mesh, "eval_batch_size")
  return task, config, report, mesh


def _keep_classes(task: base.Task, folder: pathlib.Path) -> None:
  """`Task.keep_classes` of the newest checkpoint in a workdir, if there is one."""
  if not task.learns_classes:
    return
  with checkpoint.Checkpoints(folder) as checkpoints:
    if checkpoints.latest_step() is not None:
      task.keep_classes(checkpoints.read_meta().get("classes"))


def _fingerprints(report: Mapping[str, Any]) -> dict[str, fingerprint.Fingerprint]:
  """Those of the sources in a report on data."""
  return {name: entry["fingerprint"] for name, entry in report.items()}


def initial_state(
  task: base.Task,
  model: prepare.Model,
  tx: optax.GradientTransformation,
  config: Config,
  mesh: jax.sharding.Mesh,
) -> tuple[step_lib.State, Any]:
  """The training state before the first step, on the devices of a mesh, and its shardings.

  Args:
    model: on the mesh already (`build_model` with a mesh).
    config: its seed, average and `mesh` are read.
  """
  module = nnx.merge(model.graphdef, model.trainable, model.mutable, model.frozen)
  initial = functools.partial(
    step_lib.init_state,
    model.trainable,
    tx,
    seed=config.seed,
    ema=config.ema_decay > 0,
    mutable=model.mutable,
    task_state=task.initial_state(module),
  )
  options = config.mesh
  layout = sharding.state_shardings(
    jax.eval_shape(initial), mesh, options.frozen, model.sharding_rules, options.optimizer
  )
  state = initial(shardings=layout if options.optimizer == "sharded" else None)
  return sharding.put(state, layout), layout


def _restore(
  checkpoints: checkpoint.Checkpoints,
  state: step_lib.State,
  task: base.Task,
  model: prepare.Model,
  config: Config,
  folder: pathlib.Path,
  data: Mapping[str, fingerprint.Fingerprint],
) -> tuple[step_lib.State, int, list[dict[str, float]]]:
  """(the newest state of a workdir, its step, scalars of steps that no line of the log averages yet).

  Where there is none, the given state, 0 and nothing.

  Raises:
    ValueError: a checkpoint of another run: of other frozen networks, another config, other classes, other
      data, or another model.
  """
  if checkpoints.latest_step() is None:
    return state, 0, []

  def check(meta: Mapping[str, Any]) -> str | None:
    _check_features(meta, model, config)
    if "config" in meta:
      meta = {**meta, "config": _upgraded(meta["config"], task, folder)}
    workdir_lib.check_resumed(
      meta, config.to_dict(), task.classes, config.batch_size, where=str(folder), ignore=FREE_OPTIONS
    )
    _check_teacher(meta, model, folder)
    common.check_frozen_head(meta.get("frozen_head"), config, model.frozen, str(folder))
    return fingerprint.check_resumed(
      meta.get("data"), data, where=str(folder), allow=config.data.allow_changes
    )

  check(checkpoints.read_meta())
  averages_all = "ema" not in state or checkpoints.has_part("ema_mutable")
  wanted = state if averages_all else {name: part for name, part in state.items() if name != "ema_mutable"}
  state, meta = checkpoints.restore(wanted)
  if not averages_all:  # a run whose mutable variables were not averaged, or that has none
    state["ema_mutable"] = jax.tree.map(jnp.copy, state["mutable"])
  changed = check(meta)  # of an older one, if the arrays of the newest are damaged
  if changed:
    _logger.warning("%s It goes on with these.", changed)
  _logger.info("Continuing from step %d in %s.", meta["step"], folder)
  return state, meta["step"], meta.get("pending", [])


def _check_teacher(meta: Mapping[str, Any], model: prepare.Model, folder: pathlib.Path) -> None:
  """Raises a ValueError if a run had another teacher than the model has, or used it otherwise."""
  found, own = meta.get("teacher"), model.teacher
  if isinstance(found, str):  # older checkpoints remember the fingerprint of its weights alone
    found, own = {"weights": found}, own and {"weights": own["weights"]}
  found, own = (workdir_lib.to_json(feature_key.current(key), "teacher") for key in (found, own))
  differing = workdir_lib.changes(found, own)
  if differing:
    listed = "; ".join(f"{name} was {there} and is {here}" for name, (there, here) in differing.items())
    raise ValueError(
      f"The run in {folder} had the teacher {found}, this one has {own}: {listed}. Give the teacher that it "
      "began with and its options, or use another --workdir."
    )


def _check_features(meta: Mapping[str, Any], model: prepare.Model, config: Config) -> None:
  """Raises a ValueError if a checkpoint was trained on other features than the model has."""
  hint = ""
  if config.backbone.weights == "random":
    hint = (
      "Random weights are the same on every machine now, which those of runs from before were not; such a "
      "run cannot be continued: train it anew in another --workdir."
    )
  workdir_lib.check_feature_key(feature_key.current(meta.get("feature_key")), model.feature_key, hint=hint)


def _claim(folder: pathlib.Path, config: Config, task: base.Task, *, is_writer: bool) -> None:
  """Makes the workdir this run's."""
  workdir_lib.claim_workdir(
    folder,
    config.to_dict(),
    ignore=FREE_OPTIONS,
    is_writer=is_writer,
    upgrade=functools.partial(_upgraded, task=task, folder=folder),
  )


def _upgraded(found: Mapping[str, Any], task: base.Task, folder: pathlib.Path) -> dict[str, Any]:
  """The config of an older run with the names that options have now, and settled as today's runs are."""
  try:
    config = tasks_build.read_config(found, quiet=True)
    same_task = isinstance(task, tasks_build.task_class(config.task))
    return (task.settle(config) if same_task else config).to_dict()
  except ValueError as error:
    raise ValueError(
      f"The run in {folder} has options that this version does not read; use another --workdir. {error}"
    ) from error


def _describe(model: prepare.Model, state: step_lib.State, mesh: jax.sharding.Mesh) -> None:
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
    _logger.info(
      "Mesh: data %d x model %d on %d processes, %s; frozen weights take %.1f MB of each device, optimizer "
      "and averages %.1f MB.",
      *mesh.devices.shape,
      jax.process_count(),
      mesh.devices.flat[0].device_kind,
      sharding.local_bytes(model.frozen) / 1e6,
      sharding.local_bytes([state["opt_state"], state.get("ema")]) / 1e6,
    )
