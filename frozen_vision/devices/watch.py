"""Notices that another process of the run is gone, and ends this one: a sentence says which it was, and when.

Every process holds a connection to process 0. The system closes it when a process ends, however it ends, so
that nothing is taken for dead that is only busy. A machine that vanishes with its connections is noticed by
the heartbeats of jax (`processes.HEARTBEAT_SECONDS`).
"""

import atexit
import contextlib
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from typing import Any, BinaryIO

_logger = logging.getLogger(__name__)
_CONNECTING_SECONDS = 60.0
_SPEAKING_SECONDS = 2.0


class Watch:
  """The connections of one process to the others: process 0 has one to each, the others one to process 0.

  A message is a line of JSON: {"hello": who} first, with the secret of process 0 from the others; {"left":
  reason} before a process ends itself for an error; {"gone": sentence} from process 0 to the rest; {"done":
  true} at an ordinary end.
  """

  def __init__(self, index: int, count: int):
    self._index, self._count = index, count
    self._streams: list[BinaryIO] = []
    self._lock = threading.Lock()  # of the streams, which several threads write to
    self._ending = threading.Lock()  # taken by the one that says the last sentence

  # Connections.

  def serve(self) -> str:
    """Takes connections from now on, in process 0.

    Returns:
      The port and a secret, for `connect`.
    """
    token = secrets.token_hex(16)
    is_dual = socket.has_dualstack_ipv6()
    server = socket.create_server(
      ("", 0), family=socket.AF_INET6 if is_dual else socket.AF_INET, dualstack_ipv6=is_dual
    )
    self._start(self._accept, server, token)
    return f"{server.getsockname()[1]} {token}"

  def connect(self, host: str, announced: str) -> None:
    """Connects to process 0.

    Args:
      host: its machine.
      announced: what `serve` returned there.

    Raises:
      OSError: there is no way to it.
    """
    port, token = announced.split()
    connection = socket.create_connection((host, int(port)), timeout=_CONNECTING_SECONDS)
    connection.settimeout(None)
    self._start(self._follow, connection, token, None)

  def _start(self, function: Any, *arguments: Any) -> None:
    threading.Thread(target=function, args=arguments, daemon=True, name="watch").start()

  def _accept(self, server: socket.socket, token: str) -> None:
    while True:
      connection, _ = server.accept()
      self._start(self._follow, connection, None, token)

  def _follow(self, connection: socket.socket, told: str | None, asked: str | None) -> None:
    """Reads what another process says until it ends.

    Args:
      told: the secret to say to it; None in process 0.
      asked: the secret that it must say; None of process 0.
    """
    stream = connection.makefile("rwb")
    try:
      _write(stream, {"hello": f"{self._index} {os.getpid()} {socket.gethostname()}", "secret": told})
      hello = _read(stream)
      if not isinstance(hello.get("hello"), str) or hello.get("secret") != asked:
        return  # somebody who found the port
    except (OSError, ValueError):
      return
    with self._lock:
      self._streams.append(stream)
    index, pid, host = hello["hello"].split()
    who = f"Process {index} of {self._count} (process id {pid} on {host})"
    how = None
    while how is None:
      try:
        message = _read(stream)
      except (OSError, ValueError):
        message = {}
      if message.get("done"):
        return
      if "gone" in message:
        self.end(message["gone"])
      if "left" in message:
        how = f"ended at {_now()} with: {message['left']}"
      elif not message:
        how = f"was lost at {_now()}: it was killed, or its machine is gone."
    self.end(f"{who} {how}")

  # Ends.

  def end(self, sentence: str) -> None:
    """Tells the others, says the sentence, and ends this process."""
    if not self._ending.acquire(blocking=False):
      return
    self._tell({"gone": sentence})
    text = f"{sentence}\nThis process ends, too; the same command continues from the newest checkpoint.\n"
    with contextlib.suppress(Exception):  # nobody may be there to read
      os.write(2, text.encode(errors="replace"))
      sys.stdout.flush()
    os._exit(1)

  def leave(self, reason: str) -> None:
    """Tells the others why this process is about to end by itself."""
    self._tell({"left": reason})

  def finish(self) -> None:
    """Tells the others that this process ends as it should, or which error ends it."""
    error = getattr(sys, "last_value", None)  # set by an error that nobody caught
    self._tell({"done": True} if error is None else {"left": f"{type(error).__name__}: {error}"})

  def give_way(self) -> None:
    """Waits for the sentence about another process, whose end may be what this process fails for."""
    time.sleep(_SPEAKING_SECONDS)

  def _tell(self, message: dict[str, Any]) -> None:
    with self._lock:
      for stream in self._streams:
        with contextlib.suppress(OSError, ValueError):
          _write(stream, message)


def start(index: int, count: int, client: Any, coordinator: str) -> Watch | None:
  """Begins to watch the other processes of the run.

  Args:
    index, count: which process this is, and of how many.
    client: of jax's distributed service, through which the port is announced.
    coordinator: HOST:PORT of process 0.

  Returns:
    None where there is one process only, or no way to process 0.
  """
  if count == 1:
    return None
  watch, key = Watch(index, count), "frozen_vision/watch"
  if index == 0:
    client.key_value_set(key, watch.serve())
  else:
    try:
      announced = client.blocking_key_value_get(key, int(_CONNECTING_SECONDS * 1000))
      watch.connect(coordinator.rpartition(":")[0].strip("[]"), announced)
    except OSError as error:
      _logger.warning("The other processes are not watched, only heard from now and then: %s.", error)
      return None
  atexit.register(watch.finish)  # before jax's own, which waits for the others
  return watch


def _write(stream: BinaryIO, message: dict[str, Any]) -> None:
  stream.write(json.dumps(message).encode() + b"\n")
  stream.flush()


def _read(stream: BinaryIO) -> dict[str, Any]:
  """The next message; empty at the end of the connection."""
  line = stream.readline(1 << 20)
  found = json.loads(line) if line else {}
  return found if isinstance(found, dict) else {}


def _now() -> str:
  return time.strftime("%H:%M:%S")
