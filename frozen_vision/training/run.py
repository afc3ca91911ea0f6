"""One run at work: steps, log lines, evaluations and checkpoints until its end or a signal."""

import collections
from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import functools
import logging
import math
import pathlib
from typing import Any, NoReturn

import jax
import numpy as np

from frozen_vision.config import Config
from frozen_vision.data import fingerprint, images
from frozen_vision.freezing import prepare
from frozen_vision.metrics import gather
from frozen_vision.runs import checkpoints as checkpoint
from frozen_vision.runs import log as run_log
from frozen_vision.runs import workdir as workdir_lib
from frozen_vision.tasks import base
from frozen_vision.training import evaluation, feeds, programs, reading
from frozen_vision.training import step as step_lib

_logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Run:
  """A run at work: its programs, and where it logs and saves.

  Attributes:
    compilations: of the whole process.
    data: fingerprints of the sources, for checkpoints.
    frozen_head: `tasks.common.frozen_head`, likewise.
    progress: times the steps; None for a run that only evaluates.
    steps, predictions: compiled, by phase and by evaluation.
    cached: evaluations whose features are in the cache.
    rate: step -> learning rate.
    pending: scalars of the steps since the last log line, on the devices; those of steps before a restart are
      numbers.
    in_flight: scalars of steps that the devices may still be working on.
    first_evaluation: mark in `compilations` after which nothing should compile.
    saved: the step that was saved last.
  """

  task: base.Task
  config: Config
  model: prepare.Model
  folder: pathlib.Path
  checkpoints: checkpoint.Checkpoints
  log: run_log.RunLog
  compilations: run_log.CompileCounter
  data: Mapping[str, fingerprint.Fingerprint]
  frozen_head: str | None = None
  progress: run_log.Progress | None = None
  steps: Mapping[Any, Callable[..., tuple[step_lib.State, step_lib.Scalars]]] = dataclasses.field(
    default_factory=dict
  )
  predictions: Mapping[str, programs.Predict] = dataclasses.field(default_factory=dict)
  cached: Mapping[str, feeds.CachedEvaluation] = dataclasses.field(default_factory=dict)
  rate: Callable[[int], jax.Array] | None = None
  pending: list[Mapping[str, jax.Array | float]] = dataclasses.field(default_factory=list)
  in_flight: collections.deque[step_lib.Scalars] = dataclasses.field(default_factory=collections.deque)
  first_evaluation: Any = None
  saved: int | None = None

  def train(
    self,
    state: step_lib.State,
    start: int,
    batch: base.Batch,
    feed: feeds.Feed,
    stop: run_log.StopSignal,
  ) -> tuple[dict[str, float], bool]:
    """Runs all steps from `start` on, the first one on `batch`.

    At a step's end its line is logged, its state is saved, and only then comes what can fail for reasons of
    its own: evaluation, pictures, a full disk. Where the next batch cannot be read, on whatever host, the run
    saves and ends after that. After a signal to stop nothing follows the save.

    Returns:
      (metrics of the last evaluation, whether the run came to its end).

    Raises:
      FileError: an image or video that cannot be used, in training or evaluation.
    """
    config = self.config
    metrics = self.evaluate_missed(state, start)
    self.first_evaluation = None  # before the first step, not everything is compiled
    reader = reading.Reader(feed, batch, start, config.steps)
    for step in range(start, config.steps):
      # A signal is answered between two steps: with more of them dispatched, only once all of those are done.
      if len(self.in_flight) == reading.IN_FLIGHT:
        jax.block_until_ready(self.in_flight.popleft())
      try:
        batch = reader.take(step)
      except Exception as error:
        self._end_unread(state, step, error)
      inputs = feed.place(batch)
      with jax.transfer_guard("disallow"):  # nothing else moves between host and devices in a step
        state, scalars = self.steps[self.task.phase_at(step)](state, self.model.frozen, *inputs)
      self.pending.append(scalars)
      self.in_flight.append(scalars)
      done = step + 1
      with self.progress.waiting():
        reader.read(done)
      if step == start:
        jax.block_until_ready(scalars)
      self.progress.step_done(done)
      finished = done == config.steps
      if finished or done % config.log_every == 0:
        self._log(done)
      evaluates = self._is_evaluated(done)
      stops = stop.agreed(done)
      if evaluates or stops or done % config.checkpoint_every == 0:
        jax.block_until_ready(scalars)  # so that no pause holds a step's time
        with self.progress.pause():
          self._save(state, done)
      if stops:  # at once, even where an evaluation is due: the continuation makes up for it
        _logger.warning(
          "Stopped by %s; step %d is saved and the same command continues.", stop.signal_name, done
        )
        return metrics, False
      if evaluates:
        metrics = self._evaluate(state, done)
    return metrics, True

  def _end_unread(self, state: step_lib.State, done: int, error: Exception) -> NoReturn:
    """Saves the state before a batch that cannot be read, if it is not saved, and raises the error."""
    if done != self.saved:
      with self.progress.pause():
        self._save(state, done)
    _logger.warning("The next batch cannot be read; step %d is saved.", done)
    _raise_with_advice(error, f"Step {done} is saved.")

  def evaluate_missed(self, state: step_lib.State, done: int) -> dict[str, float]:
    """Evaluates a restored step that was saved but not evaluated, because the run ended in between.

    A finished run without a log is one of which only the checkpoints were kept; it is left as it is.

    Returns:
      The metrics; empty if there was nothing to do.
    """
    if not done or not self._is_evaluated(done):
      return {}
    is_known = done < self.config.steps or (self.folder / "metrics.jsonl").exists()
    missed = jax.process_index() == 0 and is_known and not self.log.has(done, "eval/")
    if not any(gather.gather_objects(missed)):  # the first process has the log
      return {}
    _logger.info("Step %d was saved and not evaluated; it is evaluated now.", done)
    return self._evaluate(state, done)

  def _is_evaluated(self, done: int) -> bool:
    every = self.config.eval_every
    return done == self.config.steps or bool(every and done % every == 0)

  def report_compilations(self) -> None:
    """Logs how many programs were compiled after the first evaluation, and warns if there are any."""
    late = self.compilations.since(self.first_evaluation)
    self.log.scalars(self.config.steps, {"compilations/after_first_evaluation": len(late)})
    if late:
      _logger.warning("After the first evaluation %s", self.compilations.report(self.first_evaluation))

  def _log(self, done: int) -> None:
    """Writes the means of the scalars since the last line.

    Raises:
      FloatingPointError: one of them is not finite.
    """
    pending = jax.device_get(self.pending)
    _check_finite(pending, done)
    values, rates = _mean(pending), self.progress.rates()
    self.pending = []
    _logger.info("%s", self.progress.line(values["loss"], rates))
    with self.progress.pause():  # the first write imports TensorFlow
      self.log.scalars(
        done,
        {
          **{f"train/{name}": value for name, value in values.items()},
          "train/learning_rate": float(self.rate(done - 1)),
          **{f"speed/{name}": value for name, value in rates.items()},
        },
      )

  def _evaluate(self, state: step_lib.State, done: int) -> dict[str, float]:
    """Evaluates, and keeps the state if it is the best so far."""
    with self.progress.pause() if self.progress else contextlib.nullcontext():
      at_end = done == self.config.steps
      try:
        metrics = evaluation.evaluate_all(
          self.task,
          {name: functools.partial(predict, state) for name, predict in self.predictions.items()},
          self.folder,
          self.log,
          done,
          at_end=at_end,
          num_pictures=self.config.pictures,
          keep=functools.partial(self._keep_best, state, done),
          cached=self.cached,
        )
      except images.FileError as error:
        _raise_with_advice(error, f"Step {done} is saved and not evaluated.")
    if self.first_evaluation is None:
      self.first_evaluation = self.compilations.mark()
    return metrics

  def _keep_best(self, state: step_lib.State, done: int, metrics: Mapping[str, float]) -> None:
    """Saves what is evaluated, if it is the best so far."""
    _check_finite(jax.device_get(self.pending), done)
    if self.task.best_metric in metrics:
      kept = {name: state[name] for name in ("trainable", "mutable", "ema", "ema_mutable") if name in state}
      self.checkpoints.save_best(done, kept, self._meta(done), metrics)

  def _save(self, state: step_lib.State, done: int) -> None:
    """Saves everything, and the scalars of the steps since the last log line, which the next one averages."""
    pending = jax.device_get(self.pending)
    _check_finite(pending, done)
    meta = self._meta(done)
    meta["pending"] = [{name: float(value) for name, value in scalars.items()} for scalars in pending]
    self.checkpoints.save(done, state, meta)
    self.saved = done

  def _meta(self, done: int) -> dict[str, Any]:
    """The record that a checkpoint keeps beside its arrays."""
    known = {"teacher": self.model.teacher, "frozen_head": self.frozen_head}
    return workdir_lib.make_meta(
      config=self.config.to_dict(),
      feature_key=self.model.feature_key,
      examples=done * self.config.batch_size,
      classes=list(self.task.classes),
      data=self.data,
      **{name: value for name, value in known.items() if value is not None},
    )


def _raise_with_advice(error: Exception, saved: str) -> NoReturn:
  """Raises the error; one of a file says what to do."""
  if not isinstance(error, images.FileError):
    raise error
  advice = (
    f"{error.reason.rstrip('.')}. {saved} Mend the file or leave it out of the data; then the same command "
    "continues, with --config.data.allow_changes=True. All damaged files are found by: "
    "python -m frozen_vision.data.prepare ... --check"
  )
  raise type(error)(error.name, advice, error.kind) from error


def _mean(pending: list[dict[str, np.ndarray | float]]) -> dict[str, float]:
  """Means of the scalars since the last line."""
  values = collections.defaultdict(list)
  for scalars in pending:
    for name, value in scalars.items():
      values[name].append(float(value))
  return {name: float(np.mean(value)) for name, value in values.items()}


def _check_finite(pending: list[dict[str, np.ndarray | float]], step: int) -> None:
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
