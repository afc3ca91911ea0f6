"""TFDS builder that writes the frames of videos as ArrayRecord shards. Needs TensorFlow; reading does not."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import dataclasses
import fractions
import os
import pathlib
import tempfile
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from frozen_vision.data import beam as beam_lib
from frozen_vision.data import prepared_builder
from frozen_vision.data.video import jpegs as video_jpegs
from frozen_vision.data.video import prepared_videos, sources

# Encodes into the folder it is given: (position in the source, encoded video), of those that can be used.
EncodeAll = Callable[[pathlib.Path], Iterable[tuple[int, video_jpegs.EncodedVideo]]]


@dataclasses.dataclass
class _Source:
  """Videos being written, and what was written of them."""

  videos: sources.VideoList
  encoding: video_jpegs.Encoding
  encode_all: EncodeAll
  spool: pathlib.Path  # holds the folder of encoded videos that are not written yet
  indices: list[int] = dataclasses.field(default_factory=list)
  lengths: list[int] = dataclasses.field(default_factory=list)
  durations: list[float] = dataclasses.field(default_factory=list)

  def __repr__(self) -> str:  # stored in the description
    return f"VideoList({len(self.videos)} videos, {len(self.videos.classes)} classes), {self.encoding}"

  def records_of(self, index: int, encoded: video_jpegs.EncodedVideo) -> Iterator["_Record"]:
    """The records of a video, which counts as written."""
    name, label = os.fsencode(self.videos.paths[index]), int(self.videos.labels[index])
    yield _Record(name, label, encoded, None, 0)
    for first in range(0, len(encoded.sizes), prepared_videos.FRAMES_PER_RECORD):
      yield _Record(name, label, encoded, first, prepared_videos.FRAMES_PER_RECORD)
    self.indices.append(index)
    self.lengths.append(len(encoded.sizes))
    self.durations.append(encoded.duration)

  def require_any(self) -> None:
    """Raises ValueError where no video can be used."""
    if not self.indices:
      raise ValueError("nothing usable is left")


@dataclasses.dataclass(frozen=True)
class _Record:
  """A record of a video: at most `length` frames from `first` on, or none where that is None."""

  name: bytes
  label: int
  video: video_jpegs.EncodedVideo
  first: int | None
  length: int


class FrozenVisionVideos(prepared_builder.Builder):
  """One split of videos with one label each."""

  KIND = prepared_videos.KIND
  DESCRIPTION = "Videos with one class each, as JPEG frames, as prepared by frozen_vision."

  def features(self) -> dict[str, Any]:
    return {
      "name": tfds.features.Text(doc="the video's file"),
      "label": tfds.features.Scalar(np.int64),
      # TFDS would store floating point numbers with 32 bits.
      "times": tfds.features.Text(
        doc="of all frames in seconds, 64-bit floats, in the first record of a video; else empty"
      ),
      "first_frame": tfds.features.Scalar(np.int64, doc="number of the first frame of this record"),
      "frames": tfds.features.Sequence(tfds.features.Text(), doc="JPEG; none in a video's first record"),
    }

  def metadata(self) -> dict[str, Any]:
    return prepared_videos.metadata(self._source.videos, self._source.encoding)

  def examples(self) -> Iterator[tuple[fractions.Fraction, dict[str, Any]]]:
    source = self._source
    with tempfile.TemporaryDirectory(prefix="spool_", dir=source.spool) as spool:
      for index, encoded in source.encode_all(pathlib.Path(spool)):
        count = len(encoded.sizes)
        for task in source.records_of(index, encoded):
          frame = index * (count + 1) + (0 if task.first is None else 1 + task.first)
          yield fractions.Fraction(frame, len(source.videos) * (count + 1)), self.encode(None, task)
        encoded.file.unlink()
    source.require_any()

  def tasks(self, stack: contextlib.ExitStack) -> tuple[Sequence["_Record"], None]:
    self._source.spool.mkdir(parents=True, exist_ok=True)
    spool = tempfile.TemporaryDirectory(prefix="spool_", dir=self._source.spool)
    encoded = self._source.encode_all(pathlib.Path(stack.enter_context(spool)))
    records = [record for each in encoded for record in self._source.records_of(*each)]
    self._source.require_any()
    return records, None

  @staticmethod
  def encode(source: None, task: "_Record") -> dict[str, Any]:
    del source
    common = {"name": task.name, "label": task.label}
    if task.first is None:
      return {
        **common,
        "times": prepared_videos.encode_times(task.video.times),
        "first_frame": 0,
        "frames": [],
      }
    jpegs = task.video.run(task.first, task.length)
    return {**common, "times": b"", "first_frame": task.first, "frames": jpegs}


def write(
  source: sources.VideoList,
  encoding: video_jpegs.Encoding,
  encode_all: EncodeAll,
  split: str,
  out: pathlib.Path,
  beam: beam_lib.Beam | None = None,
) -> pathlib.Path:
  """Writes the usable videos below `out`, in place of what was there; returns the folder of the shards.

  Raises:
    ValueError: none can be used.
  """
  # Beside the shards, where there is room, and where the next run clears up after one that was killed.
  written = _Source(source, encoding, encode_all, prepared_videos.KIND.folder(out, split).parent)
  target = prepared_builder.write(FrozenVisionVideos, written, split, out, beam)
  prepared_videos.write_index(source, written.indices, written.lengths, written.durations, out, split)
  return target
