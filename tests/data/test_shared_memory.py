"""What killed loaders leave in shared memory is found by its name, and nothing else is."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from frozen_vision.data import clean, shared_memory

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_FOLDER = pathlib.Path("/dev/shm")

pytestmark = pytest.mark.skipif(not _FOLDER.is_dir(), reason="needs /proc and /dev/shm")

# A process of a run that says what it owns and waits, with a loader or with a segment made by hand.
_RUN = """
import pathlib, sys, time
from frozen_vision.data import shared_memory
with shared_memory.of_run(sys.argv[1]):
  pathlib.Path("/dev/shm", shared_memory.prefix() + "0").write_bytes(bytes(1000))
  print(shared_memory.prefix(), flush=True)
  sys.stdin.read()
"""
_LOADER = """
import sys, time
from frozen_vision.data import pipeline, shared_memory
from tests.data import test_pipeline as t
if __name__ == "__main__":
  with shared_memory.of_run(sys.argv[1]):
    batches = pipeline.train_batches(
        t.Numbers(), t.augmented, batch_size=6, seed=5, num_workers=1, prefetch_batches=50)
    next(batches)
    print(shared_memory.prefix(), flush=True)
    time.sleep(60)
"""


def _start(program, workdir):
  process = subprocess.Popen(
    [sys.executable, "-c", program, str(workdir)],
    cwd=_ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
    start_new_session=True,
  )
  return process, process.stdout.readline().strip()


def _kill(process):
  os.killpg(process.pid, signal.SIGKILL)
  process.communicate()


def _segments(prefix):
  return [path for path in _FOLDER.glob(f"{prefix}*") if path.suffix != ".owner"]


def test_segments_of_a_killed_group_are_removed_by_the_next_start(tmp_path):
  process, prefix = _start(_LOADER, tmp_path)
  _kill(process)
  left = _segments(prefix)
  assert left and list(_FOLDER.glob(f"sem.{prefix}*"))
  with shared_memory.of_run(tmp_path / "another"):
    assert _segments(prefix) == left
  with shared_memory.of_run(tmp_path):
    assert not list(_FOLDER.glob(f"*{prefix[:-1]}*"))


def test_the_command_removes_what_nobody_owns(tmp_path, capsys):
  living, kept = _start(_RUN, tmp_path / "living")
  killed, gone = _start(_RUN, tmp_path / "killed")
  _kill(killed)
  assert clean.main(["--dry-run", f"--workdir={tmp_path / 'killed'}"]) == 0
  assert "1 segments, 0.0 MiB would be removed" in capsys.readouterr().out
  assert _segments(gone)
  assert clean.main([f"--workdir={tmp_path / 'living'}"]) == 0  # it runs
  assert "0 segments" in capsys.readouterr().out
  assert clean.main([]) == 0
  assert not _segments(gone) and _segments(kept)
  _kill(living)
  assert shared_memory.remove_leftovers(tmp_path / "living") == shared_memory.Leftovers(1, 1000)


def test_an_ordinary_end_leaves_no_owner(tmp_path):
  before = set(_FOLDER.glob("frozen_vision-*"))
  with shared_memory.of_run(tmp_path):
    assert shared_memory.prefix().startswith("frozen_vision-")
    assert set(_FOLDER.glob("frozen_vision-*")) - before
  assert set(_FOLDER.glob("frozen_vision-*")) <= before


def test_a_segment_that_outlives_its_owner_is_found(tmp_path):
  with shared_memory.of_run(tmp_path):
    prefix = shared_memory.prefix()
    (_FOLDER / f"{prefix}0").write_bytes(bytes(1000))  # of a worker that has not ended yet
  assert (_FOLDER / f"{prefix[:-1]}.owner").exists()
  (_FOLDER / f"{prefix[:-1]}.owner").unlink()  # as earlier versions did
  other, kept = _start(_RUN, tmp_path / "living")
  assert shared_memory.remove_leftovers(tmp_path, dry_run=True) == shared_memory.Leftovers(1, 1000)
  assert _segments(prefix)
  shared_memory.remove_leftovers()
  assert not _segments(prefix) and _segments(kept)
  _kill(other)
  shared_memory.remove_leftovers(tmp_path / "living")
