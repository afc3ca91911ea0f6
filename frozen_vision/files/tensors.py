"""The file format of backbone weights, read and written one tensor at a time.

A file is `.safetensors` with our parameter paths as keys and, in its header, the shape of the network and the
fingerprint of the weights (`files.trees.fingerprint` of the backbone that loading gives).
"""

from collections.abc import Callable, Mapping
import dataclasses
import json
import os
import pathlib
from typing import Any

from flax import nnx
import jax.numpy as jnp
import numpy as np
import safetensors

from frozen_vision.files import atomic, keys, trees
from frozen_vision.files.formats import FileFormatError, SAFETENSORS_DTYPES

FORMAT = "frozen_vision backbone 1"
_MAX_HEADER_BYTES = 64 << 20
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_WRITABLE = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items() if name in ("F32", "F16", "BF16")}


@dataclasses.dataclass(frozen=True)
class LazyTensor:
  """An array that stays on disk until `read` is called."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


def check_file(path: pathlib.Path) -> None:
  """Refuses what is no weights file at all.

  Raises:
    FileNotFoundError: there is no file, or it is a directory.
    ValueError: a pointer of Git LFS, or an empty file.
  """
  if not path.is_file():
    what = "is a directory" if path.is_dir() else "does not exist"
    raise FileNotFoundError(f"Weights: {path} {what}. Give a .safetensors or .pth file.")
  with open(path, "rb") as file:
    start = file.read(len(_LFS_POINTER))
  if start == _LFS_POINTER:
    raise ValueError(
      f"{path} is a pointer of Git LFS, not the weights themselves; fetch them with `git lfs pull`."
    )
  if not start:
    raise ValueError(f"{path} is empty.")


def open_safetensors(path: pathlib.Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
  """Tensors by name, none of them read yet, and the header's metadata.

  Raises:
    FileFormatError: not a complete `.safetensors` file, or a tensor of a type that no weights have.
  """
  _check_header(path)
  try:
    file = safetensors.safe_open(path, framework="numpy")
    slices = {key: file.get_slice(key) for key in file.keys()}
    metadata = file.metadata() or {}
  except (safetensors.SafetensorError, OSError, ValueError, UnicodeError) as error:
    raise FileFormatError(path, f"is not a complete safetensors file: {error}.") from error
  unknown = [
    f"{key} {part.get_dtype()}" for key, part in slices.items() if part.get_dtype() not in SAFETENSORS_DTYPES
  ]
  if unknown:
    raise FileFormatError(
      path, f"holds tensors of types that are not read: {unknown[:20]}; known: {sorted(SAFETENSORS_DTYPES)}."
    )

  # Opened anew for every tensor: what is read through one mapping stays resident until it is closed.
  def read(key):
    try:
      return safetensors.safe_open(path, framework="numpy").get_tensor(key)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
      raise FileFormatError(
        path, f"has changed since it was opened: {key} cannot be read ({error})."
      ) from error

  tensors = {
    key: LazyTensor(tuple(part.get_shape()), SAFETENSORS_DTYPES[part.get_dtype()], lambda key=key: read(key))
    for key, part in slices.items()
  }
  return tensors, metadata


def _check_header(path: pathlib.Path) -> None:
  """Refuses a header that is longer than the file, or than any that a program writes."""
  size = path.stat().st_size
  with open(path, "rb") as file:
    length = int.from_bytes(file.read(8), "little")
  if length > size - 8 or length > _MAX_HEADER_BYTES:
    raise FileFormatError(
      path,
      f"is not a complete safetensors file: it announces a header of {length:,} bytes and has {size:,} in "
      f"all; at most {_MAX_HEADER_BYTES:,} are read.",
    )


def check_finite(name: str, array: np.ndarray, source: str | os.PathLike) -> np.ndarray:
  """The array, if all its numbers are finite.

  Raises:
    ValueError: NaN or an infinity: names the tensor, the file and how many there are.
  """
  # One pass and no array of booleans: a sum is finite unless a number is not, or the sum overflows.
  with np.errstate(all="ignore"):
    if array.dtype.kind not in "fcV" or np.isfinite(np.sum(array, dtype=np.float64)):
      return array
    bad = int(array.size - np.count_nonzero(np.isfinite(array.astype(np.float32))))
  if bad:
    raise ValueError(
      f"{os.fspath(source)}: {bad:,} of the {array.size:,} numbers of {name} are not finite (NaN or "
      "infinity), so nothing can be computed with these weights. Fetch or convert them again."
    )
  return array


def read_fingerprint(path: str | os.PathLike) -> str | None:
  """The fingerprint in the header of our own file, without reading a weight; None if it has none."""
  path = pathlib.Path(path)
  check_file(path)
  return open_safetensors(path)[1].get("fingerprint") or None


def write(
  path: str | os.PathLike,
  leaves: Mapping[str, LazyTensor],
  *,
  metadata: Mapping[str, str],
  dtype: Any = np.float32,
) -> str:
  """Writes tensors one after the other, and the fingerprint into the header once it is known.

  Args:
    dtype: float32, float16 or bfloat16.

  Returns:
    The fingerprint of the weights as they are written, that is, rounded to `dtype`.

  Raises:
    ValueError: another dtype, or a weight that is not finite in it. Nothing is left at `path` then.
  """
  dtype = np.dtype(dtype)
  if dtype not in _WRITABLE:
    raise ValueError(f"Backbone weights are written as {sorted(map(str, _WRITABLE))}, not {dtype}.")
  placeholder = "0" * 64
  header: dict[str, Any] = {"__metadata__": {**metadata, "fingerprint": placeholder}}
  offset = 0
  for key, leaf in leaves.items():
    end = offset + int(np.prod(leaf.shape, dtype=np.int64)) * dtype.itemsize
    header[key] = {"dtype": _WRITABLE[dtype], "shape": list(leaf.shape), "data_offsets": [offset, end]}
    offset = end
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  digests = {}
  with atomic.open_aside(path) as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for key, leaf in leaves.items():
      with np.errstate(over="ignore"):
        array = np.asarray(leaf.read()).astype(dtype)
      rounded = array.astype(np.float32)
      if array.shape != leaf.shape or not np.isfinite(rounded).all():
        raise ValueError(f"{key} {array.shape} is not finite as {dtype}, or its shape is not {leaf.shape}.")
      digests[key] = (leaf.shape, trees.leaf_digest(rounded))
      file.write(array.tobytes())
    fingerprint = trees.combine_digests(digests)
    file.seek(8 + text.index(placeholder.encode()))
    file.write(fingerprint.encode())
  return fingerprint


def check_shapes(state: nnx.State, leaves: Mapping[str, LazyTensor], path: pathlib.Path) -> None:
  """Raises a ValueError that lists every key or shape which is not that of the network."""
  found = {key: leaf.shape for key, leaf in leaves.items()}
  keys.compare(found, trees.shapes(state)).check(f"{path} does not fit the network")


def check_fingerprint(
  digests: Mapping[str, tuple[tuple[int, ...], str]], fingerprint: str, path: pathlib.Path
) -> None:
  """Raises a ValueError unless the weights that were read are those that the file says it holds."""
  found = trees.combine_digests(digests)
  if found != fingerprint:
    raise ValueError(
      f"{path}: its weights have the fingerprint {found}, its header says {fingerprint}; "
      "the file was damaged or changed. Convert or copy it again."
    )


def read(
  state: nnx.State,
  leaves: Mapping[str, LazyTensor],
  *,
  prefix: str = "",
  path: str | os.PathLike = "weights",
  digests: dict[str, tuple[tuple[int, ...], str]] | None = None,
  to_device: Callable[[np.ndarray], Any] = lambda array: array,
) -> nnx.State:
  """Reads the tensors of a network or of a part of it, one after the other, as float32.

  Args:
    state: abstract; every leaf is filled. `leaves` fit it (`check_shapes`).
    prefix: path of the part, such as `stages/2/blocks/5`; empty for the whole network.
    path: of the file, for the error.
    digests: filled with what `check_fingerprint` takes, if given.
    to_device: called with each array before the next one is read; arrays stay on the host by default.

  Raises:
    ValueError: a weight that is not finite.
  """
  filled = []
  for key, variable in nnx.to_flat_state(state):
    name = trees.path_string((prefix, *key) if prefix else key)
    array = check_finite(name, np.asarray(leaves[name].read()).astype(np.float32), path)
    if digests is not None:
      digests[name] = (array.shape, trees.leaf_digest(array))
    filled.append((key, variable.replace(to_device(array))))
  return nnx.from_flat_state(filled)


def fill(
  state: nnx.State, leaves: Mapping[str, LazyTensor], path: pathlib.Path, *, fingerprint: str | None = None
) -> nnx.State:
  """Fills a network with the tensors of a file, on the device, as float32.

  Args:
    state: abstract; every leaf is filled.
    fingerprint: what the weights must add up to; None for files that do not say.

  Raises:
    ValueError: keys or shapes that are not those of `state`, all listed before any is read; another
      fingerprint.
  """
  check_shapes(state, leaves, path)
  digests = None if fingerprint is None else {}
  filled = read(state, leaves, path=path, digests=digests, to_device=jnp.asarray)
  if fingerprint is not None:
    check_fingerprint(digests, fingerprint, path)
  return filled
