"""Metrics, pictures, progress, compilation counts and stop signals of a run."""

import json
import logging
import math
import os
import pathlib
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from frozen_vision.runs import log as run_log

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def _lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _log(workdir, **kwargs):
  return run_log.RunLog(workdir, tensorboard=False, **kwargs)


def test_scalars_are_on_disk_after_each_call(tmp_path):
  workdir = tmp_path / "a" / "run"
  with _log(workdir) as log:
    log.scalars(1, {"train/loss": jnp.float32(0.5), "half": jnp.bfloat16(2), "n": np.int64(3)})
    (line,) = _lines(workdir)
    assert line.pop("time") > 1.6e9
    assert line == {"step": 1, "train/loss": 0.5, "half": 2.0, "n": 3}
    values = {"a": math.nan, "b": jnp.float32(-jnp.inf), "c": jnp.ones((1,)), "d": True}
    log.scalars(np.int32(2), values)
    assert _lines(workdir)[1].items() >= {"step": 2, "a": None, "b": None, "c": 1.0, "d": 1}.items()
    for bad in (jnp.ones(2), "text", None, []):
      with pytest.raises(ValueError, match="Metric 'x' is .*expected one number"):
        log.scalars(3, {"y": 1.0, "x": bad})
  assert len(_lines(workdir)) == 2


