"""Looks at image files before a run begins, so that one that cannot be read is no surprise in the middle.

Both ends of a file are read in a fraction of a millisecond; what looks incomplete is decoded, which decides.
Damage in the middle of a file is found by `python -m frozen_vision.data.prepare`, which decodes all.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import concurrent.futures
import os
from typing import Any
import warnings

from frozen_vision.data import images

_THREADS = 16
# Further from its end a JPEG may have the end of an embedded thumbnail.
_TAIL_BYTES = 64
_HEAD_BYTES = 32
# Pixels from which decoding decides, since memory may be at issue.
_LARGE = 2**25


def check_files(
  paths: Iterable[str | os.PathLike[str]], names: Iterable[str]
) -> Iterator[images.ImageError | None]:
  """Yields, for every file in order, what is wrong with it, or None where nothing seems to be."""
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    yield from pool.map(check_file, paths, names)


def check_file(path: str | os.PathLike[str], name: str) -> images.ImageError | None:
  """The fault of an image file, or None where there seems to be none."""
  reason = images.unreadable(path)
  if reason is not None:
    return images.ImageError(name, reason, "missing")
  try:
    with open(path, "rb") as file:
      start = file.read(_HEAD_BYTES)
      size = file.seek(0, os.SEEK_END)
      file.seek(max(0, size - _TAIL_BYTES))
      tail = file.read()
  except OSError as error:
    return images.ImageError(name, f"cannot be read ({error.strerror})", "missing")
  return _fault(path, name, start, tail, size)


def check_bytes(data: bytes, name: str) -> images.ImageError | None:
  """The fault of an image file given as its bytes, or None where there seems to be none."""
  return _fault(data, name, data[:_HEAD_BYTES], data[-_TAIL_BYTES:], len(data))


def _fault(
  source: images.ImageSource, name: str, start: bytes, tail: bytes, size: int
) -> images.ImageError | None:
  """The fault of an image that does not end as its format asks for, or whose format is not known here."""
  is_complete = _END_OF.get(_format(start))
  if is_complete is not None and is_complete(tail, size, start):
    return None
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # Pillow comments on odd files at length
      images.decode_image(source, name=name)
  except images.ImageError as error:
    return error
  return None


def check_size(found: tuple[int, int], record: Mapping[str, Any], data: images.ImageSource) -> None:
  """Raises ImageError when an image's (height, width) is not that of its record."""
  expected = (record["height"], record["width"])
  if tuple(found) == expected:
    return
  reason = (
    f"is {found[1]} x {found[0]} pixels (width x height), but its annotations are for"
    f" {expected[1]} x {expected[0]}"
  )
  if tuple(found) == expected[::-1] and images.read_size(data, apply_exif=False) == expected:
    reason += (
      "; they seem to be made without the rotation that the file's EXIF tag asks for: remove the"
      " tag, or rotate the annotations"
    )
  raise images.ImageError(record["file_name"], reason, "wrong size")


def _format(start: bytes) -> str:
  if start.startswith(b"\xff\xd8\xff"):
    return "JPEG"
  if start.startswith(b"\x89PNG\r\n\x1a\n") and start[12:16] == b"IHDR":
    return "PNG"
  if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
    return "WEBP"
  return ""


def _png_pixels(start: bytes) -> int:
  return int.from_bytes(start[16:20], "big") * int.from_bytes(start[20:24], "big")


# (the last bytes, the size of the file, its first bytes) -> whether the file is all there.
_END_OF: dict[str, Callable[[bytes, int, bytes], bool]] = {
  "JPEG": lambda tail, size, start: b"\xff\xd9" in tail,
  "PNG": lambda tail, size, start: b"IEND\xaeB`\x82" in tail and _png_pixels(start) < _LARGE,
  "WEBP": lambda tail, size, start: int.from_bytes(start[4:8], "little") + 8 <= size,
}
