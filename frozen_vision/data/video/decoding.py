"""Decoding of video files to 8-bit RGB frames, with one clear error for every file that cannot be used.

What is done with the less usual kinds, so that nothing is read silently wrong:

* Frames are numbered in the order in which they are shown, from 0. Their times come from the container; where
  its time stamps are not in the order of display (AVI), times are even, by the average rate.
* Rotation metadata, as phones write it, is applied.
* Frames are found by decoding from the key frame before them, where the container's time stamps can be
  trusted; a seek that lands elsewhere, or on a frame that needs earlier ones, is undone by decoding from
  the start. Both ways give the same frames.
* Decoding stops at the first damage: frames before it can be read, a later one is an error that names the
  file.
* A file that ends early without damage, though its container promises more frames, repeats its last frame.
"""

import abc
from collections.abc import Iterator, Sequence
import dataclasses
import os
from typing import Any, Self

import av
from jaxtyping import Float, Int, UInt8
import numpy as np

from frozen_vision.data import images

Indices = Sequence[int] | Int[np.ndarray, "_"]

SUFFIXES = frozenset(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .wmv .flv .3gp .ogv".split())
# Containers that store when each frame is shown. Others store when it is decoded, which is another order.
_STAMPED = frozenset("mov mp4 matroska webm".split())
# Decoding so many frames in vain costs about as much as a seek.
_WORTH_A_SEEK = 12


class VideoError(images.FileError):
  """A video file that cannot be used.

  Its kind is "missing", "empty", "not a video", "damaged" or "changing size".
  """


@dataclasses.dataclass(frozen=True)
class _Packet:
  """One frame as the container lists it."""

  pts: int
  is_keyframe: bool


class Frames(abc.ABC):
  """The frames of a video by number, from 0; use it in a `with`.

  Attributes:
    name: the file's path.
    times: when each frame is shown, in seconds from the first frame.
    duration: seconds, the last frame included.
  """

  name: str
  times: Float[np.ndarray, "frames"]
  duration: float

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @abc.abstractmethod
  def read(self, indices: Indices, *, short_side: int | None = None) -> UInt8[np.ndarray, "n h w 3"]:
    """Frames by number, RGB, upright.

    Args:
      indices: in any order, repetitions allowed.
      short_side: resize so that the shorter side has so many pixels; None keeps the size.

    Raises:
      IndexError: a number that the video does not have.
      VideoError: the file is damaged at or before one of these frames.
    """

  def frames_at(self, seconds: Sequence[float] | np.ndarray) -> Int[np.ndarray, "n"]:
    """Numbers of the frames that are shown at these times; times outside give the first or last frame."""
    # A nanosecond of tolerance: n / rate must find frame n though neither is exact.
    begun = np.searchsorted(self.times, np.asarray(seconds) + 1e-9, side="right")
    return np.clip(begun - 1, 0, len(self) - 1)

  def resampled(self, rate: float) -> Int[np.ndarray, "n"]:
    """Numbers of the frames that are shown at the times 0, 1 / rate, 2 / rate, ... seconds."""
    count = max(int(self.duration * rate + 1e-6), 1)
    return self.frames_at(np.arange(count) / rate)

  def _numbers(self, indices: Indices) -> list[int]:
    """Each number once, ascending; raises IndexError."""
    wanted = sorted({int(index) for index in indices})
    if not wanted or wanted[0] < 0 or wanted[-1] >= len(self):
      raise IndexError(f"{self.name} has {len(self)} frames, asked for {list(indices)}.")
    return wanted

  def close(self) -> None:
    """Lets go of what is open."""

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.close()


def resized(height: int, width: int, short_side: int) -> tuple[int, int]:
  """(height, width) with the shorter side of so many pixels, in the same proportions."""
  scale = short_side / min(height, width)
  height, width = max(short_side, round(height * scale)), max(short_side, round(width * scale))
  return (short_side, width) if height < width else (height, short_side)


class Video(Frames):
  """An open video file.

  Attributes:
    codec: FFmpeg's name of it, and of the `pixel_format`.
  """

  codec: str
  pixel_format: str

  def __init__(self, path: str | os.PathLike):
    """Opens the file and lists its frames, without decoding any.

    Raises:
      VideoError: missing, empty, no video, or damaged before the first frame.
    """
    self.name = os.fspath(path)
    reason = images.unreadable(path)
    if reason is not None:
      raise VideoError(self.name, reason, "missing")
    if not os.path.getsize(path):
      raise VideoError(self.name, "the file is empty", "empty")
    self._container = None
    try:
      self._open()
      self._list()
    except VideoError:
      self.close()
      raise
    except Exception as error:  # hostile input fails in many ways; whatever it is, the file is at fault
      self.close()
      raise VideoError(
        self.name, f"not a readable video ({type(error).__name__}: {error})", "not a video"
      ) from error

  def _open(self) -> None:
    self.close()
    self._container = av.open(self.name)
    if not self._container.streams.video:
      raise VideoError(self.name, "has no video stream", "not a video")
    self._stream = self._container.streams.video[0]
    context = self._stream.codec_context
    context.thread_count = 1  # loaders run in parallel by themselves
    self.codec, self.pixel_format = context.name, str(context.pix_fmt)

  def _list(self) -> None:
    packets = [
      _Packet(packet.pts, packet.is_keyframe)
      for packet in self._container.demux(self._stream)
      if packet.size and not packet.is_discard
    ]
    if not packets:
      raise VideoError(self.name, "has no frame", "damaged")
    stamps = [packet.pts for packet in packets]
    self._stamped = (
      bool(_STAMPED & set(self._container.format.name.split(",")))
      and None not in stamps
      and len(set(stamps)) == len(stamps)
    )
    rate = float(self._stream.average_rate or self._stream.base_rate or 25)
    if self._stamped:
      self._packets = sorted(packets, key=lambda packet: packet.pts)
      start, base = self._packets[0].pts, float(self._stream.time_base)
      self.times = np.array([(packet.pts - start) * base for packet in self._packets])
      steps = np.diff(self.times)
      self.duration = float(self.times[-1] + (np.median(steps) if steps.size else 1 / rate))
    else:
      self.times = np.arange(len(packets)) / rate
      self.duration = len(packets) / rate

  def __len__(self) -> int:
    return len(self.times)

  def read(self, indices: Indices, *, short_side: int | None = None) -> UInt8[np.ndarray, "n h w 3"]:
    """See `Frames.read`."""
    wanted = self._numbers(indices)
    found = None
    start = self._key_frame(wanted[0])
    if start > _WORTH_A_SEEK:
      found = self._read_by_stamp(wanted, start, short_side)
    if found is None:
      found = self._read_in_order(wanted, short_side)
    for number in wanted:
      check_size(self.name, number, found[number], found[wanted[0]])
    return np.stack([found[int(index)] for index in indices])

  def stream(self, indices: Indices, *, short_side: int) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Frames of ascending numbers one after the other, so that memory holds one only; see `read`.

    The last frame of a file that ends early comes again as the same array. Nothing else may be read
    meanwhile.

    Args:
      short_side: resize frames whose shorter side has more pixels.
    """
    return self._in_order(self._numbers(indices), short_side, enlarge=False)

  def _key_frame(self, index: int) -> int:
    """The last key frame that is not after a frame; 0 where time stamps say nothing."""
    if not self._stamped:
      return 0
    return max((i for i in range(index + 1) if self._packets[i].is_keyframe), default=0)

  def _read_by_stamp(
    self, wanted: list[int], start: int, short_side: int | None
  ) -> dict[int, np.ndarray] | None:
    """Frames from a key frame on; None if the seek or the stamps were not what the container said."""
    numbers = {self._packets[index].pts: index for index in wanted}
    found: dict[int, np.ndarray] = {}
    try:
      self._open()
      self._container.seek(self._packets[start].pts, stream=self._stream, backward=True)
      for frame in self._container.decode(self._stream):
        # Some "key frames" of containers need what came before them; the decoder marks what comes of it.
        if frame.pts is None or frame.is_corrupt or frame.pts > self._packets[wanted[len(found)]].pts:
          return None
        if frame.pts in numbers:
          found[numbers[frame.pts]] = self._pixels(frame, short_side)
          if len(found) == len(wanted):
            return found
    except av.FFmpegError:
      pass  # reading in order says where the damage is
    return None

  def _read_in_order(self, wanted: list[int], short_side: int | None) -> dict[int, np.ndarray]:
    return dict(zip(wanted, self._in_order(wanted, short_side)))

  def _in_order(
    self, wanted: list[int], short_side: int | None, *, enlarge: bool = True
  ) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Frames of ascending numbers by decoding from the start."""
    number, given, last, pixels = 0, 0, None, None
    try:
      self._open()
      for frame in self._container.decode(self._stream):
        last, pixels = frame, None
        if number == wanted[given]:
          pixels = self._pixels(frame, short_side, enlarge)
          yield pixels
          given += 1
          if given == len(wanted):
            return
        number += 1
    except (av.FFmpegError, MemoryError) as error:
      raise VideoError(
        self.name,
        f"damaged: {number} of {len(self)} frames can be decoded, frame {wanted[given]} "
        f"was asked for ({type(error).__name__}: {error})",
        "damaged",
      ) from error
    if last is None:
      raise VideoError(self.name, "no frame can be decoded", "damaged")
    if pixels is None:
      pixels = self._pixels(last, short_side, enlarge)
    for _ in wanted[given:]:
      yield pixels

  def _pixels(self, frame: Any, short_side: int | None, enlarge: bool = True) -> UInt8[np.ndarray, "h w 3"]:
    height, width = frame.height, frame.width
    if short_side is not None and (enlarge or min(height, width) > short_side):
      height, width = resized(height, width, short_side)
    pixels = frame.to_ndarray(width=width, height=height, format="rgb24", interpolation="BICUBIC")
    # Degrees counter-clockwise, as is numpy's quarter turn.
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))

  def close(self) -> None:
    if self._container is not None:
      self._container.close()
      self._container = None


def check_size(name: str, number: int, frame: np.ndarray, first: np.ndarray) -> None:
  """Raises VideoError where a frame has not the size of the first."""
  if frame.shape != first.shape:

    def size(array):
      return f"{array.shape[1]} x {array.shape[0]}"

    raise VideoError(
      name,
      f"its frames change from {size(first)} to {size(frame)} pixels by frame {number}; cut it there",
      "changing size",
    )
