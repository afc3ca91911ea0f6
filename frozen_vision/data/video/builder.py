"""TFDS builder that writes the frames of videos as ArrayRecord shards. Needs TensorFlow; reading does not."""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import fractions
import os
import pathlib
import tempfile
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

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
    source, length = self._source, prepared_videos.FRAMES_PER_RECORD
    with tempfile.TemporaryDirectory(prefix="spool_", dir=source.spool) as spool:
      for index, encoded in source.encode_all(pathlib.Path(spool)):
        common = {"name": os.fsencode(source.videos.paths[index]), "label": source.videos.labels[index]}
        count = len(encoded.sizes)

        def place(frame):
          return fractions.Fraction(index * (count + 1) + frame, len(source.videos) * (count + 1))

        times = prepared_videos.encode_times(encoded.times)
        yield place(0), {**common, "times": times, "first_frame": 0, "frames": []}
        for number, jpegs in enumerate(encoded.runs(length)):
          first = number * length
          yield place(1 + first), {**common, "times": b"", "first_frame": first, "frames": jpegs}
        encoded.file.unlink()
        source.indices.append(index)
        source.lengths.append(count)
        source.durations.append(encoded.duration)
    if not source.indices:
      raise ValueError("nothing usable is left")


def write(
  source: sources.VideoList,
  encoding: video_jpegs.Encoding,
  encode_all: EncodeAll,
  split: str,
  out: pathlib.Path,
) -> pathlib.Path:
  """Writes the usable videos below `out`, in place of what was there; returns the folder of the shards.

  Raises:
    ValueError: none can be used.
  """
  # Beside the shards, where there is room, and where the next run clears up after one that was killed.
  written = _Source(source, encoding, encode_all, prepared_videos.KIND.folder(out, split).parent)
  target = prepared_builder.write(FrozenVisionVideos, written, split, out)
  prepared_videos.write_index(source, written.indices, written.lengths, written.durations, out, split)
  return target
