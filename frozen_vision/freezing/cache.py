"""The feature cache: what a frozen backbone says of examples, kept on disk.

A cache is a folder `PATH/DIGEST` for each key, a record for everything that features depend on (`make_key`):
other weights, data, views or dtypes have another folder, so that nothing stale can be read. Its records are
named arrays of equal shapes, features and whatever else of an example a reader needs, found by an index. They
lie in shards (`files.shards`) of which each process writes its own:

  PATH/DIGEST/key.json             the key, to be read by people too
  PATH/DIGEST/part-0000/SHA256.safetensors
  PATH/DIGEST/part-0000/writer.lock  while somebody writes

A shard is whole or absent, whenever the process or the machine stops. Its checksum is verified when it is
first read in a process; a damaged one is named, its records are missing again, and whoever writes removes it.
"""

from collections.abc import Iterator, Mapping, Sequence
import concurrent.futures
import contextlib
import hashlib
import json
import logging
import os
import pathlib
import shutil
import time
from typing import Any, Self

import numpy as np

from frozen_vision.files import atomic, formats, lock, shards

_logger = logging.getLogger(__name__)

FORMAT = 1  # of what is stored; another one is another key
SHARD_BYTES = 64 << 20
SHARD_SECONDS = 60.0
_INDEX = "index"  # array of a shard with the indices of its records
_FILLED = 0.95  # of the free space, the most that is asked for

Record = dict[str, np.ndarray]
Indices = Sequence[int] | np.ndarray


class CacheError(ValueError):
  """A cache that cannot be used as asked; says what to do."""


def make_key(
  *,
  features: Mapping[str, Any],
  data: str,
  view: Mapping[str, Any],
  dtype: str,
) -> dict[str, Any]:
  """Everything that cached features depend on, as JSON.

  Args:
    features: the feature key of the backbone (`freezing.feature_key`).
    data: digest of the source (`data.content`).
    view: how pixels of a record become the backbone's input: the transform's digest, image size, seed of
      the augmentation, which features are taken.
    dtype: that features are stored in.
  """
  return {"format": FORMAT, "features": dict(features), "data": data, "view": dict(view), "dtype": dtype}


