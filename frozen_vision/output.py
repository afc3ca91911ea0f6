"""Standard output that cannot end a program (no reader, closed, ASCII only), and progress on stderr."""

import logging
import os
import sys
from typing import Any


class _Output:
  """Standard output that goes on without a reader: what is written after that is dropped, said once."""

  def __init__(self, stream: Any):
    self._stream = stream

  def write(self, text: str) -> int:
    try:
      self._stream.write(text)
      self._stream.flush()
    except (BrokenPipeError, ValueError):  # ValueError: it was closed here
      self._leave()
    return len(text)

  def flush(self) -> None:
    try:
      self._stream.flush()
    except (BrokenPipeError, ValueError):
      self._leave()

  def _leave(self) -> None:
    # The rest of the stream's buffer would fail again at exit: its file becomes the null device.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
      os.dup2(nowhere, self._stream.fileno())
      os.close(nowhere)
    except (OSError, ValueError):
      self._stream = os.fdopen(nowhere, "w")
    try:
      print("Nobody reads the output any more; the program goes on without it.", file=sys.stderr, flush=True)
    except (OSError, ValueError):
      pass

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


def protect() -> None:
  """Makes printing safe for the rest of the program; to be called once, at its start."""
  if sys.stdout is None:  # closed when the program was started
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 open as long as the program runs
    return
  if hasattr(sys.stdout, "reconfigure"):
    sys.stdout.reconfigure(errors="backslashreplace")
  sys.stdout = _Output(sys.stdout)


def log_progress(logger: logging.Logger) -> None:
  """Prints what the package and a command's own logger say of their progress to stderr, with the time."""
  logging.basicConfig(
    level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
  )
  for each in (logging.getLogger("frozen_vision"), logger):  # the command's is `__main__`
    each.setLevel(logging.INFO)
