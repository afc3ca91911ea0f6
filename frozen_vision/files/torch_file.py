"""Reads tensors from PyTorch's `.pth` without PyTorch, and without running anything the file contains.

A `.pth` (since PyTorch 1.6) is a zip of a pickle, which names the tensors, and one member per storage with
the numbers. A pickle can name any function to be called on loading. Here every name but those that make up
tensors stands for an inert placeholder: calling it gives a placeholder, and nothing is imported.
"""

from collections.abc import Callable
import pathlib
import pickle
from typing import Any
import zipfile

import ml_dtypes
import numpy as np

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
_WRAPPERS = ("model", "state_dict", "module")


def open_torch(path: pathlib.Path) -> tuple[dict[str, LazyTensor], list[str]]:
  """Tensors by name, none of them read yet, and the names of everything else in the file.

  A state dict may lie below `model`, `state_dict` or `module`; what lies beside it (optimizer, epoch, config)
  is among the names.

  Raises:
    ValueError: not a complete file of this format, or one without a dictionary of tensors.
  """
  if not zipfile.is_zipfile(path):
    with open(path, "rb") as file:
      start = file.read(16)
    raise ValueError(
      f"{path} is not a complete .pth file: it is no zip archive (it starts with {start!r}). It may be "
      "truncated, a plain pickle, which is never loaded, or older than PyTorch 1.6; such a file can be "
      "written anew with torch.save(torch.load(FILE, weights_only=True), NEW_FILE)."
    )
  try:
    archive = zipfile.ZipFile(path)
    root = next((name[: -len("data.pkl")] for name in archive.namelist() if name.endswith("/data.pkl")), None)
    if root is None:
      raise ValueError("it has no data.pkl; TorchScript and other zip files are not read")
    order = root + "byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
      raise ValueError("it is big-endian")
    with archive.open(root + "data.pkl") as file:
      unpickler = _Unpickler(file, archive, root)
      content = unpickler.load()
  except Exception as error:  # a pickle can fail in any way; whatever it is, the file is at fault.
    raise ValueError(f"{path} cannot be read as a .pth file: {error}.") from error
  inert = [f"{name} (a name in the pickle, not imported)" for name in sorted(unpickler.inert)]
  others = []
  while isinstance(content, dict):
    inner = next((key for key in _WRAPPERS if isinstance(content.get(key), dict)), None)
    if inner is None:
      break
    others += [str(key) for key in content if key != inner]
    content = content[inner]
  if not isinstance(content, dict) or not any(isinstance(value, LazyTensor) for value in content.values()):
    raise ValueError(
      f"{path} holds no dictionary of tensors, at its top or below {' or '.join(_WRAPPERS)}. "
      f"Names in its pickle that were neither imported nor called: {sorted(unpickler.inert) or 'none'}."
    )
  tensors = {str(key): value for key, value in content.items() if isinstance(value, LazyTensor)}
  others += [str(key) for key, value in content.items() if not isinstance(value, LazyTensor)]
  return tensors, others + inert


class _Inert:
  """Stands for every class and function that is not part of a tensor; does nothing in any role."""

  def __new__(cls, *args, **kwargs):
    del args, kwargs
    return object.__new__(cls)

  def __init__(self, *args, **kwargs):
    pass

  def __setstate__(self, state):
    pass

  def __setitem__(self, key, value):
    pass

  def __call__(self, *args, **kwargs):
    return self

  def append(self, item):
    pass

  def extend(self, items):
    pass

  def add(self, item):
    pass


class _Known:
  """What tensors are made of, as a pickle gets hold of it: to be called, perhaps, but not to be changed.

  A pickle may set attributes on whatever it has (BUILD): functions and types of ours stay out of its reach.
  """

  __slots__ = ("call", "dtype")

  def __init__(self, call: Callable[..., Any] | None = None, dtype: np.dtype | None = None):
    self.call, self.dtype = call, dtype

  def __call__(self, *args):
    if self.call is None:
      raise ValueError(f"a storage of {self.dtype} is called like a function")
    return self.call(*args)

  def __setstate__(self, state):
    pass


class _Dict(dict):
  """OrderedDict of a pickle, without the attributes that a pickle may set on it."""

  def __setstate__(self, state):
    pass


class _Unpickler(pickle.Unpickler):
  """Knows tensors, and nothing else."""

  def __init__(self, file: Any, archive: zipfile.ZipFile, root: str):
    super().__init__(file)
    self.inert: set[str] = set()
    self._archive = archive
    self._root = root

  def find_class(self, module: str, name: str) -> Any:
    match module, name:
      case "collections", "OrderedDict":
        return _Dict
      case "torch", _ if name in _STORAGES:
        return _Known(dtype=np.dtype(_STORAGES[name]))
      case "torch", "Size":
        return tuple
      case "torch._utils", "_rebuild_tensor_v2":
        return _Known(self._tensor)
      case "torch._utils", "_rebuild_parameter":
        return _Known(_parameter)
    self.inert.add(f"{module}.{name}")
    return _Inert

  def persistent_load(self, pid: Any) -> Any:
    kind, known, key, _, size = pid
    dtype = known.dtype if isinstance(known, _Known) else None
    if kind != "storage" or dtype is None or not isinstance(key, str):
      raise ValueError(f"a storage of unknown kind: {kind!r} {known!r} {key!r}")
    info = self._archive.getinfo(f"{self._root}data/{key}")
    # Stored members cannot be larger in memory than on disk.
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != int(size) * dtype.itemsize:
      raise ValueError(f"storage {key} has {info.file_size} bytes, expected {size} of {dtype}, uncompressed")
    return dtype, info

  def _tensor(self, storage, offset, shape, strides, *unused) -> LazyTensor:
    del unused  # requires_grad, hooks and metadata.
    dtype, info = storage
    shape, strides, offset = tuple(map(int, shape)), tuple(map(int, strides)), int(offset)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    empty = 0 in shape
    if min((offset, *shape, *strides)) < 0 or (not empty and last >= info.file_size // dtype.itemsize):
      raise ValueError(f"a tensor of shape {shape}, strides {strides} leaves its storage")

    def read() -> np.ndarray:
      try:
        flat = np.frombuffer(self._archive.read(info), dtype)
      except zipfile.BadZipFile as error:
        raise ValueError(f"{self._archive.filename} is damaged: {error}. Fetch or copy it again.") from error
      steps = tuple(stride * dtype.itemsize for stride in strides)
      return np.lib.stride_tricks.as_strided(flat[offset:], shape, steps).copy()

    return LazyTensor(shape, dtype, read)


def _parameter(tensor, *unused) -> Any:
  del unused
  return tensor
