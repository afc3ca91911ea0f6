"""Writes PyTorch's zip format without PyTorch, opcode by opcode, so that tests write what torch would not."""

import pathlib
import struct
from typing import Any
import zipfile

import numpy as np

_STORAGES = {
  "float32": "FloatStorage",
  "float16": "HalfStorage",
  "bfloat16": "BFloat16Storage",
  "int64": "LongStorage",
}


class Call:
  """A global of the pickle, called with arguments on loading; `state` is what is then set on the result."""

  def __init__(self, module: str, name: str, *arguments: Any, state: Any = None):
    self.module, self.name, self.arguments, self.state = module, name, arguments, state


class Items:
  """A list of the pickle."""

  def __init__(self, *items: Any):
    self.items = items


class View:
  """A tensor that is part of a storage."""

  def __init__(self, storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]):
    self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides


def write(path: pathlib.Path, content: Any, *, root: str = "archive") -> pathlib.Path:
  storages: list[np.ndarray] = []
  pickle = b"\x80\x02" + _encode(content, storages) + b"."
  with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
    archive.writestr(f"{root}/data.pkl", pickle)
    archive.writestr(f"{root}/byteorder", "little")
    for index, storage in enumerate(storages):
      archive.writestr(f"{root}/data/{index}", storage.tobytes(order="A"))
  return path


def write_legacy(path: pathlib.Path, content: Any) -> pathlib.Path:
  """The format before PyTorch 1.6: pickles, then the numbers of each storage after their count."""
  storages: list[np.ndarray] = []
  body = b"\x80\x02" + _encode(content, storages, legacy=True) + b"."
  magic = b"\x80\x02\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little") + b"."
  system = pickle_of({"protocol_version": 1001, "little_endian": True})
  keys = b"\x80\x02](" + b"".join(_encode(str(i), []) for i in range(len(storages))) + b"e."
  numbers = b"".join(struct.pack("<q", s.size) + s.tobytes(order="A") for s in storages)
  path.write_bytes(magic + pickle_of(1001) + system + body + keys + numbers)
  return path


def pickle_of(content: Any) -> bytes:
  return b"\x80\x02" + _encode(content, []) + b"."


def _global(module: str, name: str) -> bytes:
  return f"c{module}\n{name}\n".encode()


def _encode(value: Any, storages: list[np.ndarray], legacy: bool = False) -> bytes:
  def encode(item):
    return _encode(item, storages, legacy)

  match value:
    case None:
      return b"N"
    case bool():
      return b"\x88" if value else b"\x89"
    case int():
      return b"J" + struct.pack("<i", value)
    case str():
      return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    case tuple():
      return b"(" + b"".join(map(encode, value)) + b"t"
    case Items():
      return b"](" + b"".join(map(encode, value.items)) + b"e"
    case dict():
      return b"}(" + b"".join(encode(key) + encode(item) for key, item in value.items()) + b"u"
    case Call():
      state = b"" if value.state is None else encode(value.state) + b"b"
      return _global(value.module, value.name) + encode(value.arguments) + b"R" + state
    case np.ndarray():
      strides = tuple(stride // value.itemsize for stride in value.strides)
      return encode(View(value, 0, value.shape, strides))
    case View():
      storages.append(value.storage)
      storage = (
        b"("
        + encode("storage")
        + _global("torch", _STORAGES[value.storage.dtype.name])
        + encode(str(len(storages) - 1))
        + encode("cpu")
        + encode(value.storage.size)
        + (b"N" if legacy else b"")  # no view of another storage
        + b"tQ"
      )
      return (
        _global("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + storage
        + encode(value.offset)
        + encode(value.shape)
        + encode(value.strides)
        + encode(False)
        + _global("collections", "OrderedDict")
        + b")R"
        + b"tR"
      )
  raise TypeError(type(value))
