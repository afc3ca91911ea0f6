"""What a run may leave behind when it is killed: processes and shared memory."""

from collections.abc import Callable
import os
import pathlib
import time

from frozen_vision.data import shared_memory


def marked(marker: str) -> list[int]:
  """Processes that were started with a text in their environment and are no zombies; needs /proc."""
  found = []
  for folder in pathlib.Path("/proc").iterdir():
    try:
      if folder.name.isdecimal() and marker.encode() in (folder / "environ").read_bytes():
        if (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
          found.append(int(folder.name))
    except OSError:  # it has ended, or is another user's
      pass
  return found


def segments(workdir: str | os.PathLike) -> list[str]:
  """Names of shared memory and semaphores of a run, not those of others on this machine."""
  return [path.name for path in pathlib.Path("/dev/shm").glob(f"*{shared_memory.run_name(workdir)}*")]


def wait_until_none(find: Callable[[], list], seconds: float = 30) -> list:
  """Waits until nothing is found, and returns what is after so many seconds."""
  deadline = time.monotonic() + seconds
  while (found := find()) and time.monotonic() < deadline:
    time.sleep(0.1)
  return found
