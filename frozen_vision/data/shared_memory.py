"""Shared memory of loader workers, named by run: what a kill leaves behind can be found, and is removed.

Workers hand over batches in segments of shared memory, and wait for each other at named semaphores. The
system keeps both until somebody removes them, and where all processes of a run are killed at once nobody
does. So a process that has workers locks a file beside its segments, with whose name theirs begin: where
the lock is free, the process is gone and the segments are garbage.
"""

import atexit
from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import multiprocessing
import os
import pathlib
import re
import secrets

try:
  import fcntl
except ImportError:  # Windows, which removes segments with the last process that uses them
  fcntl = None

_FOLDER = pathlib.Path("/dev/shm")  # where Linux lists segments as files; others do not list them
_START = "frozen_vision-"
_OWNER = ".owner"
_LIBRARY = "library"  # the run of loaders outside of any workdir

_prefixes: list[str] = []  # of this process, the one in use last


@dataclasses.dataclass(frozen=True)
class Leftovers:
  """Segments, and semaphores, of processes that are gone: how many, and their bytes."""

  segments: int
  size: int


@contextlib.contextmanager
def of_run(workdir: str | os.PathLike[str]) -> Iterator[None]:
  """Names the segments of loaders in the block by a workdir, and first removes those of killed runs there."""
  remove_leftovers(workdir)
  with _owned(run_name(workdir)):
    yield


def prefix() -> str | None:
  """The start of the names of this process's segments; None where segments are not listed as files."""
  if not _prefixes:  # a loader outside of any run
    _remove(_LIBRARY)
    owner = contextlib.ExitStack()
    owner.enter_context(_owned(_LIBRARY))
    atexit.register(owner.close)
  return _prefixes[-1] if _prefixes else None


def remove_leftovers(workdir: str | os.PathLike[str] | None = None, *, dry_run: bool = False) -> Leftovers:
  """Removes the segments of processes that are gone.

  Args:
    workdir: of one run; None for all runs of this machine, as far as their files may be removed.
    dry_run: only count.
  """
  return _remove("*" if workdir is None else run_name(workdir), dry_run=dry_run)


def _remove(run: str, *, dry_run: bool = False) -> Leftovers:
  """`remove_leftovers` of the run of that name; `*` for all."""
  if fcntl is None:
    return Leftovers(0, 0)
  count = size = 0
  # In this order: who has segments now and no owner's file afterwards has ended.
  names = {name for path in _FOLDER.glob(f"*{_START}{run}-*") if (name := _name_of(path))}
  for name in sorted(names):
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:  # OSError: locked, or another user's
      owner = _FOLDER / f"{name}{_OWNER}"
      with contextlib.suppress(FileNotFoundError):
        fcntl.flock(stack.enter_context(open(owner, "rb")), fcntl.LOCK_EX | fcntl.LOCK_NB)
      for segment in _segments(name):
        found = segment.stat().st_size
        if not dry_run:
          segment.unlink()
        count, size = count + 1, size + found
      if not dry_run:
        owner.unlink(missing_ok=True)
  return Leftovers(count, size)


def _segments(name: str) -> list[pathlib.Path]:
  """Segments and semaphores of the process with that name."""
  return [*_FOLDER.glob(f"{name}-*"), *_FOLDER.glob(f"sem.{name}-*")]


def _name_of(path: pathlib.Path) -> str | None:
  """The name of the process that a segment, a semaphore or an owner's file belongs to."""
  found = re.fullmatch(rf"(?:sem\.)?({_START}.+?-[0-9a-f]{{8}})(?:-.*|{re.escape(_OWNER)})", path.name)
  return found and found[1]


@contextlib.contextmanager
def _owned(run: str) -> Iterator[None]:
  """Owns a prefix of names in the block; the lock goes with the process, however it ends."""
  if fcntl is None or not os.access(_FOLDER, os.W_OK):
    yield
    return
  name = f"{_START}{run}-{secrets.token_hex(4)}"
  owner = _FOLDER / f"{name}{_OWNER}"
  aside = owner.with_suffix(".new")
  with open(aside, "xb") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    aside.rename(owner)  # only now, so that nobody finds it without a lock
    _prefixes.append(f"{name}-")
    # Where multiprocessing keeps the beginning of names of semaphores; it has no public name for it.
    names = multiprocessing.current_process()._config
    before, names["semprefix"] = names.get("semprefix"), f"/{name}-"
    try:
      yield
    finally:
      _prefixes.remove(f"{name}-")
      names["semprefix"] = before
      if not _segments(name):  # else a worker has not ended yet: whoever comes next finds the file unlocked
        owner.unlink(missing_ok=True)


def run_name(workdir: str | os.PathLike[str]) -> str:
  """A short name for the run in a workdir; the workdir may be gone."""
  return hashlib.sha256(os.fsencode(os.path.realpath(workdir))).hexdigest()[:12]
