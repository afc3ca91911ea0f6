"""One writer at a time, for as long as its process lives."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from frozen_vision.files import lock

_ROOT = pathlib.Path(lock.__file__).parents[2]
_HOLDER = """
import sys, time
from frozen_vision.files import lock
with lock.hold(sys.argv[1], "the run in A"):
  print("held", flush=True)
  sys.stdin.read()
"""


def _hold_elsewhere(path):
  child = subprocess.Popen(
    [sys.executable, "-c", _HOLDER, str(path)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    cwd=_ROOT,
  )
  assert child.stdout.readline() == "held\n"
  return child


def test_the_second_is_told_who_holds_it_and_changes_nothing(tmp_path):
  path = tmp_path / "new" / "run" / "lock"
  child = _hold_elsewhere(path)
  before = (path.read_bytes(), sorted(p.name for p in path.parent.iterdir()))
  with pytest.raises(lock.LockedError, match=rf"process {child.pid} on .* is writing the run in A\. Wait"):
    with lock.hold(path, "the run in A"):
      raise AssertionError("both hold it")
  assert before == (path.read_bytes(), sorted(p.name for p in path.parent.iterdir()))
  child.communicate("")
  assert child.returncode == 0 and not (tmp_path / "new").exists()  # nothing is left of a clean end
  with lock.hold(path, "the run in A"):
    (path.parent / "result").touch()
  assert [p.name for p in path.parent.iterdir()] == ["result"]


def test_it_goes_with_its_process(tmp_path):
  path = tmp_path / "lock"
  child = _hold_elsewhere(path)
  child.kill()
  child.communicate()
  assert json.loads(path.read_text())["process"] == child.pid
  with lock.hold(path, "the run"):
    assert json.loads(path.read_text())["process"] == os.getpid()
  assert not path.exists()


def test_an_error_and_a_nested_holder(tmp_path):
  path = tmp_path / "lock"
  with pytest.raises(RuntimeError, match="inside"):
    with lock.hold(path, "x"):
      with pytest.raises(lock.LockedError, match=f"process {os.getpid()}"):
        with lock.hold(path, "x"):
          pass
      raise RuntimeError("inside")
  with lock.hold(path, "x"):
    pass
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("has_locks", [True, False])
def test_another_machine_by_its_sign_of_life(tmp_path, has_locks, monkeypatch):
  path = tmp_path / "lock"
  path.write_text(json.dumps({"host": "elsewhere", "process": 7, "since": "2026-01-01 00:00:00"}))
  if not has_locks:
    monkeypatch.setattr(lock, "fcntl", None)
  with pytest.raises(
    lock.LockedError, match="process 7 on elsewhere since 2026-01-01 .* seems to be writing the"
  ):
    with lock.hold(path, "the run"):
      pass
  old = time.time() - 120
  os.utime(path, (old, old))
  with lock.hold(path, "the run"):
    assert json.loads(path.read_text())["process"] == os.getpid()


def test_the_holder_gives_signs_of_life(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, "_RENEWED_EVERY_S", 0.02)
  path = tmp_path / "lock"
  with lock.hold(path, "the run"):
    old = time.time() - 120
    os.utime(path, (old, old))
    for _ in range(200):
      time.sleep(0.02)
      if path.stat().st_mtime > old + 60:
        break
    assert path.stat().st_mtime > old + 60


@pytest.mark.parametrize("content", ["", "null", "{", "[1]", "\x00" * 10])
def test_a_damaged_file_is_no_obstacle(tmp_path, content):
  path = tmp_path / "lock"
  path.write_text(content)
  with lock.hold(path, "the run"):
    assert json.loads(path.read_text())["process"] == os.getpid()
