"""Digests of data and of the transforms that are applied to them, for results that are kept on disk.

Whoever keeps what was computed of data, such as cached features, has to notice every change of the data. The
digest of a source covers its type, everything that it remembers (names, labels, sizes, seeds), and size and
modification time of the files that it reads its records from. Copies of the data on several machines differ,
since their times do.
"""

from collections.abc import Iterable, Mapping
import enum
import functools
import hashlib
import os
import pathlib
import types
from typing import Any, Protocol, runtime_checkable

import numpy as np

from frozen_vision.data import findings, names


@runtime_checkable
class OfFiles(Protocol):
  """A source whose records are read from files when they are asked for."""

  def files(self) -> Iterable[pathlib.Path]:
    """The files, in the order of the records."""


def digest(value: Any) -> str:
  """SHA-256 over everything that a source of records, or a transform, depends on.

  Args:
    value: a source, a transform, or settings; objects are read attribute by attribute, without what a
      `functools.cached_property` keeps. Folders that paths name are left out: data that are moved as they are
      stay the same.

  Raises:
    TypeError: something without a content that could be read, such as an open file; names it.
    OSError: a file that is gone.
  """
  walk = _Walk()
  walk.feed(value, type(value).__name__)
  return walk.digest.hexdigest()


class _Walk:
  """Feeds a digest with values in a fixed order."""

  def __init__(self):
    self.digest = hashlib.sha256()
    self._seen: dict[int, int] = {}
    self._kept: list[Any] = []  # alive, so that no other object gets the identity of one that was seen

  def feed(self, value: Any, where: str) -> None:
    """Adds a value; `where` names it in errors."""
    match value:
      case None | bool() | int() | float() | complex() | str() | bytes():
        self._add(type(value).__name__, repr(value))
      case enum.Enum():
        self._add("enum", str(value))
      case np.ndarray() | np.generic():
        self._feed_array(np.asarray(value), where)
      case np.dtype():
        self._add("dtype", str(value))
      case pathlib.PurePath():
        self._feed_path(value)
      case type() | types.FunctionType() | types.BuiltinFunctionType():
        self._add("name", f"{value.__module__}.{value.__qualname__}")
      case types.MethodType():
        self._add("method", value.__name__)
        self.feed(value.__self__, where)
      case functools.partial():
        self.feed((value.func, value.args, value.keywords), where)
      case Mapping():
        self._add("mapping", str(len(value)))
        for key in sorted(value, key=repr):
          self.feed(key, where)
          self.feed(value[key], f"{where}[{key!r}]")
      case list() | tuple() | range():
        self._add("list", str(len(value)))
        for index, item in enumerate(value):
          self.feed(item, f"{where}[{index}]")
      case set() | frozenset():
        self.feed(sorted(value, key=repr), where)
      case (
        findings.Findings() | names.Files()
      ):  # reports, and lists of files that fill up while they are used
        pass
      case _:
        self._feed_object(value, where)

  def _add(self, kind: str, text: str) -> None:
    data = text.encode(errors="surrogatepass")
    self.digest.update(f"{kind} {len(data)}\n".encode() + data)

  def _feed_array(self, array: np.ndarray, where: str) -> None:
    if array.dtype.hasobject:
      self.feed(array.tolist(), where)
      return
    self._add("array", f"{array.dtype} {array.shape}")
    self.digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))

  def _feed_path(self, path: pathlib.PurePath) -> None:
    self._add("path", "")
    if pathlib.Path(path).is_file():
      self._feed_file(pathlib.Path(path))

  def _feed_file(self, path: pathlib.Path) -> None:
    found = os.stat(path)
    self._add("file", f"{found.st_size} {found.st_mtime_ns}")

  def _feed_object(self, value: Any, where: str) -> None:
    """An object by the names and values of its attributes, and by its files."""
    if id(value) in self._seen:
      self._add("seen", str(self._seen[id(value)]))
      return
    self._seen[id(value)] = len(self._seen)
    self._kept.append(value)
    cls = type(value)
    self._add("object", f"{cls.__module__}.{cls.__qualname__}")
    if isinstance(value, OfFiles):
      for path in value.files():
        self._feed_file(pathlib.Path(path))
    for name, attribute in sorted(_attributes(value, where).items()):
      if not isinstance(getattr(cls, name, None), functools.cached_property):
        self._add("attribute", name)
        self.feed(attribute, f"{where}.{name}")


def _attributes(value: Any, where: str) -> dict[str, Any]:
  """What an object remembers, by name."""
  if type(value).__getstate__ is not object.__getstate__:
    state = value.__getstate__()
    if isinstance(state, dict):
      return state
  slots = [slot for cls in type(value).__mro__ for slot in getattr(cls, "__slots__", ())]
  found = {slot: getattr(value, slot) for slot in slots if hasattr(value, slot)}
  found |= getattr(value, "__dict__", {})
  if not found and not hasattr(value, "__dict__"):
    raise TypeError(
      f"{where} is a {type(value).__name__}, whose content cannot be read, so nothing can tell whether the "
      "data have changed. Leave it out of the source's state with __getstate__."
    )
  return found
