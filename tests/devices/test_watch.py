"""A process that ends is named by the others, which end too; ordinary ends disturb nobody."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[2]

# Three processes that find the port in a file. What each does is its last argument.
_PROGRAM = """
import os, pathlib, sys, time
from frozen_vision.devices import watch

class Client:
  def __init__(self, path):
    self.path = pathlib.Path(path)
  def key_value_set(self, key, value):
    aside = self.path.with_suffix(".aside")
    aside.write_text(value)
    aside.rename(self.path)
  def blocking_key_value_get(self, key, milliseconds):
    while not self.path.exists():
      time.sleep(0.01)
    return self.path.read_text()

index = int(sys.argv[2])
found = watch.start(index, 3, Client(sys.argv[1]), "127.0.0.1:1")
deadline = time.monotonic() + 30
while len(found._streams) < (1 if index else 2) and time.monotonic() < deadline:
  time.sleep(0.01)
print("connected", flush=True)
match sys.argv[3]:
  case "stay":
    time.sleep(60)
  case "wait":
    sys.stdin.read()
  case "leave":
    sys.stdin.read()
    found.leave("Error: the disk is full.")
    os._exit(1)
  case "raise":
    sys.stdin.read()
    raise ValueError("the disk is full")
"""


def _start(folder, what):
  """Three processes that have found each other; `what` each of them does."""
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", _PROGRAM, str(folder / "port"), str(index), do],
      cwd=_ROOT,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index, do in enumerate(what)
  ]
  for process in processes:
    assert process.stdout.readline() == "connected\n", process.communicate()
  return processes


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_named_by_all_others(tmp_path, victim):
  processes = _start(tmp_path, ["stay"] * 3)
  started = time.monotonic()
  processes[victim].send_signal(signal.SIGKILL)
  said = [process.communicate(timeout=30)[1] for process in processes]
  assert time.monotonic() - started < 10
  for index, process in enumerate(processes):
    if index != victim:
      assert process.returncode == 1
      who = rf"process id {processes[victim].pid} on {re.escape(os.uname().nodename)}"
      assert re.search(
        rf"Process {victim} of 3 \({who}\) was "
        r"lost at \d\d:\d\d:\d\d: it was killed, or its machine is gone.\nThis process ends, too; the same",
        said[index],
      ), said[index]


@pytest.mark.parametrize("do", ["leave", "raise"])
def test_an_error_of_one_process_is_said_by_all(tmp_path, do):
  processes = _start(tmp_path, ["stay", "stay", do])
  processes[2].stdin.close()
  processes[2].stdin = None
  said = [process.communicate(timeout=30)[1] for process in processes]
  for text in said[:2]:
    assert re.search(r"Process 2 of 3 \(.*\) ended at \d\d:\d\d:\d\d with: \w*Error: the disk is full", text)


def test_ordinary_ends_disturb_nobody(tmp_path):
  processes = _start(tmp_path, ["wait"] * 3)
  for process in processes:  # the others live on for a while
    process.stdin.close()
    process.stdin = None
    time.sleep(0.3)
  for process in processes:
    assert process.communicate(timeout=30) == ("", "") and process.returncode == 0


def test_strangers_are_not_listened_to(tmp_path):
  processes = _start(tmp_path, ["wait"] * 3)
  port = int((tmp_path / "port").read_text().split()[0])
  for data in (b"", b"\xff\x00\n", b'{"hello": "1 1 x", "secret": "guessed"}\n', b"[]\n", b'{"left": "x"}\n'):
    with socket.create_connection(("127.0.0.1", port)) as connection:
      connection.sendall(data)
  time.sleep(0.3)
  for process in processes:
    process.stdin.close()
    process.stdin = None
  for process in processes:
    assert process.communicate(timeout=30) == ("", "") and process.returncode == 0
