"""One folder of Orbax step directories: refused saves, damage, and leftovers of kills."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import gc
import logging
import math
import os
import re
from typing import Any
import warnings

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from frozen_vision import messages
from frozen_vision.files import keys
from frozen_vision.runs import records, state_leaves

PyTree = Any
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")  # in TensorStore's texts


class UnreadableError(Exception):
  """A step directory that cannot be used, whatever state is wanted from it."""


class IncompleteError(UnreadableError):
  """A step directory that is no checkpoint: stray, or half deleted."""


class NothingReadableError(ValueError):
  """There are checkpoints, and none can be read."""


class CheckpointStore:
  """One folder of step directories, under one Orbax manager, which is made when it is first needed."""

  def __init__(self, folder: epath.Path, asynchronous: bool, **options):
    self.folder = folder
    self._options = dict(enable_async_checkpointing=asynchronous, **options)
    self._manager_: ocp.CheckpointManager | None = None
    self._unreadable: dict[int, UnreadableError] = {}
    self._cleaned = False

  def save(
    self,
    step: int,
    state: PyTree,
    meta: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
    quality: float | None = None,
  ) -> None:
    """See `Checkpoints.save`; with `quality`, the larger is kept, and any step may be added."""
    if isinstance(step, bool) or not isinstance(step, (int, np.integer)) or step < 0:
      raise TypeError(f"step is {step!r}; expected an integer of at least 0.")
    step = int(step)
    leaves, _ = state_leaves.flatten(state)
    state_leaves.describe(leaves)  # a leaf that cannot be saved is an error before any is looked at
    arrays = {path: leaf for path, leaf in leaves.items() if state_leaves.has_bytes(leaf)}
    if not arrays:
      raise ValueError("The state to save holds no array.")
    record = records.make(step, leaves, meta, metrics, quality)
    self.wait()
    self._set_bad_directories_aside()
    if quality is not None and step in self._steps():  # a rerun came by again and did better
      self._manager().delete(step)
    with self._disk_errors():
      saved = self._manager().save(
        step,
        metrics=None if quality is None else {"quality": quality},
        force=quality is not None,  # after a resume, a better one may come at a smaller step
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(state_leaves.nest(arrays)), meta=ocp.args.JsonSave(record)
        ),
      )
    if not saved:
      raise ValueError(
        f"Step {step} was not saved: {self.folder} already holds steps {self._steps()}, and only "
        "later steps can be added. Resume from the newest one, or use another workdir."
      )

  def first_step(self) -> int | None:
    found = self.first_record()
    return found[0] if found else None

  def first_record(self) -> tuple[int, dict[str, Any]] | None:
    try:
      return self.read(lambda step, record: (step, record), None)
    except FileNotFoundError:
      return None

  def read(self, read: Callable[[int, dict[str, Any]], Any], step: int | None) -> Any:
    """Calls `read(step, record)` for the first checkpoint in order for which that succeeds."""
    self.wait()
    steps = self._steps()
    if step is not None:
      if step not in steps:
        raise FileNotFoundError(f"No checkpoint of step {step} in {self.folder}; found steps {steps}.")
      steps = [step]
    problems = {}
    for candidate, record in self._records(steps):
      if step is None:  # a checkpoint that failed is tried again only when asked for by number
        record = self._unreadable.get(candidate, record)
      try:
        if isinstance(record, UnreadableError):
          raise record
        result = read(candidate, record)
      except UnreadableError as e:
        problems[self.folder / str(candidate)] = e
        if step is None and candidate not in self._unreadable:  # warn once
          self._unreadable[candidate] = e
          warnings.warn(
            f"Checkpoint {self.folder / str(candidate)} cannot be read and is passed over: {e}",
            RuntimeWarning,
            stacklevel=4,
          )
      else:
        return result
    # A stray directory alone is a workdir without checkpoints; a real one that is broken is not.
    if step is None and all(isinstance(e, IncompleteError) for e in problems.values()):
      raise FileNotFoundError(f"No checkpoint in {self.folder}.")
    raise NothingReadableError(
      "No checkpoint can be read:" + "".join(f"\n  {k}: {e}" for k, e in problems.items())
    )

  def read_arrays(self, step: int, leaves: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the leaves by path, as the type and on the sharding of the given ones.

    Raises:
      UnreadableError: they cannot be read, or are not those that were saved with the record.
    """
    asked = {
      path: state_leaves.abstract(leaf) for path, leaf in leaves.items() if state_leaves.has_bytes(leaf)
    }
    found = {}
    if asked:
      item, problem = state_leaves.nest(asked), None
      try:
        # PyTreeRestore is strict about nothing that was not compared before, but can read a part.
        restored = self._manager().restore(
          step,
          args=ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
              item=item, partial_restore=True, restore_args=ocp.checkpoint_utils.construct_restore_args(item)
            )
          ),
        )["state"]
        found, _ = state_leaves.flatten(restored)
        described = state_leaves.describe(found)
      except MemoryError:
        raise
      except Exception as e:  # Orbax and TensorStore raise many types for a damaged file
        problem = _short(e)
      # What Orbax finds no name for in its own description stays the object that was asked with; NumPy's
      # hold what their memory held before, which can be the very numbers that were saved.
      absent = [path for path, leaf in found.items() if leaf is asked[path]]
      if absent and not problem:
        problem = f"{messages.listed(absent)} are absent"
      if problem:
        _forget_failed_tasks()
        raise UnreadableError(f"arrays: {problem}")
      wanted = state_leaves.describe({path: leaves[path] for path in found})
      problems = keys.compare(described, wanted).lines
      if problems:  # the table of leaves and the arrays are from different saves
        raise UnreadableError("arrays: " + "; ".join(problems))
      damaged = records.damaged(record, found)
      if damaged:
        raise UnreadableError(
          f"arrays: {messages.listed(damaged)} do not add up to the checksums that they were saved with; "
          "they were damaged"
        )
    result = {}
    for path, leaf in leaves.items():
      if state_leaves.is_number(leaf):
        result[path] = record["scalars"][path]
      elif not state_leaves.has_bytes(leaf):
        result[path] = state_leaves.empty(leaf)
      else:
        result[path] = found[path][()] if isinstance(leaf, np.generic) else found[path]
    return result

  def wait(self) -> None:
    if self._manager_ is not None:
      with self._disk_errors():
        self._manager_.wait_until_finished()

  def close(self) -> None:
    if self._manager_ is not None:
      manager, self._manager_ = self._manager_, None
      with self._disk_errors():
        manager.close()

  @contextlib.contextmanager
  def _disk_errors(self) -> Iterator[None]:
    """Names this folder in errors of the disk, which come from Orbax and TensorStore without a file name."""
    try:
      yield
    except (OSError, ValueError) as error:
      code = _OS_ERROR.search(str(error))
      number = int(code[1]) if code else getattr(error, "errno", None)
      if number is None or getattr(error, "filename", None) is not None:
        raise
      what = (
        f"{os.strerror(number)}. Checkpoints from before are whole; once this is mended, the same command "
      )
      raise OSError(number, what + "continues from the last one", os.fspath(self.folder)) from error

  def _manager(self) -> ocp.CheckpointManager:
    if self._manager_ is None:
      self._manager_ = ocp.CheckpointManager(
        self.folder, item_names=("state", "meta"), options=ocp.CheckpointManagerOptions(**self._options)
      )
    return self._manager_

  def _steps(self) -> list[int]:
    """Every directory that Orbax would take for a step, newest first."""
    if not self.folder.is_dir():
      return []
    names = [p.name for p in self.folder.iterdir() if p.name.isdecimal()]
    return sorted((int(n) for n in names if n == str(int(n))), reverse=True)

  def _records(self, steps: Sequence[int]) -> Iterator[tuple[int, dict[str, Any] | Exception]]:
    """(step, record or why it cannot be read), the first to be used first."""
    records = ((step, self._record(step)) for step in steps)
    if "best_fn" not in self._options:
      return records

    def rank(pair: tuple[int, dict[str, Any] | Exception]) -> tuple[float, int]:
      step, record = pair
      if isinstance(record, IncompleteError):  # the old best, whose deletion was interrupted
        return -math.inf, step
      return (math.inf if isinstance(record, Exception) else record["quality"]), step

    return iter(sorted(records, key=rank, reverse=True))

  def _record(self, step: int) -> dict[str, Any] | UnreadableError:
    path = self.folder / str(step)
    for part in ("_CHECKPOINT_METADATA", "state", "meta/metadata"):
      if not (path / part).exists():
        return IncompleteError(f"incomplete: it holds no {part}")
    try:
      text = (path / "meta" / "metadata").read_text()
      return records.parse(text, step, best="best_fn" in self._options)
    except records.RecordError as e:
      return UnreadableError(f"meta: {e}")
    except (OSError, ValueError) as e:
      return UnreadableError(f"meta: {_short(e)}")

  def _set_bad_directories_aside(self) -> None:
    """Renames what cannot be read, because Orbax counts it as the latest step and refuses to save.

    Done by the first save only, since who merely reads must not touch another run's files.
    """
    bad, leftovers = set(self._unreadable), []
    if not self._cleaned and self.folder.is_dir():
      leftovers = list(self.folder.glob("*.orbax-checkpoint-tmp*"))  # a save that was killed
      has_good = False
      for step, record in self._records(self._steps()):
        path = self.folder / str(step)
        if not isinstance(record, UnreadableError):
          has_good = True
        elif has_good and isinstance(record, IncompleteError) and _is_ours(path):
          leftovers.append(path)  # the deletion of an old checkpoint that was killed
        else:
          bad.add(step)
    if not self._cleaned and jax.process_count() > 1:  # all have looked before one removes
      multihost_utils.sync_global_devices(f"looked into {self.folder}")
    self._cleaned = True
    if jax.process_index() == 0:
      for path in leftovers:
        path.rmtree()
    for step in sorted(bad & set(self._steps())):
      source, target, n = self.folder / str(step), self.folder / f"{step}.unreadable", 1
      while target.exists():
        target, n = self.folder / f"{step}.unreadable-{n}", n + 1
      if jax.process_index() == 0:
        source.rename(target)
        warnings.warn(
          f"Renamed {source}, which cannot be read, to {target.name}.", RuntimeWarning, stacklevel=4
        )
    self._unreadable.clear()
    if bad or leftovers:
      if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"set aside in {self.folder}")
      self._manager().reload()


def _is_ours(path: epath.Path) -> bool:
  names = {"_CHECKPOINT_METADATA", "commit_success.txt", "state", "meta", "metrics"}
  return {p.name for p in path.iterdir()} <= names


def _forget_failed_tasks() -> None:
  """Keeps asyncio from logging a page for every array of a damaged checkpoint; one line does."""
  logger = logging.getLogger("asyncio")
  disabled, logger.disabled = logger.disabled, True
  gc.collect()
  logger.disabled = disabled


def _short(e: Exception) -> str:
  text = " ".join(f"{type(e).__name__}: {e}".split())
  return text if len(text) <= 400 else text[:400] + "..."
