"""Processes of the command line that share what takes seconds, their imports.

A server imports the package once and forks for every start, before jax has computed anything. What it starts
is a process of its own, with its own variables, devices and threads, that a test can kill.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import json
import os
import pathlib
import runpy
import signal
import socket
import subprocess
import sys
import time
import warnings

from tests import figures

_ROOT = pathlib.Path(__file__).resolve().parent.parent
# What the command line imports, and what it imports only when needed.
_MODULES = (
  "frozen_vision.training.loop",
  "frozen_vision.probe",
  "frozen_vision.planning.plan",
  "frozen_vision.prediction.files",
  "frozen_vision.report.command",
  "frozen_vision.tasks.build",
  "frozen_vision.runs.curves",
  "tests.tiny",
)
_POLL_SECONDS = 0.02


class Process:
  """A running command line; `stdout` has what it says, standard error included, line by line."""

  def __init__(self, server: "Server", pid: int, stdout: int):
    self._server, self.pid = server, pid
    self.stdout = os.fdopen(stdout, encoding="utf-8", errors="replace")

  @property
  def returncode(self) -> int | None:
    """The status at its end, that of a signal negative; None while it runs."""
    return self._server.status(self.pid)

  def wait(self, timeout: float) -> int:
    """The status at its end; raises a TimeoutError where that does not come in so many seconds."""
    deadline = time.monotonic() + timeout
    while self.returncode is None:
      if time.monotonic() > deadline:
        raise TimeoutError(f"Process {self.pid} is running after {timeout} s.")
      time.sleep(_POLL_SECONDS)
    return self.returncode

  def communicate(self, timeout: float = 300) -> str:
    """The rest of what it says, and waits for its end."""
    output = self.stdout.read()
    self.wait(timeout)
    self.stdout.close()
    return output

  def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
      os.kill(self.pid, number)


class Server:
  """Starts processes by forking; see the module."""

  def __init__(self, connection: socket.socket):
    self._connection = connection
    self._replies = connection.makefile("r")
    self._statuses: dict[int, int] = {}

  def start(
    self,
    *arguments: object,
    module: str = "frozen_vision.main",
    environment: Mapping[str, str] | None = None,
    new_session: bool = False,
  ) -> Process:
    """Runs a module as a program, like `python -m MODULE ARGUMENTS`.

    Args:
      environment: variables that differ from those of the server.
      new_session: make it the leader of a session and of a group of its own.
    """
    reading, writing = os.pipe()
    request = dict(
      module=module,
      arguments=[str(argument) for argument in arguments],
      environment=dict(environment or {}),
      new_session=new_session,
    )
    data = json.dumps(request).encode()
    socket.send_fds(self._connection, [len(data).to_bytes(4, "little") + data], [writing])
    os.close(writing)
    while "started" not in (reply := json.loads(self._replies.readline())):
      self._statuses[reply["ended"]] = reply["status"]
    return Process(self, reply["started"], reading)

  def run(self, *arguments: object, **options) -> tuple[str, int]:
    """(what it says, its status) of `start`, at its end."""
    process = self.start(*arguments, **options)
    output = process.communicate()
    return output, process.returncode

  def status(self, pid: int) -> int | None:
    """The status of a process that has ended."""
    if pid not in self._statuses:
      data = b'{"look": true}'
      self._connection.sendall(len(data).to_bytes(4, "little") + data)
      while "looked" not in (reply := json.loads(self._replies.readline())):
        self._statuses[reply["ended"]] = reply["status"]
    return self._statuses.get(pid)


def fresh(environment: Mapping[str, str]) -> dict[str, str]:
  """Variables without those that imports of a test's own process set; they decide what a process prints."""
  return {
    name: value
    for name, value in environment.items()
    if name not in ("TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS")
  }


@contextlib.contextmanager
def serve(environment: Mapping[str, str] | None = None) -> Iterator[Server]:
  """A server, which ends what it started when it is left.

  Args:
    environment: variables that differ from those of this process.
  """
  ours, theirs = socket.socketpair()
  # Set already, so that no process starts itself again for it (`devices.huge_pages`).
  variables = fresh(os.environ) | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | dict(environment or {})
  with ours, theirs:
    process = subprocess.Popen(
      [sys.executable, "-m", __name__, str(theirs.fileno())],
      cwd=_ROOT,
      env=variables,
      pass_fds=[theirs.fileno()],
    )
    theirs.close()
    try:
      yield Server(ours)
    finally:
      ours.shutdown(socket.SHUT_RDWR)
      process.wait(timeout=60)


def _serve(connection: socket.socket) -> None:
  """Answers requests until the other end is closed, then kills what still runs."""
  for module in _MODULES:
    __import__(module)
  figures.draw_first_panels_alone()
  warnings.filterwarnings("ignore", "os.fork")  # jax warns; before the first computation forks are safe
  running: set[int] = set()
  while True:
    header, descriptors, _, _ = socket.recv_fds(connection, 4, 1)
    if not header:
      break
    request = json.loads(_read(connection, int.from_bytes(header, "little")))
    if "look" in request:
      answer = {"looked": True}
    else:
      child = os.fork()
      if not child:
        connection.close()
        _become(descriptors[0], **request)
      os.close(descriptors[0])
      running.add(child)
      answer = {"started": child}
    for pid in list(running):
      ended, status = os.waitpid(pid, os.WNOHANG)
      if ended:
        running.remove(pid)
        _say(connection, {"ended": pid, "status": os.waitstatus_to_exitcode(status)})
    _say(connection, answer)
  for pid in running:
    os.kill(pid, signal.SIGKILL)


def _read(connection: socket.socket, length: int) -> bytes:
  data = b""
  while len(data) < length:
    data += connection.recv(length - len(data))
  return data


def _say(connection: socket.socket, reply: Mapping[str, object]) -> None:
  connection.sendall(json.dumps(reply).encode() + b"\n")


def _become(
  output: int, module: str, arguments: Sequence[str], environment: Mapping[str, str], new_session: bool
) -> None:
  """Turns a fork of the server into the process that was asked for."""
  if new_session:
    os.setsid()
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  for descriptor in (1, 2):
    os.dup2(output, descriptor)
  os.close(output)
  # The server's own may lead into a file, which has other methods than a pipe.
  sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
  os.environ.update(environment)
  sys.argv = [module, *arguments]
  runpy.run_module(module, run_name="__main__")
  sys.exit()


if __name__ == "__main__":
  _serve(socket.socket(fileno=int(sys.argv[1])))
