"""Shards: files of equally shaped records that are whole or absent, named by a digest of their bytes.

A shard is a `.safetensors` file whose tensors have one row for each record. Its name is
`SHA256.safetensors`, the digest of everything in it, so that a byte that was changed anywhere, header
included, is noticed when the shard is verified. It is read through a memory map.
"""

from collections.abc import Mapping
import hashlib
import json
import math
import os
import pathlib

import numpy as np

from frozen_vision.files import atomic, formats

SUFFIX = ".safetensors"
_NAMES = {dtype: name for name, dtype in formats.SAFETENSORS_DTYPES.items()}
_MAX_HEADER_BYTES = 1 << 20


def check_dtype(name: str, dtype: np.dtype) -> None:
  """Raises a TypeError for an array of a dtype that shards do not store."""
  if np.dtype(dtype) not in _NAMES:
    raise TypeError(f"{name} is {dtype}; shards store {', '.join(sorted(map(str, _NAMES)))}.")


def write(
  folder: str | os.PathLike, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> pathlib.Path:
  """Writes one shard, synced to the disk before it has its name.

  Args:
    folder: created if absent.
    arrays: each with one row per record.
    metadata: texts that the header keeps.

  Returns:
    Its path.

  Raises:
    TypeError: a dtype that shards do not store.
    ValueError: arrays of different lengths.
    OSError: such as a full disk; nothing is left then.
  """
  rows = {len(array) for array in arrays.values()}
  if len(rows) != 1:
    raise ValueError(f"The arrays of a shard have {sorted(rows)} rows; expected one number.")
  header, offset, parts = {"__metadata__": dict(metadata)}, 0, []
  # Wide numbers first, so that every array begins at a multiple of its item's size.
  for name, array in sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize):
    check_dtype(name, array.dtype)
    parts.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    end = offset + array.nbytes
    header[name] = dict(dtype=_NAMES[array.dtype], shape=list(array.shape), data_offsets=[offset, end])
    offset = end
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  start = len(text).to_bytes(8, "little") + text
  digest = hashlib.sha256(start)
  for part in parts:
    digest.update(part)
  path = pathlib.Path(folder) / f"{digest.hexdigest()}{SUFFIX}"
  with atomic.open_aside(path) as file:
    file.write(start)
    for part in parts:
      file.write(part)
  return path


class Shard:
  """A shard that is open for reading; nothing but its header is read until it is asked for.

  Attributes:
    path: the file.
    arrays: memory-mapped arrays by name, one row for each record. Not to be trusted before `verify`.
    metadata: texts of the header.
  """

  def __init__(self, path: str | os.PathLike):
    """Reads the header.

    Raises:
      FileFormatError: a file that is too short or has no such header.
      OSError: it cannot be opened.
    """
    self.path = pathlib.Path(path)
    self._verified = False
    size = self.path.stat().st_size
    if size < 8:
      raise formats.FileFormatError(self.path, f"is no shard: it has {size} bytes.")
    self._bytes = np.memmap(self.path, np.uint8, mode="r")
    length = int.from_bytes(self._bytes[:8].tobytes(), "little")
    if length > min(self._bytes.size - 8, _MAX_HEADER_BYTES):
      raise formats.FileFormatError(self.path, f"is no whole shard: its header would have {length:,} bytes.")
    header = formats.parse_json(self._bytes[8 : 8 + length].tobytes(), self.path, "its header")
    try:
      self.metadata = dict(header.pop("__metadata__", {}))
      self.arrays = {name: self._view(entry, 8 + length) for name, entry in header.items()}
      lengths = {len(array) for array in self.arrays.values()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise formats.FileFormatError(
        self.path, f"is no whole shard: its header is damaged ({error})."
      ) from error
    if len(lengths) != 1:
      raise formats.FileFormatError(self.path, f"is no shard: its arrays have {sorted(lengths)} rows.")

  def _view(self, entry: Mapping[str, object], start: int) -> np.ndarray:
    dtype, shape = formats.SAFETENSORS_DTYPES[entry["dtype"]], tuple(map(int, entry["shape"]))
    first, last = map(int, entry["data_offsets"])
    if not 0 <= first <= last <= self._bytes.size - start or min(shape) < 0:
      raise ValueError("an array lies outside of the file")
    if last - first != math.prod(shape) * dtype.itemsize:
      raise ValueError("an array has another size than its shape")
    return np.ndarray(shape, dtype, buffer=self._bytes[start + first : start + last])

  def __len__(self) -> int:
    return len(next(iter(self.arrays.values())))

  def verify(self) -> None:
    """Compares the bytes with the digest in the name, at the first call only.

    Raises:
      FileFormatError: they differ.
    """
    if self._verified:
      return
    found = hashlib.sha256(self._bytes).hexdigest()
    if found != self.path.stem:
      raise formats.FileFormatError(self.path, f"is damaged: its bytes have the digest {found}.")
    self._verified = True
