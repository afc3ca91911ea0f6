"""Reads videos that `python -m frozen_vision.data.prepare videos` has written; no TensorFlow.

A video is one record of its time stamps, followed by records of up to `FRAMES_PER_RECORD` JPEG frames each. A
clip reads the records that its frames lie in and decodes these frames alone, and no video is too long for a
record.
"""

from collections.abc import Sequence
import functools
import itertools
import logging
import os
from typing import Any

from jaxtyping import Float, UInt8
import numpy as np
from PIL import Image

from frozen_vision.data import images, prepared
from frozen_vision.data.video import decoding, sources
from frozen_vision.data.video import jpegs as video_jpegs

KIND = prepared.Kind(
  "frozen_vision_videos",
  "videos --videos FOLDER_OR_LIST --out {out} --split {split}",
  fields=("name", "label", "times", "first_frame", "frames"),
)
# About a megabyte at the default encoding. A clip of 16 frames at stride 4 lies in two of them.
FRAMES_PER_RECORD = 64
_TIMES = "<f8"

_logger = logging.getLogger(__name__)


def metadata(source: sources.VideoList, encoding: video_jpegs.Encoding) -> dict[str, Any]:
  """The metadata that the builder stores beside the shards."""
  return {
    "class_names": source.classes,
    "short_side": encoding.short_side,
    "quality": encoding.quality,
    "rate": encoding.rate,
    "frames_per_record": FRAMES_PER_RECORD,
  }


def write_index(
  source: sources.VideoList,
  indices: Sequence[int],
  lengths: Sequence[int],
  durations: Sequence[float],
  out: str | os.PathLike[str],
  split: str,
) -> None:
  """Adds the index to finished shards, and so completes them.

  Args:
    indices: of the videos that were written.
    lengths: how many frames they have.
    durations: in seconds.
  """
  KIND.complete(
    out,
    split,
    names=np.array([source.paths[i] for i in indices]),
    labels=source.labels[list(indices)],
    groups=np.array([source.groups[i] for i in indices]),
    lengths=np.array(lengths),
    durations=np.array(durations),
  )


def encode_times(times: Float[np.ndarray, "n"]) -> bytes:
  """Times as the first record of a video holds them."""
  return times.astype(_TIMES).tobytes()


class PreparedVideo(decoding.Frames):
  """One prepared video; its times are read when they are first asked for."""

  def __init__(
    self,
    name: str,
    duration: float,
    shards: prepared.Shards,
    *,
    start: int,
    length: int,
    frames_per_record: int,
  ):
    """`start` is the position of its first record, `length` its number of frames."""
    self.name = name
    self.duration = duration
    self._shards = shards
    self._start = start
    self._length = length
    self._frames_per_record = frames_per_record

  def __len__(self) -> int:
    return self._length

  @functools.cached_property
  def times(self) -> Float[np.ndarray, "frames"]:
    times = self._shards[self._start]["times"]
    if len(times) != self._length * np.dtype(_TIMES).itemsize:
      raise self._shards.damaged(f"the shard of {self.name}", f"{len(times)} bytes of times")
    return np.frombuffer(times, _TIMES)

  def read(self, indices: decoding.Indices, *, short_side: int | None = None) -> UInt8[np.ndarray, "n h w 3"]:
    """See `Frames.read`.

    Raises:
      ImageError: the stored frame is damaged.
    """
    found = {}
    for record, numbers in itertools.groupby(
      self._numbers(indices), key=lambda number: number // self._frames_per_record
    ):
      jpegs = self._shards[self._start + 1 + record]["frames"]
      for number in numbers:
        place = number % self._frames_per_record
        if place >= len(jpegs):
          raise self._shards.damaged(f"the shard of {self.name}", f"frame {number} is absent")
        found[number] = self._decode(jpegs[place], number, short_side)
    return np.stack([found[int(index)] for index in indices])

  def _decode(self, jpeg: bytes, number: int, short_side: int | None) -> UInt8[np.ndarray, "h w 3"]:
    frame = images.decode_image(jpeg, name=f"{self.name}, frame {number}")
    if short_side is None or min(frame.shape[:2]) == short_side:
      return frame
    height, width = decoding.resized(*frame.shape[:2], short_side)
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))


