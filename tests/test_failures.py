"""What ends a program is said in one sentence, and printing never ends it."""

import io
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from frozen_vision import failures, output
from frozen_vision.data import pipeline
from tests import small_disk

_ROOT = pathlib.Path(__file__).resolve().parent.parent


class _Zeros:
  """Records of zeros."""

  side = 16

  def __len__(self):
    return 100

  def __getitem__(self, index):
    return {"x": np.zeros((self.side, self.side), np.uint8)}


class LargeZeros(_Zeros):
  """Of a megabyte each."""

  side = 1024


def as_it_is(record, rng):
  return record


def test_a_killed_loader_process_is_named_with_its_signal():
  before = set(_children())
  with pipeline.train_batches(_Zeros(), as_it_is, batch_size=2, seed=0, num_workers=1) as batches:
    next(batches)
    workers = [pid for pid in set(_children()) - before if "resource_tracker" not in _command(pid)]
    assert workers
    with pytest.raises(RuntimeError) as caught:
      for pid in workers:
        os.kill(pid, signal.SIGKILL)
      for _ in range(50):
        next(batches)
  found = failures.sentence(caught.value)
  assert "loader process was ended by SIGKILL" in found and "--config.loader.workers" in found


def test_a_signal_without_a_name_is_said_by_its_number():
  assert f"ended by signal {signal.SIGRTMIN + 3};" in failures.dead_worker(-(signal.SIGRTMIN + 3))


def _children():
  path = pathlib.Path(f"/proc/self/task/{os.getpid()}/children")
  tasks = path.parent.parent.glob("*/children")
  return [int(pid) for task in tasks for pid in task.read_text().split()]


def _command(pid):
  return pathlib.Path(f"/proc/{pid}/cmdline").read_text()


def test_a_full_shared_memory_is_named_with_its_size(monkeypatch):
  usage = type("Usage", (), {"total": 64 * 2**20})
  monkeypatch.setattr(failures.shutil, "disk_usage", lambda path: usage)
  found = failures.dead_worker(-signal.SIGBUS)
  assert "/dev/shm (64 MiB)" in found and "--config.loader.workers=0" in found and "--shm-size" in found
  assert "ended by SIGSEGV" in failures.dead_worker(-signal.SIGSEGV)
  assert "status 3" in failures.dead_worker(3)


_LOADS = """
from frozen_vision import failures
from frozen_vision.data import pipeline
from tests import test_failures

if __name__ == "__main__":
  try:
    source, transform = test_failures.LargeZeros(), test_failures.as_it_is
    with pipeline.train_batches(source, transform, batch_size=2, seed=0, num_workers=1) as batches:
      next(batches)
  except Exception as error:
    print(failures.report(error))
"""


@pytest.mark.parametrize(
  "size, reason",
  [
    ("1m", "A loader process was ended by SIGBUS: /dev/shm (1 MiB), where they hand over batches, is full."),
    # Locks between processes, which are made first, lie there too.
    ("4k", "/dev/shm (0 MiB), where loader processes hand over batches, cannot be used: No space left on"),
    ("1m,ro", "/dev/shm (1 MiB), where loader processes hand over batches, cannot be used: Read-only file"),
  ],
)
def test_a_small_shared_memory_is_named(tmp_path, size, reason):
  program = tmp_path / "loads.py"
  program.write_text(_LOADS)
  result = subprocess.run(
    small_disk.command("/dev/shm", size, [sys.executable, str(program)]),
    cwd=_ROOT,
    env={**os.environ, "PYTHONPATH": str(_ROOT)},
    capture_output=True,
    text=True,
    timeout=120,
  )
  [line] = result.stdout.splitlines()
  assert line.startswith(f"Error: {reason}"), result.stdout + result.stderr
  assert line.endswith("Set --config.loader.workers=0, or enlarge it (docker run --shm-size=8g).")


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_platform_that_is_not_there(platform):
  program = (
    "import jax\nfrom frozen_vision import failures\n"
    "try:\n  jax.devices()\nexcept Exception as error:\n  print(failures.report(error))"
  )
  result = subprocess.run(
    [sys.executable, "-c", program],
    cwd=_ROOT,
    env={**os.environ, "JAX_PLATFORMS": platform},
    capture_output=True,
    text=True,
  )
  [line] = result.stdout.splitlines()
  assert line.startswith(f"Error: JAX_PLATFORMS={platform}: ") and "Unset JAX_PLATFORMS" in line


def test_other_errors():
  for error, wanted in (
    (FileNotFoundError(2, "No such file or directory", "a.json"), "a.json: No such file or directory."),
    (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    (ValueError("config.steps is 0."), "config.steps is 0."),
    (MemoryError(), "This machine has not enough memory"),
  ):
    assert failures.sentence(error).startswith(wanted)
  full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore")
  assert "lower --config.batch_size" in failures.sentence(full) and "\n" not in failures.sentence(full)
  assert failures.sentence(KeyError("x")) is None and failures.sentence(AssertionError()) is None


def test_a_traceback_only_where_it_is_asked_for_or_there_is_no_sentence():
  try:
    raise ValueError("config.steps is 0.")
  except ValueError as error:
    assert failures.report(error) == "Error: config.steps is 0."
    assert failures.report(error, debug=True).startswith("Traceback")
    assert failures.report(error, debug=True).endswith("Error: config.steps is 0.")
  try:
    raise KeyError("x")
  except KeyError as error:
    assert failures.report(error).startswith("Traceback")


_PRINTS = """
import sys
from frozen_vision import output
output.protect()
for number in range(3000):
  print("a line that says déjà vu", number, flush=number % 2)
print("done", file=sys.stderr)
"""


@pytest.mark.parametrize("how", ["no reader", "closed", "ASCII"])
def test_printing_never_ends_a_program(how):
  environment = {**os.environ, "PYTHONIOENCODING": "ascii" if how == "ASCII" else "utf-8"}
  command = [sys.executable, "-c", _PRINTS]
  if how == "closed":
    command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
  process = subprocess.Popen(
    command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  if how == "ASCII":
    output, errors = process.communicate(timeout=120)
    assert output.startswith("a line that says d\\xe9j\\xe0 vu 0\n") and output.count("\n") == 3000
    assert errors == "done\n"
  else:
    process.stdout.close()
    errors = process.stderr.read()
    process.wait(timeout=120)
    said = "Nobody reads the output any more; the program goes on without it.\n"
    assert errors == (said if how == "no reader" else "") + "done\n"
  assert process.returncode == 0


def test_the_output_in_this_process(monkeypatch):
  stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
  monkeypatch.setattr(sys, "stdout", stream)
  output.protect()
  print("é")
  assert sys.stdout is not stream and stream.buffer.getvalue() == b"\\xe9\n"
