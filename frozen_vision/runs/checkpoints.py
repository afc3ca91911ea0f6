"""Checkpoints of what trains.

A checkpoint is one Orbax step directory with two items: `state`, the arrays, as nested dicts named
by path, and `meta`, JSON: the caller's record (`workdir.make_meta`: config, feature key,
examples consumed) and a table of every leaf's path, shape and dtype. The table is read and compared before
any array is, so that a mismatch is one error that lists every key. Arrays and record have checksums, which
every restore compares: a damaged checkpoint is named and the one before it is taken.

    workdir/checkpoints/<step>/   the latest few
    workdir/best/<step>/          the best by a metric; retention of one never touches the other
"""

from collections.abc import Mapping
import contextlib
import math
import os
from typing import Any

from etils import epath
import jax

from frozen_vision.files import keys
from frozen_vision.runs import state_leaves
from frozen_vision.runs.checkpoint_store import CheckpointStore, NothingReadableError

PyTree = Any


FOLDERS = ("checkpoints", "best")  # of a workdir: the latest few, and the best


class Checkpoints:
  """Saves and restores training state below one directory.

  Every process of a multi-process run makes the same calls. Saves are atomic: a process killed in
  the middle of one leaves the checkpoint before it usable. A save waits for the one before it, also for
  that of the other folder: the barriers by which Orbax's background threads agree across processes have the
  same names for all of its managers, and two saves at once can wait for each other for ever.

  Args:
    directory: the workdir; `checkpoints/` and `best/` are created in it by the first save of each.
    keep: how many of the latest checkpoints stay.
    best_metric: key in the `metrics` of `save_best` that decides; None if `save_best` is not used.
    best_mode: "max" or "min".
    asynchronous: write in the background. `save` returns once the arrays are copied or held, so
      the next step may donate them. Errors of the writer surface in the next call here.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    keep: int = 2,
    best_metric: str | None = None,
    best_mode: str = "max",
    asynchronous: bool = True,
  ):
    if keep < 1:
      raise ValueError(f"keep is {keep}; at least one checkpoint must be kept.")
    if best_mode not in ("max", "min"):
      raise ValueError(f'best_mode is {best_mode!r}; expected "max" or "min".')
    path = os.fspath(directory)
    root = epath.Path(path if "://" in path else os.path.abspath(path))
    self._best_metric = best_metric
    self._sign = 1 if best_mode == "max" else -1
    self._latest = CheckpointStore(root / FOLDERS[0], asynchronous, max_to_keep=keep)
    self._best = CheckpointStore(
      root / FOLDERS[1], asynchronous, max_to_keep=1, best_fn=lambda metrics: metrics["quality"]
    )

  def save(self, step: int, state: PyTree, meta: Mapping[str, Any]) -> None:
    """Saves `state` at `step`, in the background if asynchronous.

    Args:
      step: number of optimizer steps done; must be larger than that of every checkpoint here.
      state: nested containers, `nnx.State`, optax states; leaves are jax arrays, typed PRNG keys,
        NumPy arrays and Python numbers. The outermost level is a dict of named parts, such as
        `trainable`, `ema`, `opt_state`.
      meta: what JSON can hold; see `workdir.make_meta`. `step` is added.

    Raises:
      ValueError: `step` exists or is not after the latest, or Orbax refused for another reason.
      TypeError: a leaf or a value of `meta` that cannot be saved, by path.
    """
    self._best.wait()
    self._latest.save(step, state, meta)

  def save_best(
    self, step: int, state: PyTree, meta: Mapping[str, Any], metrics: Mapping[str, float]
  ) -> bool:
    """Saves `state` if `metrics[best_metric]` is strictly better than what is kept.

    Returns whether it did. NaN is never better. `metrics` are kept with it (`read_metrics`).
    Raises as `save` does.
    """
    if self._best_metric is None:
      raise ValueError("save_best needs Checkpoints(best_metric=...).")
    if self._best_metric not in metrics:
      raise ValueError(
        f"Metric {self._best_metric!r} decides which checkpoint is best but was not measured; "
        f"found {sorted(metrics)}."
      )
    metrics = {k: float(v) for k, v in metrics.items()}
    value = metrics[self._best_metric]
    try:
      best = self._best.first_record()
    except NothingReadableError:  # was said in a warning; `save` sets it aside
      best = None
    if math.isnan(value) or (best and self._sign * value <= self._quality(best[1])):
      return False
    self._latest.wait()
    self._best.save(step, state, meta, metrics=metrics, quality=self._sign * value)
    return True

  def latest_step(self) -> int | None:
    """The newest complete checkpoint, after waiting for a running save; None if there is none."""
    return self._latest.first_step()

  def best_step(self) -> int | None:
    """The step of the best checkpoint; None if there is none."""
    return self._best.first_step()

  def read_meta(self, step: int | None = None, *, best: bool = False) -> dict[str, Any]:
    """The `meta` of a checkpoint, without reading an array; the newest (or best) by default.

    Raises:
      FileNotFoundError: no such checkpoint.
      ValueError: it is there but cannot be read.
    """
    return (self._best if best else self._latest).read(lambda s, record: record["meta"], step)

  def read_metrics(self, step: int | None = None) -> dict[str, float]:
    """The metrics that the best checkpoint was saved with. Raises as `read_meta` does."""
    return self._best.read(lambda s, record: record["metrics"], step)

  def restore(
    self,
    abstract_state: PyTree,
    step: int | None = None,
    *,
    best: bool = False,
    partial: bool = False,
  ) -> tuple[PyTree, dict[str, Any]]:
    """Restores bit for bit into the structure, types and shardings of `abstract_state`.

    Args:
      abstract_state: as given to `save`, with arrays or `jax.ShapeDtypeStruct` as leaves. An array
        arrives on its leaf's `sharding`, on any mesh; a leaf without one arrives on the first
        local device. NumPy leaves give NumPy arrays, Python numbers give Python numbers.
      step: None takes the newest (or best); if that cannot be read, the one before, with a warning.
      best: read from the best instead of the latest checkpoints.
      partial: `abstract_state` holds only some of the outermost parts, such as `trainable`. The
        others are not read. Within a part, all keys are still required.

    Returns:
      The state and the `meta` saved with it.

    Raises:
      ValueError: keys are missing, unexpected, or of another shape or dtype (all are listed); or
        the checkpoint cannot be read.
      FileNotFoundError: there is no such checkpoint.
    """
    leaves, treedef = state_leaves.flatten(abstract_state)
    wanted = state_leaves.describe(leaves)
    store = self._best if best else self._latest

    def read(found_step: int, record: dict[str, Any]) -> tuple[PyTree, dict[str, Any]]:
      stored = record["leaves"]
      if partial:
        parts = {path.split("/")[0] for path in wanted}
        stored = {k: v for k, v in stored.items() if k.split("/")[0] in parts}
      keys.compare(stored, wanted).check(
        f"Checkpoint {store.folder / str(found_step)} does not hold the state that is wanted. Build the "
        "model and optimizer that were saved, or use another workdir"
      )
      values = store.read_arrays(found_step, leaves, record)
      return jax.tree.unflatten(treedef, [values[path] for path in leaves]), record["meta"]

    return store.read(read, step)

  def restore_evaluated(
    self,
    trainable: PyTree,
    mutable: PyTree,
    *,
    averaged: bool,
    step: int | None = None,
    best: bool = False,
  ) -> tuple[PyTree, PyTree, dict[str, Any]]:
    """`restore` of what a training run evaluates: parameters and mutable variables, or the averages of both.

    Args:
      trainable, mutable: structures, as in `restore`.
      averaged: whether the run averages (`config.ema_decay`). Of a run from before mutable variables were
        averaged, the newest ones are taken.

    Returns:
      (parameters, mutable variables, the `meta` saved with them).

    Raises:
      ValueError, FileNotFoundError: as `restore`.
    """
    names = ("ema", "ema_mutable") if averaged else ("trainable", "mutable")
    if averaged and not self.has_part("ema_mutable", step, best=best):
      names = ("ema", "mutable")
    state, meta = self.restore(dict(zip(names, (trainable, mutable))), step, best=best, partial=True)
    return *(state[name] for name in names), meta

  def has_part(self, name: str, step: int | None = None, *, best: bool = False) -> bool:
    """Whether a checkpoint holds arrays of an outermost part, such as `ema`. Raises as `read_meta` does."""
    store = self._best if best else self._latest
    return store.read(lambda s, record: any(path.startswith(f"{name}/") for path in record["leaves"]), step)

  def wait(self) -> None:
    """Blocks until running saves are on disk; raises what went wrong in the background."""
    self._latest.wait()
    self._best.wait()

  def close(self) -> None:
    """Waits as `wait` does, then ends the writers' threads."""
    with contextlib.ExitStack() as stack:  # the second store closes even if the first one raises
      stack.callback(self._best.close)
      stack.callback(self._latest.close)

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()

  def _quality(self, record: Mapping[str, Any]) -> float:
    value = (record["metrics"] or {}).get(self._best_metric)  # absent: chosen by another metric
    return -math.inf if value is None else self._sign * value
