"""Files that are complete or absent: written under a temporary name, synced, and renamed."""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
from typing import Any, BinaryIO
import uuid

_SUFFIX = ".partial"


@contextlib.contextmanager
def path_aside(path: str | os.PathLike, *, sync: bool = True) -> Iterator[pathlib.Path]:
  """Gives a path beside `path`; the file written there takes the name `path` when the block ends well.

  A process that is killed in the block leaves what was at `path` before, and a hidden file beside it that
  `remove_leftovers` finds. An error in the block removes that file.

  Args:
    path: its folder is created if absent.
    sync: wait until the bytes are on the disk before the name changes, so that a crash of the machine cannot
      leave an empty file under it. False for the many small files of one result, such as pictures.

  Raises:
    OSError: with the path in its text, such as a full disk.
  """
  path = pathlib.Path(path)
  # A short name of its own, so that a long `path.name` still has room for the suffix.
  aside = path.with_name(f".{path.name[:32]}.{uuid.uuid4().hex[:12]}{_SUFFIX}")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    yield aside
    if sync:
      with open(aside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)
  except OSError as error:
    if error.filename is None or os.fspath(error.filename) == os.fspath(aside):
      raise type(error)(error.errno, error.strerror or str(error), os.fspath(path)) from error
    raise
  finally:
    with contextlib.suppress(OSError):
      aside.unlink(missing_ok=True)


@contextlib.contextmanager
def open_aside(path: str | os.PathLike, *, sync: bool = True) -> Iterator[BinaryIO]:
  """Opens a new binary file that takes the name `path` when the block ends well; see `path_aside`."""
  with path_aside(path, sync=sync) as aside, open(aside, "xb") as file:
    yield file


def write_bytes(path: str | os.PathLike, data: bytes | bytearray, *, sync: bool = True) -> None:
  """Writes a whole file at once; see `open_aside`."""
  with open_aside(path, sync=sync) as file:
    file.write(data)


def write_text(path: str | os.PathLike, text: str, *, sync: bool = True) -> None:
  """Writes a whole UTF-8 text at once; see `open_aside`."""
  write_bytes(path, text.encode(), sync=sync)


def write_json(
  path: str | os.PathLike, content: Any, *, indent: int | None = None, allow_nan: bool = False
) -> None:
  """Writes JSON without spaces, or indented by `indent` and ended by a line break.

  Raises:
    ValueError: NaN or an infinity, which JSON has no word for, unless `allow_nan`: Python reads them.
  """
  separators = (",", ":") if indent is None else None
  text = json.dumps(content, indent=indent, separators=separators, allow_nan=allow_nan)
  write_text(path, text if indent is None else text + "\n")


def remove_leftovers(folder: str | os.PathLike) -> list[pathlib.Path]:
  """Removes what killed writers left in a folder (not below it), and returns their paths.

  Nobody else may be writing there.
  """
  found = sorted(pathlib.Path(folder).glob(f".*{_SUFFIX}"))
  for path in found:
    path.unlink(missing_ok=True)
  return found
