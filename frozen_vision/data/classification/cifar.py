"""CIFAR-10 and CIFAR-100 as published: the version in binary, and the one of Python pickles, read as data."""

from collections.abc import Sequence
import pathlib
from typing import Any

from jaxtyping import Int, UInt8
import numpy as np

from frozen_vision.data import text_files
from frozen_vision.files import pickle_data

_PIXELS = 3 * 32 * 32
_ENCODE = "_codecs.encode"  # by which Python 3 writes bytes where Python 2 shall read them


def read_binary(
  path: pathlib.Path, *, labels: int
) -> tuple[UInt8[np.ndarray, "n 32 32 3"], Int[np.ndarray, "n"]]:
  """Images and labels of a .bin file.

  Args:
    labels: bytes before each image, of which the last is the label: 1 of CIFAR-10; 2 of CIFAR-100, whose
      first is the coarse label.

  Raises:
    ValueError: another length than that of whole records.
  """
  data = np.fromfile(path, np.uint8)
  record = labels + _PIXELS
  if not data.size or data.size % record:
    raise ValueError(
      f"{path} has {data.size:,} bytes, no multiple of the {record:,} of a record; download it again."
    )
  data = data.reshape(-1, record)
  return _images(data[:, labels:]), data[:, labels - 1].astype(np.int32)


def read_pickle(
  path: pathlib.Path, *, key: str
) -> tuple[UInt8[np.ndarray, "n 32 32 3"], Int[np.ndarray, "n"]]:
  """Images and labels of a batch of the Python version; nothing in the file is executed.

  Args:
    key: of the labels: "labels" or "fine_labels".

  Raises:
    ValueError: the file is damaged, or no batch of CIFAR.
  """
  content = _pickle(path)
  data, labels = content.get("data"), content.get(key)
  parts = getattr(data, "parts", ())
  text = parts[-1] if len(parts) == 5 else None
  if isinstance(text, str):  # Python 2's strings, which are bytes
    text = text.encode("latin-1")
  are_labels = isinstance(labels, list) and all(isinstance(label, int) for label in labels)
  if not isinstance(text, bytes) or not are_labels or len(text) != len(labels) * _PIXELS:
    raise ValueError(
      f"{path} holds no batch of CIFAR; expected `data` of {_PIXELS:,} bytes an image and a list of numbers "
      f"`{key}`. Download it again."
    )
  return _images(np.frombuffer(text, np.uint8).reshape(-1, _PIXELS)), np.asarray(labels, np.int32)


def read_names(path: pathlib.Path, *, key: str = "") -> list[str]:
  """Class names: of a text file, one a line, or with a key of the pickle that holds all."""
  if not key:
    return [line.strip() for line in text_files.read_text(path).splitlines() if line.strip()]
  found = _pickle(path).get(key)
  if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
    raise ValueError(f"{path} has no list of texts `{key}`; download it again.")
  return found


def joined(
  parts: Sequence[tuple[UInt8[np.ndarray, "_ 32 32 3"], Int[np.ndarray, "_"]]],
) -> tuple[UInt8[np.ndarray, "n 32 32 3"], Int[np.ndarray, "n"]]:
  """Several files as one."""
  pixels, labels = zip(*parts)
  return np.concatenate(pixels), np.concatenate(labels)


def _pickle(path: pathlib.Path) -> dict[Any, Any]:
  try:
    content = pickle_data.Reader(path.read_bytes(), {_ENCODE: pickle_data.Global(_ENCODE, _encoded)}).read()
  except pickle_data.PickleError as error:
    raise ValueError(f"{path} is no pickle of CIFAR ({error}); download it again.") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path} holds a {type(content).__name__}; expected a dictionary. Download it again.")
  return {key.decode("latin-1") if isinstance(key, bytes) else key: value for key, value in content.items()}


def _encoded(text: Any, encoding: Any) -> bytes:
  if not isinstance(text, str) or encoding != "latin1":
    raise pickle_data.PickleError("bytes in an unknown encoding")
  return text.encode("latin-1")


def _images(planes: UInt8[np.ndarray, "n p"]) -> UInt8[np.ndarray, "n 32 32 3"]:
  """Images of planes of red, green and blue."""
  return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
