"""Records of a run while it goes: metrics, pictures, progress, compilations, stop signals.

`metrics.jsonl` in the workdir is the record of a run: one JSON object per line with `step`, `time`
(seconds since 1970) and metrics such as `train/loss`. TensorBoard gets the same numbers.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import importlib.util
import json
import logging
import math
import os
import pathlib
import re
import signal
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
from jaxtyping import UInt8
import numpy as np
from PIL import Image

from frozen_vision.files import atomic

_logger = logging.getLogger(__name__)
_COMPILATION = "/jax/core/compile/backend_compile_duration"


class RunLog:
  """Writes metrics, pictures and texts of one run into its workdir.

  Args:
    workdir: created by the first write. `metrics.jsonl`, `pictures/`, `texts/` and `tensorboard/`
      are in it.
    tensorboard: also write TensorBoard events, by `clu.metric_writers`. That needs TensorFlow,
      which the first write imports (seconds); without it one line says so and the rest works.
    is_writer: False on all processes but one; they write nothing.
  """

  def __init__(self, workdir: str | os.PathLike, *, tensorboard: bool = True, is_writer: bool = True):
    self._workdir = pathlib.Path(workdir)
    self._metrics = self._workdir / "metrics.jsonl"
    self._wants_tensorboard = tensorboard
    self._is_writer = is_writer
    self._file = None
    self._events = None

  def resume_from(self, step: int | None) -> None:
    """Drops the metrics of steps after `step`, which will be run again; None drops all.

    Call it once, before the first write, with the step of the restored checkpoint. For a step and
    the one after it to appear exactly once, what belongs to a step is logged before the checkpoint
    of that step is saved; its evaluation comes after, and `has` tells whether it is there. Pictures
    and texts are overwritten by their step and name. Old TensorBoard events stay in their files,
    beside the newer ones of the same steps.

    A line that a killed process left unfinished is dropped too.
    """
    if self._file:
      raise ValueError("resume_from comes before the first write.")
    if not self._is_writer or not self._metrics.exists():
      return
    lines = self._metrics.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if (s := _step_of(line)) is not None and step is not None and s <= step]
    if len(kept) < len(lines):
      atomic.write_bytes(self._metrics, b"".join(kept))
      _logger.info("Dropped %d lines after step %s from %s.", len(lines) - len(kept), step, self._metrics)

  def has(self, step: int, prefix: str) -> bool:
    """Whether `metrics.jsonl` has a number of that step whose key begins with `prefix`, such as `eval/`."""
    if not self._metrics.exists():
      return False
    with open(self._metrics, "rb") as file:
      for line in file:
        if _step_of(line) == step and any(key.startswith(prefix) for key in json.loads(line)):
          return True
    return False

  def scalars(self, step: int, values: Mapping[str, Any]) -> None:
    """Appends one line and flushes it; values are numbers or arrays of one element.

    NaN and infinities become null in `metrics.jsonl`, since JSON has no word for them.

    Raises:
      ValueError: a value is no single number; names its key.
      OSError: the file cannot be written, with its path.
    """
    if not self._is_writer:
      return
    numbers = {key: _number(key, value) for key, value in values.items()}
    line = dict(step=int(step), time=round(time.time(), 3))
    line |= {k: v if math.isfinite(v) else None for k, v in numbers.items()}
    try:
      self._open().write(json.dumps(line).encode() + b"\n")
    except OSError as error:  # a full disk, which a write reports without the file's name
      raise OSError(error.errno, error.strerror, os.fspath(self._metrics)) from error
    if events := self._tensorboard():
      events.write_scalars(int(step), numbers)
      events.flush()

  def images(self, step: int, images: Mapping[str, UInt8[np.ndarray, "_h _w 3"]]) -> None:
    """Writes `pictures/<step>_<name>.png`, RGB; a slash in a name becomes `_`.

    Raises:
      ValueError: not a uint8 array [h, w, 3]; names its key and says what was found.
    """
    if not self._is_writer:
      return
    images = {name: np.asarray(image) for name, image in images.items()}
    for name, image in images.items():
      if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"Picture {name!r} is {image.dtype}{list(image.shape)}; expected uint8[h, w, 3].")
      with atomic.open_aside(self._path("pictures", step, name, "png"), sync=False) as file:
        Image.fromarray(image).save(file, "PNG")
    if events := self._tensorboard():
      events.write_images(int(step), images)
      events.flush()

  def text(self, step: int, texts: Mapping[str, str]) -> None:
    """Writes `texts/<step>_<name>.txt`."""
    if not self._is_writer:
      return
    for name, text in texts.items():
      atomic.write_text(self._path("texts", step, name, "txt"), text)
    if events := self._tensorboard():
      events.write_texts(int(step), texts)
      events.flush()

  def close(self) -> None:
    if self._file:
      self._file.close()
    if self._events:
      self._events.close()
    self._file = self._events = None

  def __enter__(self) -> "RunLog":
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()

  def _open(self):
    if self._file is None:
      self._workdir.mkdir(parents=True, exist_ok=True)
      written = self._metrics.read_bytes() if self._metrics.exists() else b""
      whole_lines = written.rfind(b"\n") + 1  # a killed process may have left a part of one
      if whole_lines < len(written):
        os.truncate(self._metrics, whole_lines)
      self._file = open(self._metrics, "ab", buffering=0)  # one write call per line
    return self._file

  def _path(self, folder: str, step: int, name: str, suffix: str) -> pathlib.Path:
    return self._workdir / folder / f"{int(step):08d}_{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}.{suffix}"

  def _tensorboard(self):
    if self._wants_tensorboard and self._events is None:
      self._events = _event_writer(self._workdir / "tensorboard")
      self._wants_tensorboard = self._events is not None
    return self._events


def _event_writer(folder: pathlib.Path):
  missing = [m for m in ("tensorflow", "tensorboard", "clu") if not importlib.util.find_spec(m)]
  if missing:
    _logger.info(
      "No TensorBoard events: %s is not installed (pip install tensorflow-cpu "
      "tensorboard clu). metrics.jsonl has everything.",
      " and ".join(missing),
    )
    return None
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # both are read once, by the import
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else two lines about rounding; unused here
  from clu.metric_writers import SummaryWriter  # pylint: disable=g-import-not-at-top
  import tensorflow as tf  # pylint: disable=g-import-not-at-top

  with contextlib.suppress(RuntimeError):  # somebody else has used TensorFlow's devices already
    tf.config.set_visible_devices([], "GPU")  # TensorFlow would take the memory that JAX needs
  return SummaryWriter(str(folder))


def _step_of(line: bytes) -> int | None:
  """The step of a line of `metrics.jsonl`; None if it is unfinished."""
  if not line.endswith(b"\n"):
    return None
  try:
    return int(json.loads(line)["step"])
  except (ValueError, KeyError, TypeError):
    return None


def _number(key: str, value: Any) -> int | float:
  array = np.asarray(value)
  if array.size != 1 or array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
    raise ValueError(f"Metric {key!r} is {array.dtype}{list(array.shape)}; expected one number.")
  return int(array.reshape(())) if array.dtype.kind in "biu" else float(array.reshape(()))


class Progress:
  """Times the steps of a loop and says in one line how far it is.

  The first step compiles; its time is kept as `first_step_seconds` and enters no average. Waiting
  for the first step's result before `step_done` keeps it out of the second one's time too.

      progress = Progress(total_steps, images_per_step, start_step=step)
      while step < total_steps:
        with progress.waiting():
          batch = next(batches)
        ...
        step += 1
        progress.step_done(step)
        if step % log_every == 0:
          loss = float(loss)  # waits for the device, so that the times below are those of the work
          rates = progress.rates()
          print(progress.line(loss, rates))
        with progress.pause():
          evaluate()

  Args:
    total_steps: the step at which the loop ends.
    images_per_step: global batch size.
    start_step: steps done before, by the run that is resumed.
    flops_per_step, peak_flops: model FLOPs of a step and FLOPs per second of all devices; if both
      are given, rates hold `mfu`, the model FLOPs utilisation.
    clock: seconds; for tests.
  """

  def __init__(
    self,
    total_steps: int,
    images_per_step: int,
    *,
    start_step: int = 0,
    flops_per_step: float | None = None,
    peak_flops: float | None = None,
    clock=time.perf_counter,
  ):
    self._total, self._images, self._step = total_steps, images_per_step, start_step
    self._flops = flops_per_step / peak_flops if flops_per_step and peak_flops else None
    self._clock = clock
    self.first_step_seconds: float | None = None
    self._paused_all = 0.0
    self._start_window()
    self._first_end: tuple[int, float] | None = None

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Time spent here counts as waiting for data."""
    start = self._clock()
    try:
      yield
    finally:
      self._waited += self._clock() - start

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Time spent here (evaluation, saving, drawing) is no step time; it does enter the ETA."""
    start = self._clock()
    try:
      yield
    finally:
      self._paused += self._clock() - start

  def step_done(self, step: int) -> None:
    """`step` optimizer steps are done, or dispatched."""
    self._step = step
    if self._first_end is None:
      self.first_step_seconds = self._clock() - self._window_start - self._paused - self._waited
      self._start_window()
      self._first_end = step, self._window_start

  def rates(self) -> dict[str, float]:
    """Averages since the last call: `step_time` in s, `images_per_s`, `data_wait` in 0..1, `mfu`.

    Empty before the second step is done.
    """
    now, steps = self._clock(), self._step - self._window_step
    seconds, waited = now - self._window_start - self._paused, self._waited
    if self._first_end is None or steps < 1 or seconds <= 0:
      return {}
    self._start_window()
    step_time = seconds / steps
    rates = dict(
      step_time=step_time, images_per_s=self._images / step_time, data_wait=min(1.0, waited / seconds)
    )
    return rates | ({} if self._flops is None else dict(mfu=self._flops / step_time))

  def eta_seconds(self) -> float | None:
    """Expected time to the end, pauses included; None before the second step is done."""
    if self._first_end is None or self._step <= self._first_end[0]:
      return None
    step, start = self._first_end
    return (self._clock() - start) / (self._step - step) * max(0, self._total - self._step)

  def line(self, loss: float, rates: Mapping[str, float]) -> str:
    """`step 1200/9000  loss 0.8214  0.412 s/step  19.4 images/s  data 3%  ETA 0:53:33`."""
    width = len(str(self._total))
    parts = [f"step {self._step:{width}d}/{self._total}", f"loss {loss:.4f}"]
    if rates:
      parts += [
        f"{rates['step_time']:.3g} s/step",
        f"{rates['images_per_s']:.3g} images/s",
        f"data {100 * rates['data_wait']:.0f}%",
      ]
      if "mfu" in rates:
        parts.append(f"MFU {100 * rates['mfu']:.1f}%")
    elif self.first_step_seconds is not None:
      parts.append(f"first step {self.first_step_seconds:.1f} s (compilation)")
    eta = self.eta_seconds()
    return "  ".join(parts + [f"ETA {'?' if eta is None else format_seconds(eta)}"])

  def _start_window(self) -> None:
    self._window_start, self._window_step = self._clock(), self._step
    self._waited = self._paused = 0.0


def format_seconds(seconds: float) -> str:
  """`h:mm:ss`."""
  whole = round(seconds)
  return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


@dataclasses.dataclass(frozen=True)
class Compilation:
  """One compilation by XLA, or load from the persistent cache: `jit(train_step)`, and its time."""

  name: str
  seconds: float


class CompileCounter:
  """Records the compilations of the process while it is entered.

  Eager operations compile too, under names of their own; so a question names its functions.
  Listeners of `jax.monitoring` see all threads of the process.
  """

  def __init__(self):
    self.compilations: list[Compilation] = []

  def __enter__(self) -> "CompileCounter":
    jax.monitoring.register_event_duration_secs_listener(self._listen)
    return self

  def __exit__(self, *exc_info) -> None:
    jax.monitoring.unregister_event_duration_listener(self._listen)

  def mark(self) -> int:
    """A point in time for `since`."""
    return len(self.compilations)

  def since(self, mark: int = 0, names: tuple[str, ...] | None = None) -> list[Compilation]:
    """Compilations after `mark`; of the jitted functions `names` (`train_step`), or of all."""
    wanted = None if names is None else {n for name in names for n in (name, f"jit({name})")}
    return [c for c in self.compilations[mark:] if wanted is None or c.name in wanted]

  def report(self, mark: int = 0, names: tuple[str, ...] | None = None) -> str:
    """`recompiled: jit(train_step) (12.1 s), ...`; an empty text if nothing was compiled."""
    found = [f"{c.name} ({c.seconds:.1f} s)" for c in self.since(mark, names)]
    return "recompiled: " + ", ".join(found) if found else ""

  def _listen(self, event: str, duration: float, **kwargs) -> None:
    if event == _COMPILATION:
      self.compilations.append(Compilation(str(kwargs.get("fun_name", "?")), duration))


class StopSignal:
  """Turns Ctrl-C and SIGTERM into a flag, so that the loop can finish its step and save.

  A second Ctrl-C raises `KeyboardInterrupt`. Outside the main thread, where Python cannot set
  signal handlers, no signal sets the flag. The old handlers come back at the end.

  Several processes must stop after the same step. There `jax.distributed.initialize` has set a
  handler of SIGTERM that tells all of them; it stays, Ctrl-C becomes SIGTERM, and `agreed` asks it.

      with StopSignal() as stop:
        while not stop.agreed(step): ...
  """

  SIGNALS = (signal.SIGINT, signal.SIGTERM)

  def __init__(self):
    self.signal_name: str | None = None
    self._interrupted = False
    self._old: dict[signal.Signals, Any] = {}

  @property
  def requested(self) -> bool:
    return self.signal_name is not None

  def request(self, name: str = "request") -> None:
    """Sets the flag without a signal."""
    self.signal_name = name

  def agreed(self, step: int) -> bool:
    """Whether to stop after `step`: the same answer in all processes, which all ask after every step."""
    if jax.process_count() > 1 and not self.requested:
      if multihost_utils.reached_preemption_sync_point(step):
        self.request("SIGTERM to one of the processes")
    return self.requested

  def __enter__(self) -> "StopSignal":
    if threading.current_thread() is threading.main_thread():
      for number in self.SIGNALS if jax.process_count() == 1 else (signal.SIGINT,):
        self._old[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *exc_info) -> None:
    for number, handler in self._old.items():
      # None: the old one was not set from Python, and Python cannot set it again.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
    self._old = {}

  def _handle(self, number: int, frame) -> None:
    if self._interrupted and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._interrupted = True
    if jax.process_count() == 1:
      self.signal_name = signal.Signals(number).name
    else:
      os.kill(os.getpid(), signal.SIGTERM)
    # Not print or logging: the signal may have come in the middle of one of them.
    message = f"\n{signal.Signals(number).name}: finishing this step and saving; Ctrl-C stops at once.\n"
    os.write(2, message.encode())
