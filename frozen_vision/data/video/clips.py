"""Cuts clips out of videos: the choice of frames, their crops, and augmentation that all frames share."""

from collections.abc import Callable
import dataclasses
import functools
import logging
from typing import Any

from jaxtyping import Int, UInt8
import numpy as np
from PIL import Image

from frozen_vision.data import batches
from frozen_vision.data.classification import augment
from frozen_vision.data.video import decoding

_logger = logging.getLogger(__name__)

Clip = UInt8[np.ndarray, "t h w 3"]
SAMPLINGS = ("dense", "uniform")
CROPS = (1, 3)


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Chooses the frames of a clip.

  `dense` takes frames at a fixed stride from somewhere in the video (Video Swin on Kinetics); a video that is
  too short starts again from its beginning. `uniform` divides the whole video into as many segments as frames
  are wanted and takes one of each (Something-Something).

  Attributes:
    frames: per clip.
    stride: of dense clips.
    kind: "dense" or "uniform".
    rate: frames per second that the video is resampled to by time stamp first, so that a stride means the
      same time in every video; 0 counts the frames as they are, as the released code does.
  """

  frames: int
  stride: int = 2
  kind: str = "dense"
  rate: float = 0.0

  def __post_init__(self):
    if self.kind not in SAMPLINGS:
      raise ValueError(f"sampling is {self.kind!r}; known: {', '.join(SAMPLINGS)}.")
    if self.frames < 1 or self.stride < 1 or self.rate < 0:
      raise ValueError(
        f"frames={self.frames}, stride={self.stride}, rate={self.rate}; expected at least 1, 1 and 0."
      )

  def train(self, length: int, rng: np.random.Generator) -> Int[np.ndarray, "t"]:
    """Frame numbers of one random clip of a video with `length` frames."""
    if self.kind == "uniform":
      bounds = self._segments(length)
      return bounds[:-1] + (rng.random(self.frames) * (bounds[1:] - bounds[:-1] + 1)).astype(np.int64)
    starts = max(length - self.frames * self.stride + 1, 1)
    return self._dense(int(rng.random() * starts), length)

  def test(self, length: int, num_clips: int) -> Int[np.ndarray, "clips t"]:
    """Frame numbers of clips that are spread evenly over the video.

    Uniform sampling has one clip only, its segments' middles; it is repeated.
    """
    if self.kind == "uniform":
      bounds = self._segments(length)
      return np.repeat(((bounds[:-1] + bounds[1:]) // 2)[None], num_clips, axis=0)
    between = (length - self.frames * self.stride + 1) / num_clips
    starts = np.zeros(num_clips, np.int64)
    if between > 0:
      starts = (np.arange(num_clips) * between + between / 2).astype(np.int64)
    return np.stack([self._dense(int(start), length) for start in starts])

  def _dense(self, start: int, length: int) -> Int[np.ndarray, "t"]:
    return (start + np.arange(self.frames) * self.stride) % length

  def _segments(self, length: int) -> Int[np.ndarray, "edges"]:
    return np.round(np.arange(self.frames + 1) * ((length - 1) / self.frames)).astype(np.int64)


def read_clip(
  record: dict[str, Any],
  choose: Callable[[int], Int[np.ndarray, "... t"]],
  *,
  rate: float = 0.0,
  short_side: int | None = None,
) -> Clip:
  """Frames of a record; of a file or of a prepared video, these frames are decoded.

  Args:
    record: `frames` [n, h, w, 3], a prepared `video`, or `path`.
    choose: frame numbers from the number of frames.
    rate: resample to so many frames per second before choosing; not of `frames`.
    short_side: what decoded frames are resized to.

  Raises:
    VideoError: the file cannot be used; names it.
  """
  if "frames" in record:
    return record["frames"][choose(len(record["frames"])).reshape(-1)]
  with record["video"] if "video" in record else decoding.Video(record["path"]) as opened:
    if rate:
      numbers = opened.resampled(rate)
      return opened.read(numbers[choose(len(numbers)).reshape(-1)], short_side=short_side)
    return opened.read(choose(len(opened)).reshape(-1), short_side=short_side)


@functools.cache
def _warn(message: str) -> None:
  """Once per file and process."""
  _logger.warning("%s; it is left out.", message)


def _example(
  record: dict[str, Any], frames: Callable[[], np.ndarray], shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
  """The clip of a readable video; of another one zeros, marked by `readable`, so that the run goes on."""
  try:
    clip, readable = frames(), True
  except decoding.VideoError as error:
    _warn(str(error))
    clip, readable = np.zeros(shape, np.uint8), False
  return {"clip": clip, "label": np.int32(record["label"]), "readable": np.bool_(readable)}


@dataclasses.dataclass(frozen=True)
class TrainTransform:
  """One augmented clip; whatever is random is the same for all of its frames.

  Attributes:
    sampler: which frames.
    size: side of the square result in pixels.
    short_side: what decoded frames are resized to first.
    crop_scale: range of the area of random resized crops; () takes the central square.
    flip: probability of mirroring left and right; 0 where classes tell left from right.
    rand_augment: None for none.
    erasing: probability of replacing a random rectangle by noise, the same in all frames.
  """

  sampler: Sampler
  size: int
  short_side: int = 256
  crop_scale: tuple[float, ...] = (0.08, 1.0)
  flip: float = 0.5
  rand_augment: augment.RandAugment | None = None
  erasing: float = 0.0

  def __call__(self, record: dict[str, Any], rng: np.random.Generator) -> batches.ClipTrainBatch:
    """Makes one example of a record of videos or clips."""
    shape = (self.sampler.frames, self.size, self.size, 3)
    return _example(record, lambda: self._augment(self._read(record, rng), rng), shape)

  def _read(self, record: dict[str, Any], rng: np.random.Generator) -> Clip:
    return read_clip(
      record,
      lambda length: self.sampler.train(length, rng),
      rate=self.sampler.rate,
      short_side=self.short_side,
    )

  def _augment(self, frames: Clip, rng: np.random.Generator) -> UInt8[np.ndarray, "t _h _w 3"]:
    # Every frame is augmented by a generator of its own that starts in the same state.
    seed = int(rng.random() * 2**53)
    flipped = rng.random() < self.flip
    return np.stack([self._frame(frame, np.random.default_rng(seed), flipped) for frame in frames])

  def _frame(self, frame: np.ndarray, rng: np.random.Generator, flipped: bool) -> np.ndarray:
    size = (self.size, self.size)
    if self.crop_scale:
      image = augment.random_resized_crop(
        Image.fromarray(frame), size, rng, scale=self.crop_scale, resample=Image.Resampling.BILINEAR
      )
    else:
      image = Image.fromarray(crops(frame[None], self.size, 1)[0, 0])
    if self.rand_augment is not None:
      image = self.rand_augment(image, rng)
    pixels = np.asarray(image)
    pixels = augment.random_erasing(pixels, rng, probability=self.erasing)
    return pixels[:, ::-1] if flipped else pixels


@dataclasses.dataclass(frozen=True)
class EvalTransform:
  """The test views of a video: clips x crops.

  Attributes:
    num_clips: clips spread evenly over the video.
    num_crops: 1 for the central square, 3 for both ends of the longer side and the centre.
  """

  sampler: Sampler
  size: int
  num_clips: int = 1
  num_crops: int = 1

  def __post_init__(self):
    if self.num_clips < 1 or self.num_crops not in CROPS:
      raise ValueError(f"{self.num_clips} clips x {self.num_crops} crops; expected 1 or more, and {CROPS}.")

  def __call__(self, record: dict[str, Any]) -> batches.ClipEvalBatch:
    """Makes one example of all views."""
    shape = (self.num_clips * self.num_crops, self.sampler.frames, self.size, self.size, 3)
    return _example(record, lambda: self.views(record), shape)

  def views(self, record: dict[str, Any]) -> UInt8[np.ndarray, "views t size size 3"]:
    """The clips of a record without its label; raises VideoError where the file cannot be used."""
    frames = read_clip(
      record,
      lambda length: self.sampler.test(length, self.num_clips),
      rate=self.sampler.rate,
      short_side=self.size,
    )
    views = crops(frames, self.size, self.num_crops)
    views = views.reshape(self.num_crops, self.num_clips, self.sampler.frames, self.size, self.size, 3)
    return views.swapaxes(0, 1).reshape(-1, *views.shape[2:])


def crops(frames: Clip, size: int, count: int) -> UInt8[np.ndarray, "count t size size 3"]:
  """Squares of the shorter side, resized: the centre, or both ends of the longer side and the centre."""
  height, width = frames.shape[1:3]
  side = min(height, width)
  spare = max(height, width) - side
  offsets = [spare // 2] if count == 1 else [0, spare, spare // 2]
  parts = []
  for offset in offsets:
    top, left = (offset, 0) if height > width else (0, offset)
    part = frames[:, top : top + side, left : left + side]
    if side != size:
      images = [Image.fromarray(frame).resize((size, size), Image.Resampling.BILINEAR) for frame in part]
      part = np.stack([np.asarray(image) for image in images])
    parts.append(part)
  return np.stack(parts)
