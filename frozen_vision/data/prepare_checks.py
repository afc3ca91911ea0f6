"""Checks of files by decoding them, in parallel, and a tally of what was found; what `prepare` is made of."""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import pathlib
import sys
import time
from typing import Any
import warnings

from frozen_vision.data import beam as beam_lib
from frozen_vision.data import image_checks
from frozen_vision.data import images as image_io
from frozen_vision.data.dense import folders, map_files
from frozen_vision.data.segmentation import sources as labelled
from frozen_vision.data.video import decoding, jpegs
from frozen_vision.data.video import sources as videos

_PROGRESS_SECONDS = 10.0
# Notes of these kinds may point at a mistake, so the files are named.
_NAMED_NOTES = ("dark", "unreadable EXIF ignored", "ends early")


@dataclasses.dataclass(frozen=True)
class Task:
  """One file to decode; `expected` is the (height, width) of its annotations, if any."""

  path: pathlib.Path
  name: str
  expected: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Result:
  name: str
  info: image_io.ImageInfo | jpegs.EncodedVideo | None
  error: image_io.FileError | None


def check_images(
  tasks: Sequence[Any],
  workers: int,
  check: Callable[[Any], "Result"] | None = None,
  beam: beam_lib.Beam | None = None,
) -> Iterator[Result]:
  """Decodes every file, in order; with more than one worker, in as many processes.

  Args:
    check: what is done with each task; by default it is a `Task` to decode.
    beam: does it instead of processes of this program.
  """
  check = check or _check_image
  if beam:
    yield from beam.map(check, tasks)
    return
  if workers <= 1:
    yield from map(check, tasks)
    return
  spawn = multiprocessing.get_context("spawn")  # a fork could inherit an accelerator's state
  with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
    yield from pool.map(check, tasks, chunksize=16)


def _check_image(task: Task) -> Result:
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # Pillow comments on odd files at length
      data = image_io.read_bytes(task.path, name=task.name)
      info = image_io.inspect_image(data, name=task.name)
      if task.expected is not None:
        height, width = task.expected
        record = {"file_name": task.name, "height": height, "width": width}
        image_checks.check_size((info.height, info.width), record, data)
  except image_io.ImageError as error:
    return Result(task.name, None, error)
  return Result(task.name, info, None)


def check_labelled(source: labelled.LabelledImages, index: int) -> Result:
  """Decodes an image and its label map and compares their sizes."""
  name = source.name(index)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      data = source.image_bytes(index)
      info = image_io.inspect_image(data, name=name)
      label = source.label(index)
      if label is None:
        raise image_io.ImageError(name, "has no label image", "unlabelled")
      labelled.check_size((info.height, info.width), label, name, data)
  except image_io.ImageError as error:
    return Result(name, None, error)
  return Result(name, info, None)


def check_dense(source: folders.DenseFolders, index: int) -> Result:
  """Decodes an image with its normals and depth, and compares their sizes."""
  name = source.name(index)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      path = source.path(index, "image")
      height, width = source[index]["image"].shape[:2]
      info = image_io.ImageInfo("NumPy", "array", height, width)
      if not map_files.is_array(path.name):
        info = image_io.inspect_image(path, name=name)
  except image_io.ImageError as error:
    return Result(name, None, error)
  return Result(name, info, None)


def _encode_video(encoding: jpegs.Encoding, name: str, file: pathlib.Path | None) -> Result:
  try:
    encoded = jpegs.encode(name, encoding, file)
  except decoding.VideoError as error:
    return Result(name, None, error)
  return Result(name, encoded, None)


def _encode_task(encoding: jpegs.Encoding, task: tuple[str, pathlib.Path | None]) -> Result:
  return _encode_video(encoding, *task)


def encode_videos(
  source: videos.VideoList,
  encoding: jpegs.Encoding,
  workers: int,
  spool: pathlib.Path | None = None,
  beam: beam_lib.Beam | None = None,
) -> Iterator[Result]:
  """Decodes every video in order, into files below `spool` if it is given.

  With workers, few videos are ahead of the one that is asked for, since each takes space. With Beam all are.
  """
  encode = functools.partial(_encode_video, encoding)
  files = (spool / str(index) if spool else None for index in range(len(source)))
  if beam:
    yield from beam.map(functools.partial(_encode_task, encoding), list(zip(source.paths, files)))
    return
  if workers <= 1:
    yield from map(encode, source.paths, files)
    return
  spawn = multiprocessing.get_context("spawn")  # as in `check_images`
  with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
    pending: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
    try:
      for task in zip(source.paths, files):
        pending.append(pool.submit(encode, *task))
        if len(pending) >= 2 * workers:
          yield pending.popleft().result()
      while pending:
        yield pending.popleft().result()
    finally:
      pool.shutdown(cancel_futures=True)


class Tally:
  """Prints what is worth naming as it comes, and counts everything for the summary."""

  def __init__(self, total: int, what: str = "images"):
    self.total = total
    self.what = what
    self.good: list[int] = []
    self.bad: collections.Counter[str] = collections.Counter()
    self.formats: collections.Counter[str] = collections.Counter()
    self.notes: collections.Counter[str] = collections.Counter()

  def run(self, results: Iterable[Result]) -> None:
    collections.deque(self.watch(results), maxlen=0)

  def watch(self, results: Iterable[Result]) -> Iterator[tuple[int, Any]]:
    """(position, info) of the usable ones, as they come."""
    next_progress = time.monotonic() + _PROGRESS_SECONDS
    for index, result in enumerate(results):
      if result.error is not None:
        self.bad[result.error.kind] += 1
        print(f"bad: {result.error}")
      else:
        self.good.append(index)
        self._count(result.name, result.info)
        yield index, result.info
      if time.monotonic() >= next_progress:
        print(f"{index + 1} of {self.total} {self.what} checked", file=sys.stderr)
        next_progress = time.monotonic() + _PROGRESS_SECONDS

  def _count(self, name: str, info: image_io.ImageInfo | jpegs.EncodedVideo) -> None:
    self.formats[f"{info.format} {info.mode}"] += 1
    for note in info.notes:
      kind = note.partition(":")[0]
      self.notes[kind] += 1
      if kind in _NAMED_NOTES:
        print(f"note: {name}: {note}")

  def print_summary(self) -> None:
    print(f"{self.what}: {self.total} checked, {len(self.good)} usable, {self.bad.total()} bad")
    for title, counter in (("bad", self.bad), ("read", self.formats), ("notes", self.notes)):
      if counter:
        parts = ", ".join(f"{key} {count}" for key, count in counter.most_common())
        print(f"  {title}: {parts}")
