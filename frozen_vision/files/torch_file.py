"""Reads tensors from PyTorch's `.pth` without PyTorch, and without running anything the file contains.

A `.pth` is a pickle that names the tensors, and their numbers: since PyTorch 1.6 a zip with one stored member
per storage, before it the pickle and the numbers one after the other. Every size, offset, stride and count in
it is compared with the bytes that are there before anything is allocated or viewed.
"""

from collections.abc import Callable
import dataclasses
import math
import mmap
import pathlib
from typing import Any
import zipfile

import ml_dtypes
import numpy as np

from frozen_vision.files import pickle_data, state_dicts
from frozen_vision.files.formats import FileFormatError
from frozen_vision.files.tensors import LazyTensor

_STORAGES = {
  "DoubleStorage": np.float64,
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}
_MAX_PICKLE_BYTES = 256 << 20
_MAX_DIMS = 32
# A tensor that repeats its storage (a stride of 0) may be this large, whatever its storage has.
_MAX_REPEATED = 1 << 20
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


class _Problem(Exception):
  """A fault of a file, as the rest of a sentence."""


@dataclasses.dataclass
class _Storage:
  """Numbers of one type, still on disk.

  Attributes:
    key: its name in the file.
    count: how many there are.
    read: gives them; None until it is known where they lie.
  """

  key: str
  dtype: np.dtype
  count: int
  read: Callable[[], np.ndarray] | None = None


def open_torch(path: pathlib.Path, part: str | None = None) -> tuple[dict[str, LazyTensor], list[str]]:
  """Tensors by name, none of them read yet, and the names of everything else in the file.

  Args:
    part: the key of the state dict, where the file has several (`state_dicts.choose`).

  Raises:
    FileFormatError: not a complete file of this format, or one without a dictionary of tensors.
  """
  try:
    content, unknown = (_read_zip if zipfile.is_zipfile(path) else _read_legacy)(path)
  except (_Problem, pickle_data.PickleError) as problem:
    raise FileFormatError(path, f"cannot be read as a .pth file: {problem}.") from problem
  except Exception as error:  # whatever a crafted zip or pickle makes its readers raise
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    raise FileFormatError(path, f"cannot be read as a .pth file: {reason}.") from error
  tensors, others = state_dicts.choose(content, path, part, sorted(unknown))
  inert = [f"{name} (a name in the pickle, not imported)" for name in sorted(unknown)]
  return tensors, others + inert


def _known(tensor: Callable[..., LazyTensor]) -> dict[str, pickle_data.Global]:
  """The names that tensors are made of."""
  names = {
    f"torch.{name}": pickle_data.Global(f"torch.{name}", value=np.dtype(dtype))
    for name, dtype in _STORAGES.items()
  }
  calls = {
    "torch.Size": _size,
    "torch._utils._rebuild_tensor_v2": tensor,
    "torch._utils._rebuild_tensor": tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
  }
  return names | {name: pickle_data.Global(name, call) for name, call in calls.items()}


def _size(dims: Any = ()) -> tuple[int, ...]:
  return _integers(dims, "a size")


def _parameter(tensor: Any, *unused: Any) -> Any:
  del unused  # requires_grad, hooks and state
  return tensor


def _integers(values: Any, what: str) -> tuple[int, ...]:
  """A tuple of a few integers of at least 0.

  Raises:
    _Problem: something else.
  """
  if type(values) not in (tuple, list) or len(values) > _MAX_DIMS:
    raise _Problem(f"{what} that is no tuple of at most {_MAX_DIMS} integers")
  for value in values:
    if type(value) is not int or not 0 <= value < 1 << 62:
      raise _Problem(f"{what} with a number that is no length: {value!r:.40}")
  return tuple(values)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *unused: Any) -> LazyTensor:
  """A view of a storage; it lies inside of it, and is no larger than what it views."""
  del unused  # requires_grad, hooks and metadata
  if not isinstance(storage, _Storage):
    raise _Problem("a tensor without a storage")
  (offset,) = _integers((offset,), "an offset")
  shape, strides = _integers(shape, "a shape"), _integers(strides, "strides")
  if len(shape) != len(strides):
    raise _Problem(f"a tensor of shape {shape} with {len(strides)} strides")
  count = math.prod(shape)
  last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides))
  if count and last >= storage.count:
    raise _Problem(
      f"a tensor of shape {shape}, strides {strides} and offset {offset} leaves its storage "
      f"{storage.key!r:.40} of {storage.count} numbers"
    )
  if count > max(storage.count, _MAX_REPEATED):
    raise _Problem(f"a tensor of shape {shape} in a storage of {storage.count} numbers")

  def read() -> np.ndarray:
    if not count:
      return np.zeros(shape, storage.dtype)
    flat = storage.read()
    steps = tuple(stride * storage.dtype.itemsize for stride in strides)
    return np.lib.stride_tricks.as_strided(flat[offset:], shape, steps).copy()

  return LazyTensor(shape, storage.dtype, read)


def _storage_of(identity: Any) -> tuple[np.dtype, str, int]:
  """(dtype, key, count) of a persistent id."""
  if type(identity) is not tuple or len(identity) < 5 or identity[0] != "storage":
    raise _Problem("a persistent id that is no storage")
  _, kind, key, _, count = identity[:5]
  if not isinstance(kind, pickle_data.Global) or not isinstance(kind.value, np.dtype):
    name = kind.name if isinstance(kind, (pickle_data.Global, pickle_data.Unknown)) else type(kind).__name__
    raise _Problem(f"a storage of an unknown kind, {name}")
  if not isinstance(key, str):
    raise _Problem("a storage whose name is no text")
  (count,) = _integers((count,), "a storage's length")
  return kind.value, key, count


