"""Reads tensors from TensorFlow's checkpoints (`ckpt-N.index` and `ckpt-N.data-*`), without TensorFlow.

The index is a table of sorted strings as LevelDB writes it: blocks of keys that share prefixes, each value a
protocol buffer with the type, shape and place of a tensor. Nothing in one is executed. Every size and offset
is compared with the bytes that are there before anything is read, and the checksums of index and tensors are
verified. Formats: tensorflow/core/lib/io/table_format.txt and
tensorflow/core/protobuf/tensor_bundle.proto of TensorFlow 2.21.
"""

from collections.abc import Iterator
import math
import pathlib
import re

import ml_dtypes
import numpy as np

from frozen_vision.files import crc32c
from frozen_vision.files.formats import FileFormatError
from frozen_vision.files.tensors import LazyTensor

INDEX_SUFFIX = ".index"
# What an object-based checkpoint puts behind the path of a variable.
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
_MAGIC = 0xDB4775248B80FB57
_FOOTER_BYTES, _TRAILER_BYTES = 48, 5
# A network of a thousand layers has an index of half a megabyte.
_MAX_INDEX_BYTES, _MAX_KEY_BYTES, _MAX_KEYS, _MAX_SHARDS = 16 << 20, 1024, 1 << 17, 10_000
# Numbers of tensorflow/core/framework/types.proto.
_DTYPES = {
  1: np.dtype(np.float32),
  2: np.dtype(np.float64),
  3: np.dtype(np.int32),
  4: np.dtype(np.uint8),
  5: np.dtype(np.int16),
  6: np.dtype(np.int8),
  9: np.dtype(np.int64),
  10: np.dtype(np.bool_),
  14: np.dtype(ml_dtypes.bfloat16),
  19: np.dtype(np.float16),
}
_STRING = 7


def open_tensorflow(path: pathlib.Path) -> tuple[dict[str, LazyTensor], list[str]]:
  """Tensors by name, none of them read yet, and the names of what are no tensors of numbers.

  Args:
    path: the `.index` file; the data files are beside it.

  Returns:
    Names are as they are saved, without `/.ATTRIBUTES/VARIABLE_VALUE` at their ends.

  Raises:
    FileNotFoundError: a data file is missing.
    FileFormatError: damaged, hostile, or of another format.
  """
  if path.stat().st_size > _MAX_INDEX_BYTES:
    raise FileFormatError(
      path, f"has {path.stat().st_size:,} bytes; indices of at most {_MAX_INDEX_BYTES:,} are read."
    )
  index = _Reader(path, path.read_bytes())
  shards: list[pathlib.Path] = []
  found: dict[str, LazyTensor] = {}
  others = []
  for key, value in _entries(index):
    if not key:  # the header is the first entry
      shards = _shards(index, value)
      continue
    if not shards:
      raise FileFormatError(path, "has no header before its tensors.")
    name = key.decode(errors="backslashreplace").removesuffix(_VALUE)
    tensor = _tensor(index, name, value, shards)
    if tensor is None:
      others.append(name)
    elif name in found:
      raise FileFormatError(path, f"holds {name!r:.80} twice.")
    else:
      found[name] = tensor
  return found, others


# A field of a protocol buffer: a number, or where its bytes begin and end.
_Value = int | tuple[int, int]


class _Reader:
  """Bytes of an index; whatever reaches over their end raises FileFormatError."""

  def __init__(self, path: pathlib.Path, data: bytes):
    self.path = path
    self.data = data

  def error(self, problem: str) -> FileFormatError:
    return FileFormatError(self.path, f"is not a complete index of a TensorFlow checkpoint: {problem}.")

  def varint(self, at: int, end: int) -> tuple[int, int]:
    """(a number of seven bits a byte, the position behind it)."""
    value = 0
    for shift in range(0, 64, 7):
      if at >= end:
        raise self.error("a number reaches over its end")
      byte, at = self.data[at], at + 1
      value |= (byte & 127) << shift
      if byte < 128:
        return value, at
    raise self.error("a number has more than ten bytes")


def _entries(index: _Reader) -> Iterator[tuple[bytes, tuple[int, int]]]:
  """(key, (start, end) of its value) of the whole table, in its order."""
  size = len(index.data)
  if size < _FOOTER_BYTES or int.from_bytes(index.data[-8:], "little") != _MAGIC:
    raise index.error("it does not end with the number that such files end with")
  footer = size - _FOOTER_BYTES
  at = footer
  for _ in range(2):  # of the meta index, which is empty
    _, at = index.varint(at, size)
  block, at = index.varint(at, size)
  length, _ = index.varint(at, size)
  keys = 0
  for _, (start, end) in _block(index, block, length, footer):
    block, at = index.varint(start, end)
    length, _ = index.varint(at, end)
    for entry in _block(index, block, length, footer):
      keys += 1
      if keys > _MAX_KEYS:
        raise index.error(f"it has more than {_MAX_KEYS:,} keys")
      yield entry