class FeatureCache:
  """Records of one key by index.

    cache = FeatureCache("features", make_key(...))
    with cache.writing() as writer:
      writer.add(cache.missing(range(100)), arrays)
    record = cache[3]                      # {"features": float32 [d], "label": int32 []}
    batch = cache.read([5, 2, 9])          # the same with a row for each index

  Attributes:
    key: what its features depend on.
    folder: of the key.
  """

  def __init__(self, path: str | os.PathLike, key: Mapping[str, Any]):
    """Opens a cache for reading; nothing is created before somebody writes.

    Args:
      path: folder of all caches.
      key: of `make_key`, or any JSON.
    """
    self.key = json.loads(json.dumps(key))
    self._digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
    self.folder = pathlib.Path(path) / self._digest[:20]
    self._shards: dict[int, shards.Shard] = {}  # by number
    self._next = 0  # number of the next shard that is opened
    self._opened: set[str] = set()  # names of shards, damaged ones included
    self._damaged: list[pathlib.Path] = []
    self._shard_of = np.zeros(0, np.int32)  # by index; -1 for none
    self._row_of = np.zeros(0, np.int32)
    self.refresh()

  def refresh(self) -> None:
    """Finds the shards that were written since."""
    for path in sorted(self.folder.glob(f"part-*/*{shards.SUFFIX}")):
      if path.name not in self._opened and not path.name.startswith("."):
        self._open(path)

  def _open(self, path: pathlib.Path) -> None:
    """Adds a shard to the index."""
    self._opened.add(path.name)
    try:
      shard = shards.Shard(path)
      if shard.metadata.get("key") != self._digest:
        raise formats.FileFormatError(path, "belongs to the features of another key.")
      indices = np.asarray(shard.arrays.get(_INDEX, ()))
      # Before the shard is verified: wrong indices would hide records of other shards.
      if shard.metadata.get("indices") != _digest_of(indices):
        raise formats.FileFormatError(path, "is damaged: its list of indices has another digest.")
      if any(_layout(other) != _layout(shard) for other in self._first()):
        self._check_layout(shard)
    except FileNotFoundError:  # somebody removed it since it was listed
      return
    except formats.FileFormatError as error:
      self._drop(path, error)
      return
    self._shards[self._next] = shard
    self._next += 1
    self._list(self._next - 1, indices)

  def _first(self) -> list[shards.Shard]:
    """The shard that others are compared with, if there is one."""
    return list(self._shards.values())[:1]

  def _check_layout(self, shard: shards.Shard) -> None:
    """Raises a FileFormatError unless those that a shard differs from are damaged."""
    shard.verify()
    for number in list(self._shards):
      self._verify(number)
    if any(_layout(other) != _layout(shard) for other in self._first()):
      raise formats.FileFormatError(shard.path, "has records of other shapes than the shards beside it.")

  def _list(self, number: int, indices: np.ndarray) -> None:
    """Says of a shard's records that they are in it."""
    needed = int(indices.max(initial=-1)) + 1
    if needed > self._shard_of.size:
      more = max(needed, 2 * self._shard_of.size) - self._shard_of.size
      self._shard_of = np.concatenate([self._shard_of, np.full(more, -1, np.int32)])
      self._row_of = np.concatenate([self._row_of, np.zeros(more, np.int32)])
    self._shard_of[indices] = number
    self._row_of[indices] = np.arange(len(indices), dtype=np.int32)

  def _take(self, path: pathlib.Path) -> None:
    """Adds a shard that was just written, perhaps in the place of a damaged one of the same name."""
    self._damaged = [damaged for damaged in self._damaged if damaged != path]
    self._open(path)

  def _drop(self, path: pathlib.Path, error: Exception) -> None:
    """Says that a shard is damaged."""
    _logger.warning("Feature cache: %s Its records are computed again.", error)
    self._damaged.append(path)

  def __len__(self) -> int:
    """How many records there are."""
    return int(np.count_nonzero(self._shard_of >= 0))

  def __contains__(self, index: int) -> bool:
    return not len(self.missing([index]))

  def __getitem__(self, index: int) -> Record:
    """One record; raises KeyError where there is none."""
    return {name: rows[0] for name, rows in self.read([index]).items()}

  @property
  def indices(self) -> np.ndarray:
    """The indices of all records, int64, ascending."""
    return np.flatnonzero(self._shard_of >= 0)

  def missing(self, indices: Indices, *, verify: bool = True) -> np.ndarray:
    """Those of the indices, in their order, without a record that can be read; all others can be.

    Args:
      verify: the shards that records are found in; False reads none of them.
    """
    indices = np.asarray(indices, np.int64)
    found = self._find(indices)
    for number in np.unique(found[found >= 0]).tolist() if verify else ():
      self._verify(number)
    return indices[self._find(indices) < 0]

  def read(self, indices: Indices) -> Record:
    """The records of some indices, stacked in their order. Raises KeyError where one is missing."""
    indices = np.asarray(indices, np.int64)
    if missing := self.missing(indices).tolist():
      raise KeyError(
        f"{self.folder} has no records {missing[:5]} ({len(missing)} of {len(indices)} missing)."
      )
    if not len(indices):
      raise KeyError("No indices were given; expected at least one.")
    found, rows = self._find(indices), self._row_of[indices]
    first = self._shards[int(found[0])].arrays
    names = [name for name in first if name != _INDEX]
    stacked = {name: np.empty((len(indices), *first[name].shape[1:]), first[name].dtype) for name in names}
    for number in np.unique(found).tolist():
      here = np.flatnonzero(found == number)
      for name in names:
        stacked[name][here] = self._shards[number].arrays[name][rows[here]]
    return stacked

  def iterate(
    self, indices: Indices | None = None, *, batch_size: int = 256
  ) -> Iterator[tuple[np.ndarray, Record]]:
    """(indices, records) in batches, the last perhaps smaller; by default all records, by ascending index.

    Raises:
      KeyError: a record is missing.
    """
    indices = self.indices if indices is None else np.asarray(indices, np.int64)
    for start in range(0, len(indices), batch_size):
      part = indices[start : start + batch_size]
      yield part, self.read(part)

  def _find(self, indices: np.ndarray) -> np.ndarray:
    """The number of the shard of every index; -1 for none."""
    if np.any(indices < 0):
      raise IndexError(f"Indices of records are 0 or more, not {indices.min()}.")
    inside = indices < self._shard_of.size
    found = np.full(len(indices), -1, np.int32)
    found[inside] = self._shard_of[indices[inside]]
    return found

  def _verify(self, number: int) -> None:
    """Takes a shard's records out of the index if it is damaged."""
    shard = self._shards[number]
    try:
      shard.verify()
    except formats.FileFormatError as error:
      self._drop(shard.path, error)
      del self._shards[number]
      self._shard_of[:] = -1  # listed anew, since some of the records may be in other shards, too
      for other, whole in self._shards.items():
        self._list(other, np.asarray(whole.arrays[_INDEX]))

  def announce(self, count: int, record_bytes: int) -> int:
    """Logs how many bytes storing more records will take, and refuses a disk that they would fill.

    Args:
      count: of records that are to be written.
      record_bytes: of each.

    Returns:
      The bytes.

    Raises:
      CacheError: they would not fit; says how many are free.
    """
    needed, free = count * record_bytes, free_bytes(self.folder)
    _logger.info(
      "Feature cache %s: %s records are there; %s more of %s each will take %s of the %s that are free.",
      self.folder,
      f"{len(self):,}",
      f"{count:,}",
      readable(record_bytes),
      readable(needed),
      readable(free),
    )
    if needed > _FILLED * free:
      raise CacheError(
        f"The feature cache {self.folder} would take {readable(needed)} more, and its disk has "
        f"{readable(free)} free. Give a larger disk with --config.cache.path=FOLDER, set "
        "--config.cache.dtype=bfloat16 or fewer --config.cache.views, or leave --config.cache.path empty."
      )
    return needed

  @contextlib.contextmanager
  def writing(
    self, *, part: int = 0, shard_bytes: int = SHARD_BYTES, shard_seconds: float = SHARD_SECONDS
  ) -> Iterator["Writer"]:
    """Lets this process add records; what it has added is written when the block ends, however it ends.

    Args:
      part: number of the process in a run of several; each writes to its own folder.
      shard_bytes: about how large a shard becomes.
      shard_seconds: a shard is written sooner if its first record is so old: a kill loses little work then.

    Raises:
      LockedError: another process writes to this part.
      CacheError: a folder that cannot be written to.
    """
    folder = self.folder / f"part-{part:04d}"
    with contextlib.ExitStack() as stack:
      try:
        stack.enter_context(lock.hold(folder / "writer.lock", f"the feature cache {folder}"))
        atomic.remove_leftovers(folder)
        atomic.write_json(self.folder / "key.json", self.key, indent=2)
      except lock.LockedError:
        raise
      except OSError as error:
        raise CacheError(
          f"The feature cache {folder} cannot be written to ({error.strerror or error}). Give another folder "
          "with --config.cache.path=FOLDER; one that holds all features already may be read-only."
        ) from error
      self.refresh()
      yield stack.enter_context(Writer(self, folder, shard_bytes, shard_seconds))

  def remove_damaged(self) -> None:
    """Removes the shards that were found to be damaged; for whoever writes."""
    for path in self._damaged:
      with contextlib.suppress(FileNotFoundError):
        if hashlib.sha256(path.read_bytes()).hexdigest() != path.stem:  # what is whole is of another key
          path.unlink()
          self._opened.discard(path.name)
    self._damaged = []