# Since PyTorch 1.6: a zip.


def _read_zip(path: pathlib.Path) -> tuple[Any, set[str]]:
  """(what the pickle of a zip says, names it has that are unknown)."""
  size = path.stat().st_size
  archive = zipfile.ZipFile(path)  # stays open while a tensor of it can be read
  members = {info.filename: info for info in archive.infolist()}
  root = next((name[: -len("data.pkl")] for name in members if name.endswith("/data.pkl")), None)
  if root is None:
    raise _Problem("it has no data.pkl; TorchScript and other zip files are not read")

  def member(name: str) -> zipfile.ZipInfo:
    if name not in members:
      raise _Problem(f"member {name!r:.60} is missing")
    info = members[name]
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
      raise _Problem(f"member {name!r:.60} is compressed or lies about its size; PyTorch stores it as it is")
    if info.header_offset + info.file_size > size:
      raise _Problem(f"member {name!r:.60} of {info.file_size:,} bytes leaves the file of {size:,}")
    return info

  def read_member(info: zipfile.ZipInfo) -> bytes:
    try:
      data = archive.read(info)
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError) as error:
      raise FileFormatError(path, f"is damaged: {error}. Fetch or copy it again.") from error
    if len(data) != info.file_size:
      raise FileFormatError(
        path, f"is damaged: member {info.filename} has {len(data):,} of {info.file_size:,} bytes."
      )
    return data

  if root + "byteorder" in members:
    order = member(root + "byteorder")
    if order.file_size > 16 or read_member(order) != b"little":
      raise _Problem("it is big-endian")

  def storage(identity: Any) -> _Storage:
    dtype, key, count = _storage_of(identity)
    info = member(f"{root}data/{key}")
    if info.file_size != count * dtype.itemsize:
      raise _Problem(f"storage {key!r:.40} has {info.file_size:,} bytes, expected {count:,} of {dtype}")

    def read() -> np.ndarray:
      return np.frombuffer(read_member(info), dtype)

    return _Storage(key, dtype, count, read)

  pickled = member(root + "data.pkl")
  if pickled.file_size > _MAX_PICKLE_BYTES:
    raise _Problem(f"its pickle has {pickled.file_size:,} bytes; at most {_MAX_PICKLE_BYTES:,} are read")
  reader = pickle_data.Reader(read_member(pickled), _known(_tensor), storage)
  return reader.read(), reader.unknown


# Before PyTorch 1.6: pickles (magic number, version, system, content, keys of storages), then the storages.


def _read_legacy(path: pathlib.Path) -> tuple[Any, set[str]]:
  """Does what `_read_zip` does for a file that is no zip."""
  with open(path, "rb") as file:
    start = file.read(16)
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  with data:
    if not start.startswith(b"\x80"):
      raise _Problem(
        f"it is not a complete .pth file, neither a zip nor PyTorch's older format; it starts with {start!r} "
        "and may be truncated"
      )
    header = pickle_data.Reader(data)
    if header.read() != _LEGACY_MAGIC:
      raise _Problem(
        "it is not a complete .pth file but a pickle of something else. Write its tensors anew with "
        "torch.save(torch.load(FILE, weights_only=True), NEW_FILE)"
      )
    version = pickle_data.Reader(data, start=header.end)
    system_at = version.read(), version.end
    system = pickle_data.Reader(data, start=system_at[1])
    described = system.read()
    if system_at[0] != _LEGACY_PROTOCOL or type(described) is not dict or not described.get("little_endian"):
      raise _Problem(f"it is big-endian, or of version {system_at[0]!r:.40} instead of {_LEGACY_PROTOCOL}")
    storages: dict[str, _Storage] = {}

    def storage(identity: Any) -> _Storage:
      dtype, key, count = _storage_of(identity)
      if len(identity) > 5 and identity[5] is not None:
        raise _Problem("a storage that is a view of another")
      if count * dtype.itemsize > len(data):
        raise _Problem(f"storage {key!r:.40} of {count:,} {dtype} leaves the file of {len(data):,} bytes")
      found = storages.setdefault(key, _Storage(key, dtype, count))
      if (found.dtype, found.count) != (dtype, count):
        raise _Problem(f"storage {key!r:.40} is described twice, differently")
      return found

    reader = pickle_data.Reader(data, _known(_tensor), storage, start=system.end)
    content = reader.read()
    listed = pickle_data.Reader(data, start=reader.end)
    _place_storages(path, data, listed.read(), listed.end, storages)
  return content, reader.unknown


def _place_storages(
  path: pathlib.Path, data: mmap.mmap, keys: Any, position: int, storages: dict[str, _Storage]
) -> None:
  """Finds where each storage lies: its length as 8 bytes, then its numbers."""
  if type(keys) is not list or not all(isinstance(key, str) for key in keys):
    raise _Problem("its list of storages is none")
  if set(storages) - set(keys):
    raise _Problem(f"storages without numbers: {sorted(set(storages) - set(keys))[:5]}")
  for key in keys:
    if key not in storages:
      raise _Problem(f"storage {key!r:.40} belongs to no tensor")
    storage = storages[key]
    count = int.from_bytes(data[position : position + 8], "little")
    position += 8
    end = position + storage.count * storage.dtype.itemsize
    if count != storage.count or end > len(data):
      raise _Problem(
        f"storage {key!r:.40} has {count:,} numbers, expected {storage.count:,}, or is truncated"
      )

    def read(start: int = position, storage: _Storage = storage) -> np.ndarray:
      found = np.fromfile(path, storage.dtype, storage.count, offset=start)
      if found.size != storage.count:
        raise FileFormatError(path, "has become shorter since it was opened.")
      return found

    storage.read = read
    position = end
