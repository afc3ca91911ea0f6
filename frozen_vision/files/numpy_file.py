"""Reads tensors from NumPy's `.npz`, as Google's JAX code publishes weights; nothing in one is executed.

The shape in an array's header is compared with the bytes of its member, and those with the bytes they take in
the file, before anything is unpacked.
"""

import io
import math
import pathlib
import zipfile

import ml_dtypes
import numpy as np

from frozen_vision.files.formats import FileFormatError
from frozen_vision.files.tensors import LazyTensor

_MOST_RATIO = 64
_SMALL = 16 << 20


def open_npz(path: pathlib.Path) -> dict[str, LazyTensor]:
  """Arrays by name, none of them read yet.

  NumPy has no bfloat16 of its own: big_vision's arrays of two raw bytes are read as bfloat16.

  Raises:
    FileFormatError: damaged, or an array of Python objects, which are never loaded.
  """
  if not zipfile.is_zipfile(path):
    raise FileFormatError(path, "is not a complete .npz file; fetch or copy it again.")
  found = {}
  try:
    archive = zipfile.ZipFile(path)
  except Exception as error:  # whatever a crafted directory makes its reader raise
    raise FileFormatError(path, f"is not a complete .npz file: {error}.") from error
  with archive:
    for member in archive.infolist():
      if member.file_size > _MOST_RATIO * member.compress_size + _SMALL:
        raise FileFormatError(
          path,
          f"has {member.compress_size:,} bytes for {member.filename!r:.60}, which would become "
          f"{member.file_size:,}; no weights are packed so well.",
        )
      shape, dtype = _header(path, archive, member)
      name = member.filename.removesuffix(".npy")
      found[name] = LazyTensor(shape, dtype, lambda name=name, dtype=dtype: _read(path, name, dtype))
  return found


def read_header(file: io.BufferedIOBase) -> tuple[tuple[int, ...], np.dtype]:
  """Shape and dtype that a `.npy` file begins with; the file is left where its numbers start.

  Raises:
    ValueError: the file begins with no header; of a crafted one NumPy raises other types too.
  """
  if np.lib.format.read_magic(file) == (1, 0):
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
  else:
    shape, _, dtype = np.lib.format.read_array_header_2_0(file)
  return shape, dtype


def _header(
  path: pathlib.Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo
) -> tuple[tuple[int, ...], np.dtype]:
  """Shape and dtype of a member, which has the bytes for them."""
  member = info.filename
  try:
    with archive.open(info) as file:
      shape, dtype = read_header(file)
      start = file.tell()
  except Exception as error:  # whatever a crafted header makes its reader raise
    raise FileFormatError(path, f"holds {member!r:.60}, which is no array of NumPy: {error}.") from error
  if dtype.hasobject:
    raise FileFormatError(path, f"holds Python objects in {member}; they are never loaded.")
  if min(shape, default=0) < 0 or start + math.prod(shape) * dtype.itemsize != info.file_size:
    raise FileFormatError(
      path, f"has {info.file_size - start:,} bytes for {member!r:.60}, expected {dtype} of shape {shape}."
    )
  return shape, np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype


def _read(path: pathlib.Path, name: str, dtype: np.dtype) -> np.ndarray:
  try:
    with np.load(path, allow_pickle=False) as arrays:
      array = arrays[name]
  except Exception as error:  # zlib and zipfile raise many types for a damaged member
    raise FileFormatError(path, f"cannot be read at {name}: {error}.") from error
  return array if array.dtype == dtype else array.view(dtype)
