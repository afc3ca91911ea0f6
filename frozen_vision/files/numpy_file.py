"""Reads tensors from NumPy's `.npz`, as Google's JAX code publishes weights; nothing in one is executed."""

import pathlib
import zipfile

import ml_dtypes
import numpy as np

from frozen_vision.files.formats import FileFormatError
from frozen_vision.files.tensors import LazyTensor


def open_npz(path: pathlib.Path) -> dict[str, LazyTensor]:
  """Arrays by name, none of them read yet.

  NumPy has no bfloat16 of its own: big_vision's arrays of two raw bytes are read as bfloat16.

  Raises:
    FileFormatError: damaged, or an array of Python objects, which are never loaded.
  """
  if not zipfile.is_zipfile(path):
    raise FileFormatError(path, "is not a complete .npz file; fetch or copy it again.")
  found = {}
  with zipfile.ZipFile(path) as archive:
    for member in archive.namelist():
      shape, dtype = _header(path, archive, member)
      name = member.removesuffix(".npy")
      found[name] = LazyTensor(shape, dtype, lambda name=name, dtype=dtype: _read(path, name, dtype))
  return found


def _header(path: pathlib.Path, archive: zipfile.ZipFile, member: str) -> tuple[tuple[int, ...], np.dtype]:
  """Shape and dtype of a member."""
  try:
    with archive.open(member) as file:
      version = np.lib.format.read_magic(file)
      if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
      else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
  except (ValueError, zipfile.BadZipFile, NotImplementedError, EOFError) as error:
    raise FileFormatError(path, f"holds {member}, which is no array of NumPy: {error}.") from error
  if dtype.hasobject:
    raise FileFormatError(path, f"holds Python objects in {member}; they are never loaded.")
  return shape, np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype


def _read(path: pathlib.Path, name: str, dtype: np.dtype) -> np.ndarray:
  try:
    with np.load(path, allow_pickle=False) as arrays:
      array = arrays[name]
  except (ValueError, zipfile.BadZipFile, OSError) as error:
    raise FileFormatError(path, f"cannot be read at {name}: {error}.") from error
  return array if array.dtype == dtype else array.view(dtype)
