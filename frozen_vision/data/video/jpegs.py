"""Videos as JPEG frames: each decoded once from first to last frame, never held in memory as a whole."""

import contextlib
import dataclasses
import io
import pathlib

from jaxtyping import Float, Int
import numpy as np
from PIL import Image

from frozen_vision.data.video import decoding


@dataclasses.dataclass(frozen=True)
class Encoding:
  """How frames are kept.

  Attributes:
    short_side: frames whose shorter side has more pixels are resized to it, others are kept as they are. 256
      is what facebookresearch/SlowFast (slowfast/datasets/DATASET.md) asks for Kinetics.
    quality: of the JPEG, as Pillow counts it. 90 is our choice: frames of seven real videos at 256 pixels had
      20 to 33 kB, and were 1 to 2.5 levels of 255 off in the mean.
    rate: keep only the frames that are shown at the times 0, 1 / rate, ... seconds; 0 keeps all of them.
  """

  short_side: int = 256
  quality: int = 90
  rate: float = 0.0

  def __post_init__(self):
    if self.short_side < 1 or not 1 <= self.quality <= 100 or self.rate < 0:
      raise ValueError(
        f"short_side={self.short_side}, quality={self.quality}, rate={self.rate}; expected at least 1, 1 "
        "to 100, and at least 0."
      )

  def kept(self, opened: decoding.Frames) -> Int[np.ndarray, "n"]:
    """Numbers of the frames that are kept, ascending."""
    return np.unique(opened.resampled(self.rate)) if self.rate else np.arange(len(opened))


@dataclasses.dataclass(frozen=True)
class EncodedVideo:
  """The properties of a video that was encoded as JPEG frames.

  Attributes:
    format: the codec.
    mode: its pixel format.
    times: of the kept frames, in seconds from the first frame of the video.
    duration: of the video in seconds.
    sizes: bytes of each frame's JPEG.
    file: holds them one after the other; None where the video was only decoded.
    notes: what may surprise, in words.
  """

  format: str
  mode: str
  times: Float[np.ndarray, "n"]
  duration: float
  sizes: Int[np.ndarray, "n"]
  file: pathlib.Path | None
  notes: tuple[str, ...] = ()

  def run(self, first: int, length: int) -> list[bytes]:
    """The JPEGs of frames first, first + 1, ..., at most `length` of them."""
    with open(self.file, "rb") as file:
      file.seek(int(self.sizes[:first].sum()))
      return [file.read(size) for size in self.sizes[first : first + length]]


def encode(path: str, encoding: Encoding, file: pathlib.Path | None) -> EncodedVideo:
  """Decodes a whole video, and writes its frames as JPEGs to `file` if one is given.

  Raises:
    VideoError: the video cannot be used; `file` is not left behind.
  """
  try:
    with decoding.Video(path) as opened, open(file, "wb") if file else contextlib.nullcontext() as out:
      kept = encoding.kept(opened)
      sizes, repeated = [], 0
      first = before = None
      for number, frame in zip(kept, opened.stream(kept, short_side=encoding.short_side)):
        first = frame if first is None else first
        if frame is before:
          repeated += 1
        else:
          decoding.check_size(path, number, frame, first)
          jpeg = _jpeg(frame, encoding.quality) if out else b""
          before = frame
        if out:
          out.write(jpeg)
        sizes.append(len(jpeg))
      notes = (f"ends early: its last frame stands for {repeated} more of {len(kept)}",) if repeated else ()
      return EncodedVideo(
        opened.codec, opened.pixel_format, opened.times[kept], opened.duration, np.array(sizes), file, notes
      )
  except decoding.VideoError:
    if file:
      file.unlink(missing_ok=True)
    raise


def _jpeg(frame: np.ndarray, quality: int) -> bytes:
  data = io.BytesIO()
  Image.fromarray(frame).save(data, "JPEG", quality=quality)
  return data.getvalue()