def _block(index: _Reader, start: int, length: int, limit: int) -> Iterator[tuple[bytes, tuple[int, int]]]:
  """(key, (start, end) of its value) of one block, whose checksum is verified."""
  end = start + length
  if end + _TRAILER_BYTES > limit or length < 4:
    raise index.error("a block reaches over its end")
  if index.data[end] != 0:
    raise index.error("its blocks are compressed, which TensorFlow's checkpoints are not")
  stated = int.from_bytes(index.data[end + 1 : end + 5], "little")
  if crc32c.masked(index.data[start : end + 1]) != stated:
    raise index.error("the checksum of a block is wrong; fetch or copy the file again")
  restarts = int.from_bytes(index.data[end - 4 : end], "little")
  end -= 4 * (restarts + 1)
  at, key = start, b""
  while at < end:
    shared, at = index.varint(at, end)
    fresh, at = index.varint(at, end)
    length, at = index.varint(at, end)
    if shared > len(key) or shared + fresh > _MAX_KEY_BYTES or at + fresh + length > end:
      raise index.error("an entry does not fit its block")
    key = key[:shared] + index.data[at : at + fresh]
    at += fresh
    yield key, (at, at + length)
    at += length


def _fields(index: _Reader, place: tuple[int, int]) -> list[tuple[int, _Value]]:
  """(number, value) of each field of a protocol buffer."""
  at, end = place
  found: list[tuple[int, _Value]] = []
  while at < end:
    tag, at = index.varint(at, end)
    match tag & 7:
      case 0:
        value, at = index.varint(at, end)
      case 2:
        length, at = index.varint(at, end)
        value, at = (at, at + length), at + length
      case 5:
        value, at = int.from_bytes(index.data[at : at + 4], "little"), at + 4
      case 1:
        value, at = int.from_bytes(index.data[at : at + 8], "little"), at + 8
      case kind:
        raise index.error(f"a value has the unknown type {kind}")
    if at > end:
      raise index.error("a value reaches over its end")
    found.append((tag >> 3, value))
  return found


def _numbers(fields: list[tuple[int, _Value]]) -> dict[int, int]:
  return {number: value for number, value in fields if isinstance(value, int)}


def _messages(fields: list[tuple[int, _Value]], wanted: int) -> list[tuple[int, int]]:
  return [value for number, value in fields if number == wanted and not isinstance(value, int)]


def _shards(index: _Reader, place: tuple[int, int]) -> list[pathlib.Path]:
  """The data files, by the header; raises a FileNotFoundError where one is missing."""
  path, header = index.path, _numbers(_fields(index, place))
  count = header.get(1, 0)
  if not 1 <= count <= _MAX_SHARDS:
    raise FileFormatError(path, f"says that it has {count:,} data files.")
  if header.get(2, 0) != 0:
    raise FileFormatError(path, "has numbers in big-endian order, which are not read.")
  stem = path.name.removesuffix(INDEX_SUFFIX)
  shards = [path.with_name(f"{stem}.data-{shard:05d}-of-{count:05d}") for shard in range(count)]
  absent = [shard.name for shard in shards if not shard.is_file()]
  if absent:
    raise FileNotFoundError(
      f"{path} is the index of {count} data files, of which {len(absent)} are not beside it: "
      f"{', '.join(absent[:5])}."
    )
  return shards


def _tensor(
  index: _Reader, name: str, place: tuple[int, int], shards: list[pathlib.Path]
) -> LazyTensor | None:
  """One tensor of numbers; None for strings."""
  path, fields = index.path, _fields(index, place)
  entry = _numbers(fields)
  kind, shard, offset, size = (entry.get(number, 0) for number in (1, 3, 4, 5))
  if kind == _STRING:
    return None
  if _messages(fields, 7):
    raise FileFormatError(path, f"holds {name!r:.80} in slices, which are not read.")
  if kind not in _DTYPES:
    raise FileFormatError(path, f"holds {name!r:.80} of TensorFlow's type {kind}, which is not read.")
  dtype, shape = _DTYPES[kind], _shape(index, fields)
  if shard >= len(shards):
    raise FileFormatError(path, f"places {name!r:.80} in data file {shard} of {len(shards)}.")
  available = shards[shard].stat().st_size
  if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size or offset + size > available:
    raise FileFormatError(
      path,
      f"places {name!r:.80}, {dtype} of shape {shape}, in {size:,} bytes at {offset:,} of "
      f"{shards[shard].name}, which has {available:,}.",
    )
  stated = entry.get(6, 0)

  def read() -> np.ndarray:
    with open(shards[shard], "rb") as file:
      file.seek(offset)
      data = file.read(size)
    if len(data) != size or crc32c.masked(data) != stated:
      raise FileFormatError(
        shards[shard], f"is damaged: the checksum of {name!r:.80} is wrong. Fetch or copy it again."
      )
    return np.frombuffer(data, dtype).reshape(shape)

  return LazyTensor(shape, dtype, read)


def _shape(index: _Reader, fields: list[tuple[int, _Value]]) -> tuple[int, ...]:
  """The shape that the TensorShapeProto in a tensor's entry states."""
  sizes = [
    _numbers(_fields(index, dimension)).get(1, 0)
    for shape in _messages(fields, 2)
    for dimension in _messages(_fields(index, shape), 2)
  ]
  return tuple(size - (1 << 64) if size >> 63 else size for size in sizes)


def index_of_data(path: pathlib.Path) -> pathlib.Path | None:
  """The index that belongs to a data file, by its name; None for other files."""
  match = re.fullmatch(r"(.+)\.data-\d{5}-of-\d{5}", path.name)
  return path.with_name(match[1] + INDEX_SUFFIX) if match else None