def test_a_resumed_run_leaves_no_duplicates(tmp_path):
  def run(first, last, cut=False):
    with _log(tmp_path) as log:
      log.resume_from(first)
      for step in range((first or 0) + 1, last + 1):
        log.scalars(step, {"train/loss": step})
        if step % 2 == 0:
          log.scalars(step, {"eval/box_AP": 0.1 * step})
    if cut:  # killed while writing
      with open(tmp_path / "metrics.jsonl", "ab") as f:
        f.write(b'{"step": 8, "tra')

  run(None, 7, cut=True)
  run(4, 10, cut=True)
  lines = _lines_without_time(tmp_path)
  wanted = []
  for step in range(1, 11):
    wanted += [{"step": step, "train/loss": step}]
    wanted += [{"step": step, "eval/box_AP": 0.1 * step}] if step % 2 == 0 else []
  assert lines == wanted
  run(20, 20)  # nothing to drop
  assert _lines_without_time(tmp_path) == wanted
  run(None, 3)  # no checkpoint had been saved: all over again
  assert _lines_without_time(tmp_path) == wanted[:4]
  assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def _lines_without_time(workdir):
  lines = (workdir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
  if not lines[-1].endswith(b"\n"):
    lines.pop()
  return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def test_an_unfinished_line_does_not_swallow_the_next(tmp_path):
  (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "x')
  with _log(tmp_path) as log:
    log.scalars(2, {"x": 1})
    with pytest.raises(ValueError, match="before the first write"):
      log.resume_from(1)
  assert [line["step"] for line in _lines(tmp_path)] == [1, 2]


def test_what_was_logged_is_known_again(tmp_path):
  with run_log.RunLog(tmp_path, tensorboard=False) as log:
    assert not log.has(4, "eval/")
    log.scalars(4, {"train/loss": 1.0})
    log.scalars(5, {"eval/top1": 1.0})
    assert log.has(4, "train/") and not log.has(4, "eval/") and log.has(5, "eval/")
  with open(tmp_path / "metrics.jsonl", "ab") as file:
    file.write(b'{"step": 6, "eval/top1": 1.0')
  assert not run_log.RunLog(tmp_path).has(6, "eval/")


def test_pictures_and_texts(tmp_path, without_type_checks):
  image = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
  with _log(tmp_path) as log:
    log.images(7, {"val/a b.jpg": image})
    log.text(7, {"config": "naïve"})
    for bad in (image[..., :2], image.astype(np.float32), image[0]):
      with pytest.raises(ValueError, match=r"Picture 'x' is .*expected uint8\[h, w, 3\]"):
        log.images(7, {"x": bad})
  path = tmp_path / "pictures" / "00000007_val_a_b.jpg.png"
  np.testing.assert_array_equal(np.asarray(Image.open(path)), image)
  assert (tmp_path / "texts" / "00000007_config.txt").read_text("utf-8") == "naïve"


def test_who_is_no_writer_writes_nothing(tmp_path):
  with run_log.RunLog(tmp_path / "run", is_writer=False) as log:
    log.resume_from(3)
    log.scalars(1, {"a": 1})
    log.images(1, {"a": np.zeros((2, 2, 3), np.uint8)})
    log.text(1, {"a": "b"})
  assert not list(tmp_path.iterdir())


def test_without_tensorflow_one_line_says_so(tmp_path, monkeypatch, caplog):
  find = run_log.importlib.util.find_spec
  monkeypatch.setattr(run_log.importlib.util, "find_spec", lambda m: None if m == "tensorflow" else find(m))
  with caplog.at_level(logging.INFO), run_log.RunLog(tmp_path) as log:
    for step in range(3):
      log.scalars(step, {"a": 1})
  messages = [m for m in caplog.messages if "TensorBoard" in m]
  assert len(messages) == 1 and "tensorflow is not installed" in messages[0]
  assert len(_lines(tmp_path)) == 3 and not (tmp_path / "tensorboard").exists()


def test_tensorflow_is_imported_by_the_first_write_only():
  script = """
import sys
from frozen_vision.runs import log as run_log
log = run_log.RunLog("/nonexistent/run")
log.resume_from(None)
assert "tensorflow" not in sys.modules and "clu" not in sys.modules
"""
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(_ROOT)}
  subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def test_tensorboard_events(tmp_path):
  for module in ("tensorflow", "tensorboard", "clu"):
    if not run_log.importlib.util.find_spec(module):
      pytest.skip(f"{module} is not installed")
  with run_log.RunLog(tmp_path) as log:
    log.scalars(3, {"train/loss": jnp.float32(0.25), "train/nan": math.nan})
    log.images(3, {"val/0": np.zeros((4, 4, 3), np.uint8)})
    log.text(3, {"note": "hello"})
  # pylint: disable=g-import-not-at-top
  from tensorboard.backend.event_processing import event_accumulator
  from tensorboard.util import tensor_util

  events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
  events.Reload()
  tensors = {tag: events.Tensors(tag) for tag in events.Tags()["tensors"]}
  assert set(tensors) == {"train/loss", "train/nan", "val/0", "note"}
  (event,) = tensors["train/loss"]
  assert event.step == 3 and tensor_util.make_ndarray(event.tensor_proto) == 0.25


class _Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def test_progress_leaves_out_the_first_step_and_pauses():
  clock = _Clock()
  progress = run_log.Progress(110, 8, start_step=10, flops_per_step=3e9, peak_flops=1e10, clock=clock)

  def step(number, seconds, wait=0.0, pause=0.0):
    with progress.waiting():
      clock.now += wait
    clock.now += seconds
    progress.step_done(number)
    with progress.pause():
      clock.now += pause

  assert progress.line(1.0, progress.rates()) == "step  10/110  loss 1.0000  ETA ?"
  step(11, seconds=30.0, wait=5.0)
  assert progress.first_step_seconds == 30.0
  rates = progress.rates()
  assert rates == {} and progress.eta_seconds() is None
  assert progress.line(2.0, rates) == ("step  11/110  loss 2.0000  first step 30.0 s (compilation)  ETA ?")
  for i in range(12, 20):
    step(i, seconds=0.3, wait=0.1)
  step(20, seconds=0.3, wait=0.1, pause=5.4)
  rates = progress.rates()
  assert rates == pytest.approx(dict(step_time=0.4, images_per_s=20.0, data_wait=0.25, mfu=0.75))
  # 9 steps in 9 s with the pause, 90 to go.
  assert progress.eta_seconds() == pytest.approx(90.0)
  assert progress.line(0.12345, rates) == (
    "step  20/110  loss 0.1235  0.4 s/step  20 images/s  data 25%  MFU 75.0%  ETA 0:01:30"
  )
  assert progress.rates() == {}  # no step since
  step(21, seconds=1.0)
  assert progress.rates()["step_time"] == pytest.approx(1.0)
  progress.step_done(110)
  assert progress.eta_seconds() == 0


def test_an_exception_while_waiting_still_counts():
  clock = _Clock()
  progress = run_log.Progress(10, 1, clock=clock)
  progress.step_done(1)
  with pytest.raises(StopIteration), progress.waiting():
    clock.now += 1.0
    raise StopIteration
  clock.now += 1.0
  progress.step_done(2)
  assert progress.rates()["data_wait"] == 0.5


def test_seconds_as_text():
  assert [run_log.format_seconds(s) for s in (0, 59.6, 3661, 100 * 3600)] == [
    "0:00:00",
    "0:01:00",
    "1:01:01",
    "100:00:00",
  ]


def test_compilations_are_counted_by_name():
  def train_step(x):
    return x * 2 + 1

  step = jax.jit(train_step)
  inputs = [jnp.ones(3), jnp.ones(4), jnp.ones(5)]
  with run_log.CompileCounter() as counter:
    step(inputs[0])
    assert [c.name for c in counter.since(names=("train_step",))] == ["jit(train_step)"]
    assert counter.since(names=("train_step",))[0].seconds > 0
    mark = counter.mark()
    step(inputs[0])
    assert counter.since(mark) == [] and counter.report(mark) == ""
    step(inputs[1])
    jnp.cosh(inputs[1]).block_until_ready()
    assert len(counter.since(mark)) == 2
    assert counter.report(mark, ("train_step",)).startswith("recompiled: jit(train_step) (")
    assert counter.since(mark, ("evaluate_step",)) == []
  step(inputs[2])
  assert len(counter.since(names=("train_step",))) == 2  # it stopped listening


def test_signals_become_a_flag(capfd):
  old = {s: signal.getsignal(s) for s in run_log.StopSignal.SIGNALS}
  for number in run_log.StopSignal.SIGNALS:
    with run_log.StopSignal() as stop:
      assert not stop.requested
      os.kill(os.getpid(), number)
      assert stop.requested and stop.signal_name == number.name
      os.kill(os.getpid(), signal.SIGTERM)  # more of these change nothing
      with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigpending()
    assert {s: signal.getsignal(s) for s in old} == old
  assert "SIGINT: finishing this step" in capfd.readouterr().err


def test_handlers_come_back_after_an_error():
  old = {s: signal.getsignal(s) for s in run_log.StopSignal.SIGNALS}
  with pytest.raises(RuntimeError), run_log.StopSignal():
    raise RuntimeError
  assert {s: signal.getsignal(s) for s in old} == old


def test_a_stop_can_be_requested_outside_the_main_thread():
  found = []

  def target():
    with run_log.StopSignal() as stop:
      found.append(stop.requested)
      stop.request()
      found.append(stop.requested)

  thread = threading.Thread(target=target)
  thread.start()
  thread.join()
  assert found == [False, True]