class PreparedVideos:
  """Prepared videos with one label each, in the order of the source they were made from.

  Sent to a worker process it is a path, and what is known of each video.

  Attributes:
    classes: class names; a label is a position in it.
    paths: the files that were prepared.
    labels: int32 [n].
    groups: as `VideoList.groups`.
    short_side: what longer short sides were resized to, in pixels.
    rate: frames per second that were kept; 0 where all were.
  """

  def __init__(self, directory: str | os.PathLike[str], split: str):
    """Opens a split.

    Args:
      directory: the folder that was `--out` of the preparation.
      split: the `--split` of the preparation.

    Raises:
      FileNotFoundError: nothing complete is there.
    """
    self._shards = prepared.Shards(KIND, directory, split)
    number = (int, float)
    stored = self._shards.metadata(class_names=list, short_side=int, rate=number, frames_per_record=int)
    index = self._shards.index(names="U", groups="U", labels="i", lengths="i", durations="f")
    count = len(index["names"])
    self._shards.require_length(count, **index)
    if stored["frames_per_record"] < 1 or (count and not 0 < index["lengths"].min()):
      raise self._shards.damaged("index.npz", "lengths are not positive")
    if count and not 0 <= index["labels"].min() <= index["labels"].max() < len(stored["class_names"]):
      raise self._shards.damaged("index.npz", "labels are outside of the classes")
    self.classes = list(stored["class_names"])
    self.short_side, self.rate = stored["short_side"], stored["rate"]
    self._frames_per_record = stored["frames_per_record"]
    self.paths, self.groups = index["names"].tolist(), index["groups"].tolist()
    self.labels = index["labels"].astype(np.int32)
    self._lengths, self._durations = index["lengths"], index["durations"]
    records = 1 + -(-self._lengths // self._frames_per_record)
    self._starts = np.cumsum(records) - records

  def __len__(self) -> int:
    return len(self.paths)

  def __repr__(self) -> str:
    return f"PreparedVideos({self._shards.folder}, {len(self)} videos, {len(self.classes)} classes)"

  def identity(self) -> dict[str, Any]:
    """See `fingerprint.Identified`."""
    return {
      "file names": self.paths,
      "labels": self.labels,
      "lengths": self._lengths,
      "shards": self._shards.identity(),
    }

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The record {video: PreparedVideo, label: int32, name}."""
    name = self.paths[index]
    opened = PreparedVideo(
      name,
      float(self._durations[index]),
      self._shards,
      start=int(self._starts[index]),
      length=int(self._lengths[index]),
      frames_per_record=self._frames_per_record,
    )
    return {"video": opened, "label": self.labels[index], "name": name}

  def require(self, *, rate: float, short_side: int) -> None:
    """Checks that clips can be cut out of it as out of the files.

    Args:
      rate: frames per second that the videos are to be resampled to; 0 for none.
      short_side: pixels that frames are to be resized to. More than were kept is a warning.

    Raises:
      ValueError: the frames that `rate` needs were not kept.
    """
    times = self.rate / rate if rate else 0
    if self.rate and (times < 1 or abs(times - round(times)) > 1e-6):
      raise ValueError(
        f"{self._shards.folder} keeps {self.rate:g} frames per second; {rate:g} (0: as they are) cannot be "
        f"had from it. Set it to {self.rate:g}, a half, a third and so on, or prepare without --rate."
      )
    if short_side > self.short_side:
      _logger.warning(
        "%s: frames were resized to a short side of %d pixels and are enlarged to %d; prepare with "
        "--short-side %d for sharp ones.",
        self._shards.folder,
        self.short_side,
        short_side,
        short_side,
      )


def open_split(path: str | os.PathLike[str]) -> PreparedVideos | None:
  """The prepared split that is the folder `path`, or None where it is no prepared data.

  Args:
    path: `OUT/frozen_vision_videos/SPLIT`, with or without the version below it.

  Raises:
    FileNotFoundError: it is incomplete.
    ValueError: the folder is of another kind, or holds several splits.
  """
  found = prepared.locate(path)
  if found is None:
    splits = prepared.splits_below(path)
    if splits:
      raise ValueError(
        f"{path} holds the prepared splits {', '.join(splits)}; give the folder of one, such as "
        f"{os.path.join(path, splits[0])}."
      )
    return None
  out, builder, split = found
  if builder != KIND.builder:
    raise ValueError(
      f"{path} is prepared as {builder}; expected {KIND.builder}, which prepare videos writes."
    )
  return PreparedVideos(out, split)