class Writer:
  """Adds records to a cache; a thread writes the shards, one at a time. Made by `FeatureCache.writing`."""

  def __init__(self, cache: FeatureCache, folder: pathlib.Path, shard_bytes: int, shard_seconds: float):
    self._cache, self._folder = cache, folder
    self._shard_bytes, self._shard_seconds, self._begun = shard_bytes, shard_seconds, 0.0
    self._rows: list[Record] = []
    self._bytes = 0
    self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="feature-cache")
    self._pending: concurrent.futures.Future[pathlib.Path] | None = None

  def add(self, indices: Indices, arrays: Mapping[str, np.ndarray]) -> None:
    """Adds records, which become readable with the shard that they get into; see `flush`.

    Args:
      indices: of the records.
      arrays: a row of each for every record. They are copied.

    Raises:
      OSError: of a shard that could not be written; its records are lost.
      TypeError, ValueError: arrays that a shard cannot store.
    """
    indices = np.asarray(indices, np.int64)
    if not len(indices):
      return
    for name, array in arrays.items():
      shards.check_dtype(name, array.dtype)
      if len(array) != len(indices) or name == _INDEX:
        raise ValueError(f"{name} has {len(array)} rows, and there are {len(indices)} records.")
    rows = {_INDEX: indices, **{name: np.array(array) for name, array in arrays.items()}}
    if not self._rows:
      self._begun = time.monotonic()
    self._rows.append(rows)
    self._bytes += sum(array.nbytes for array in rows.values())
    if self._bytes >= self._shard_bytes or time.monotonic() - self._begun > self._shard_seconds:
      self._begin()

  def flush(self) -> None:
    """Writes what was added so far, and makes it readable. Raises OSError as `add` does."""
    self._begin()
    self._finish()

  def _begin(self) -> None:
    """Hands what was added to the thread, once the shard before is written."""
    self._finish()
    if not self._rows:
      return
    rows, self._rows, self._bytes = self._rows, [], 0
    arrays = {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
    self._cache.remove_damaged()
    metadata = {"key": self._cache._digest, "indices": _digest_of(arrays[_INDEX])}
    self._pending = self._thread.submit(shards.write, self._folder, arrays, metadata)

  def _finish(self) -> None:
    pending, self._pending = self._pending, None
    if pending is not None:
      self._cache._take(pending.result())

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
    try:
      with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
        self.flush()
    finally:
      self._thread.shutdown()


def free_bytes(folder: pathlib.Path) -> int:
  """Bytes that may be written below a folder, which need not be there yet."""
  while not folder.exists():
    folder = folder.parent
  return shutil.disk_usage(folder).free


def readable(size: float) -> str:
  """`1.5 GB`."""
  for unit in ("bytes", "kB", "MB", "GB"):
    if size < 1000:
      return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
    size /= 1000
  return f"{size:,.1f} TB"


def _digest_of(indices: np.ndarray) -> str:
  return hashlib.sha256(f"{indices.dtype} {indices.shape}".encode() + indices.tobytes()).hexdigest()


def _layout(shard: shards.Shard) -> dict[str, tuple[Any, ...]]:
  """Shape of a record and dtype by name."""
  return {name: (array.shape[1:], array.dtype) for name, array in shard.arrays.items()}
