"""A file is whole or absent, whatever ends its writer."""

import errno
import os
import pathlib
import subprocess
import sys

import pytest

from frozen_vision.files import atomic


def _names(folder):
  return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_name_at_the_end(tmp_path):
  path = tmp_path / "new" / "a.json"
  with atomic.open_aside(path) as file:
    file.write(b"half")
    assert not path.exists() and len(_names(path.parent)) == 1
    file.write(b" and half")
  assert path.read_bytes() == b"half and half" and _names(path.parent) == ["a.json"]
  atomic.write_json(path, {"a": [1, 2]})
  assert path.read_text() == '{"a":[1,2]}'
  atomic.write_json(path, {"a": 1}, indent=1)
  assert path.read_text() == '{\n "a": 1\n}\n'


def test_an_error_leaves_what_was_there(tmp_path):
  path = tmp_path / "a.txt"
  atomic.write_text(path, "first")
  with pytest.raises(RuntimeError, match="broke"):
    with atomic.open_aside(path) as file:
      file.write(b"second")
      raise RuntimeError("broke")
  with pytest.raises(ValueError, match="JSON"):
    atomic.write_json(path, float("nan"))
  assert path.read_text() == "first" and _names(tmp_path) == ["a.txt"]


def test_the_longest_name_has_room(tmp_path):
  path = tmp_path / ("ä" * 125 + ".json")
  atomic.write_text(path, "x")
  assert path.read_text() == "x"
  with pytest.raises(OSError, match="File name too long: .*bbbb"):
    atomic.write_text(tmp_path / ("b" * 300), "x")
  assert _names(tmp_path) == [path.name]


def test_a_full_disk_is_named(tmp_path):
  with pytest.raises(OSError) as error:
    with atomic.open_aside(tmp_path / "a.npz"):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  assert "No space left on device" in str(error.value) and str(tmp_path / "a.npz") in str(error.value)
  assert not _names(tmp_path)


_WRITER = """
import sys, time
from frozen_vision.files import atomic
with atomic.open_aside(sys.argv[1]) as file:
  file.write(b"half"); file.flush()
  print("half", flush=True)
  time.sleep(60)
"""


def test_kill_9_leaves_the_old_file_and_what_can_be_removed(tmp_path):
  path = tmp_path / "a.txt"
  atomic.write_text(path, "old")
  root = pathlib.Path(atomic.__file__).parents[2]
  child = subprocess.Popen([sys.executable, "-c", _WRITER, path], stdout=subprocess.PIPE, text=True, cwd=root)
  assert child.stdout.readline() == "half\n"
  child.kill()
  child.communicate()
  assert path.read_text() == "old" and len(_names(tmp_path)) == 2
  assert len(atomic.remove_leftovers(tmp_path)) == 1
  assert _names(tmp_path) == ["a.txt"]
