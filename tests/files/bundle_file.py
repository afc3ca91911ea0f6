"""Writes checkpoints of TensorFlow's format, whole or damaged on purpose."""

from collections.abc import Mapping
import pathlib

import numpy as np

from frozen_vision.files import crc32c

_TYPES = {"float32": 1, "float64": 2, "int32": 3, "int64": 9}
_MAGIC = 0xDB4775248B80FB57


def varint(value: int) -> bytes:
  """A number of seven bits a byte."""
  found = b""
  while value > 127:
    found, value = found + bytes([value & 127 | 128]), value >> 7
  return found + bytes([value])


def message(fields: Mapping[int, int | bytes]) -> bytes:
  """A protocol buffer of numbers and bytes."""
  found = b""
  for number, value in fields.items():
    if isinstance(value, int):
      found += varint(number << 3) + varint(value)
    else:
      found += varint(number << 3 | 2) + varint(len(value)) + value
  return found


def entry(array: np.ndarray, at: int, **changes: int | bytes) -> bytes:
  """The value of a tensor's key; `changes` by field: dtype, shape, shard, offset, size, slices."""
  sizes = b"".join(message({2: message({1: size})}) for size in array.shape)
  fields = {
    "dtype": _TYPES[array.dtype.name],
    "shape": sizes,
    "shard": 0,
    "offset": at,
    "size": array.nbytes,
  }
  fields |= changes
  numbers = {"dtype": 1, "shape": 2, "shard": 3, "offset": 4, "size": 5, "slices": 7}
  checksum = crc32c.masked(array.tobytes()).to_bytes(4, "little")
  return message({numbers[name]: value for name, value in fields.items()}) + bytes([6 << 3 | 5]) + checksum


def table(entries: list[tuple[bytes, bytes]]) -> bytes:
  """An index with one block of such keys and values; keys share what they begin with."""
  block, last = b"", b""
  for key, value in entries:
    shared = next((i for i, (a, b) in enumerate(zip(last, key)) if a != b), min(len(last), len(key)))
    block += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
    last = key
  return raw_table(block)


def raw_table(block: bytes, compression: int = 0) -> bytes:
  """An index around the bytes of one block without its restarts."""
  found = _sealed(block + (0).to_bytes(4, "little") + (1).to_bytes(4, "little"), compression)
  length = len(found) - 5
  meta, meta_at = _sealed((0).to_bytes(4, "little")), len(found)
  handle = varint(0) + varint(length)
  index = varint(0) + varint(3) + varint(len(handle)) + b"zzz" + handle
  index = _sealed(index + (0).to_bytes(4, "little") + (1).to_bytes(4, "little"))
  handles = varint(meta_at) + varint(len(meta) - 5) + varint(meta_at + len(meta)) + varint(len(index) - 5)
  return found + meta + index + handles.ljust(40, b"\0") + _MAGIC.to_bytes(8, "little")


def _sealed(block: bytes, compression: int = 0) -> bytes:
  block += bytes([compression])
  return block + crc32c.masked(block).to_bytes(4, "little")


HEADER = message({1: 1, 3: message({1: 1})})


def write(path: pathlib.Path, arrays: Mapping[str, np.ndarray], header: bytes = HEADER) -> pathlib.Path:
  """Writes an object-based checkpoint of variables: the index at `path`, and its data file."""
  data, entries = b"", [(b"", header)]
  for name in sorted(arrays):
    array = np.asarray(arrays[name])
    entries.append((f"{name}/.ATTRIBUTES/VARIABLE_VALUE".encode(), entry(array, len(data))))
    data += array.tobytes()
  path.write_bytes(table(entries))
  path.with_name(f"{path.stem}.data-00000-of-00001").write_bytes(data)
  return path
