"""A lock for one writer at a time, which ends with its process and says who holds it.

On one machine the system's lock (`flock`) decides, and ends with its process, however that ends. Across
machines that share a disk, `flock` holds where the disk knows it (NFS since Linux 2.6.12, Lustre with its
mount option); where it does not, a sign of life decides: the holder renews the time of the lock's file, and a
file of another machine that is younger than a minute is respected.
"""

from collections.abc import Iterator
import contextlib
import json
import logging
import os
import pathlib
import socket
import threading
import time

try:
  import fcntl
except ImportError:  # Windows: the sign of life alone decides.
  fcntl = None

_logger = logging.getLogger(__name__)
_RENEWED_EVERY_S = 15.0
_RESPECTED_FOR_S = 60.0


class LockedError(OSError):
  """Somebody else is writing there."""


@contextlib.contextmanager
def hold(path: str | os.PathLike, what: str) -> Iterator[None]:
  """Holds the lock whose file is `path`; the file goes when the block ends.

  Args:
    path: its folder is created if absent; a created one is removed at the end if it is empty.
    what: what is written while the lock is held, for the error: `the run in DIR`.

  Raises:
    LockedError: somebody holds it; says who, since when, and what to do. Nothing is changed then.
  """
  path = pathlib.Path(path)
  created = _create_folder(path.parent)
  try:
    descriptor = _acquire(path, what)
  except BaseException:
    _remove_folders(created)
    raise
  stop = threading.Event()
  renewing = threading.Thread(target=_renew, args=(descriptor, stop), daemon=True, name="lock")
  renewing.start()
  try:
    yield
  finally:
    stop.set()
    renewing.join()
    with contextlib.suppress(OSError):
      path.unlink()  # while it is held, so that no one waits for a file that is gone
    os.close(descriptor)
    _remove_folders(created)


def _create_folder(folder: pathlib.Path) -> list[pathlib.Path]:
  """The folders that had to be created, innermost first."""
  created = []
  while not folder.exists():
    created.append(folder)
    folder = folder.parent
  if created:
    created[0].mkdir(parents=True, exist_ok=True)
  return created


def _remove_folders(folders: list[pathlib.Path]) -> None:
  with contextlib.suppress(OSError):  # it is not empty
    for folder in folders:
      folder.rmdir()


def _acquire(path: pathlib.Path, what: str) -> int:
  """Opens the file of the lock, locks it, and returns its descriptor."""
  while True:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
      if not _flock(descriptor):
        raise LockedError(_sentence(path, what, _holder(descriptor), certain=True))
      if not _is_same(descriptor, path):  # its holder removed it between our opening and our locking
        os.close(descriptor)
        continue
      holder = _holder(descriptor)
      age = _age(descriptor, path)
      if holder and holder.get("host") != socket.gethostname() and age < _RESPECTED_FOR_S:
        raise LockedError(_sentence(path, what, holder, certain=False, age=age))
      _sign(descriptor)
      return descriptor
    except BaseException as error:
      with contextlib.suppress(OSError):
        os.close(descriptor)
      if isinstance(error, OSError) and error.filename is None and error.errno is not None:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error  # a full disk
      raise


def _flock(descriptor: int) -> bool:
  """Whether the system gives the lock, or has none to give on this disk."""
  if fcntl is None:
    return True
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError as error:  # a disk without locks
    _logger.warning("This disk has no locks (%s); a sign of life stands in for one.", error.strerror)
  return True


def _is_same(descriptor: int, path: pathlib.Path) -> bool:
  try:
    return os.path.samestat(os.fstat(descriptor), os.stat(path))
  except FileNotFoundError:
    return False


def _sign(descriptor: int) -> None:
  """Writes who holds the lock."""
  holder = {
    "host": socket.gethostname(),
    "process": os.getpid(),
    "since": time.strftime("%Y-%m-%d %H:%M:%S"),
  }
  os.ftruncate(descriptor, 0)
  os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
  os.fsync(descriptor)


def _holder(descriptor: int) -> dict[str, object]:
  """The holder as the file of the lock names it; empty where it names none or is damaged."""
  try:
    found = json.loads(os.pread(descriptor, 4096, 0))
  except (ValueError, OSError):
    return {}
  return found if isinstance(found, dict) else {}


def _age(descriptor: int, path: pathlib.Path) -> float:
  """Seconds since the last sign of life, by the clock of the disk: those of two machines may differ."""
  probe = path.with_name(f".{path.name[:32]}.{os.getpid()}.clock")
  try:
    probe.touch()
    now = probe.stat().st_mtime
  except OSError:
    now = time.time()
  finally:
    probe.unlink(missing_ok=True)
  return now - os.fstat(descriptor).st_mtime


def _renew(descriptor: int, stop: threading.Event) -> None:
  """Gives a sign of life from time to time."""
  while not stop.wait(_RENEWED_EVERY_S):
    with contextlib.suppress(OSError):
      os.utime(descriptor)


def _sentence(
  path: pathlib.Path, what: str, holder: dict[str, object], *, certain: bool, age: float = 0.0
) -> str:
  host, process, since = (holder.get(key, "unknown") for key in ("host", "process", "since"))
  who = f"process {process} on {host} since {since}" if holder else "another process"
  if certain:
    return f"{who} is writing {what}. Wait for it or end it; nothing was changed here."
  return (
    f"{who} seems to be writing {what}: its last sign of life is {age:.0f} s old. If it is dead, try again "
    f"in a minute or delete {path}; nothing was changed here."
  )
