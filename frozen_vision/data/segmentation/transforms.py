"""Makes training and evaluation examples of a fixed shape from labelled images.

A transform draws one `transforms.Geometry` and applies it to the image and the label map. Labels take the
nearest source pixel, so that no class is invented. All randomness comes from the generator that is passed in.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

from absl import logging
from jaxtyping import UInt8
import numpy as np
from PIL import Image

from frozen_vision.data import batches
from frozen_vision.data.detection import transforms
from frozen_vision.data.detection.transforms import Geometry, Size
from frozen_vision.data.segmentation import label_maps

_CROP_TRIES = 10  # detectron2's and mmseg's
_MULTIPLE = 32  # frames of other scales are padded to it, so that maps of every stride cover them exactly


@dataclasses.dataclass(frozen=True)
class RandomShortSide:
  """Random scale, then a random crop where the image exceeds the frame, as Mask2Former's ADE20K recipe.

  A crop in which one class takes too much of the labelled pixels is drawn again, up to ten times; the last
  one is then taken as it is (detectron2's RandomCrop_CategoryAreaConstraint, mmseg's cat_max_ratio).

  Attributes:
    short_sides: pixels; one of them is drawn for each image.
    long_side: most pixels of the longer side.
    category_max_area: the largest fraction of a crop's labelled pixels of one class; 1 for no limit.
  """

  short_sides: tuple[int, ...]
  long_side: int
  category_max_area: float = 0.75

  def __call__(self, label: UInt8[np.ndarray, "h w"], frame: Size, rng: np.random.Generator) -> Geometry:
    source = label.shape
    short = self.short_sides[int(rng.random() * len(self.short_sides))]
    scale = min(short / min(source), self.long_side / max(source))
    resized = transforms.resized_size(source, scale)
    size = tuple(min(r, f) for r, f in zip(resized, frame))
    for _ in range(_CROP_TRIES):
      top, left = (int(rng.random() * (r - s + 1)) for r, s in zip(resized, size))
      geometry = Geometry(source, resized, top, left, size)
      if self.category_max_area >= 1.0 or self._is_varied(geometry.move_label_map(label)):
        break
    return geometry

  def _is_varied(self, label: np.ndarray) -> bool:
    counts = np.bincount(label.ravel(), minlength=256)[: label_maps.IGNORE]
    return np.count_nonzero(counts) > 1 and counts.max() < counts.sum() * self.category_max_area


@dataclasses.dataclass(frozen=True)
class ColourJitter:
  """SSD's photometric distortion (Liu et al. 2016, section 2.2), with detectron2's ranges.

  Each of the four changes happens with probability 1/2: brightness first; then contrast, before or after
  saturation and hue. Saturation and hue change in 8-bit HSV.

  Attributes:
    brightness: most that is added to or taken from every channel.
    contrast: range of the factor of every channel.
    saturation: range of the factor of the saturation.
    hue: most degrees of a turn of the colour circle. OpenCV counts half degrees: its 18 are 36.
  """

  brightness: float = 32.0
  contrast: tuple[float, float] = (0.5, 1.5)
  saturation: tuple[float, float] = (0.5, 1.5)
  hue: float = 36.0

  def __call__(
    self, image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator
  ) -> UInt8[np.ndarray, "h w 3"]:
    # All numbers are drawn whether used or not: what one change does never shifts the numbers of the next.
    chosen = rng.random(5) < 0.5
    brightness, contrast, saturation, hue = (
      low + (high - low) * rng.random()
      for low, high in (
        (-self.brightness, self.brightness),
        self.contrast,
        self.saturation,
        (-self.hue, self.hue),
      )
    )
    if chosen[0]:
      image = _per_level(image, np.arange(256) + brightness)
    contrast_first = chosen[1]
    if chosen[2] and contrast_first:
      image = _per_level(image, np.arange(256) * contrast)
    if chosen[3] or chosen[4]:
      image = _change_hsv(image, saturation if chosen[3] else 1.0, hue if chosen[4] else 0.0)
    if chosen[2] and not contrast_first:
      image = _per_level(image, np.arange(256) * contrast)
    return image


def _table(levels: np.ndarray) -> np.ndarray:
  return np.clip(levels, 0, 255).astype(np.uint8)


def _per_level(image: np.ndarray, levels: np.ndarray) -> np.ndarray:
  return _table(levels)[image]


def _change_hsv(image: np.ndarray, saturation: float, hue: float) -> np.ndarray:
  hsv = np.array(Image.fromarray(image).convert("HSV"))
  hsv[..., 0] += np.uint8(round(hue / 360 * 256) % 256)  # wraps around, as the colour circle does
  hsv[..., 1] = _per_level(hsv[..., 1], np.arange(256) * saturation)
  return np.asarray(Image.fromarray(hsv, mode="HSV").convert("RGB"))


@dataclasses.dataclass(frozen=True)
class SegmentationTrain:
  """Training example of a fixed shape from a labelled image.

  Attributes:
    frame: (height, width) of the result; content at the top left, zeros and `label_maps.IGNORE` elsewhere.
    max_segments: rows of the list of classes. Of more classes the largest are kept, with a warning; pixels of
      the others keep their label.
    resize: how the image is placed.
    jitter: change of colours; None for none.
    flip_probability: of mirroring left to right.
  """

  frame: Size
  max_segments: int
  resize: RandomShortSide
  jitter: ColourJitter | None = ColourJitter()
  flip_probability: float = 0.5

  def __call__(self, record: dict[str, Any], rng: np.random.Generator) -> batches.SegmentationTrainBatch:
    """Makes one example.

    Raises:
      ValueError: an unlabelled image.
    """
    label = record["label"]
    if label is None:
      raise ValueError(f"{record['name']} is unlabelled, and trained on; skip unlabelled images.")
    geometry = self.resize(label, self.frame, rng)
    if rng.random() < self.flip_probability:
      geometry = dataclasses.replace(geometry, flip=True)
    image = geometry.move_image(record["image"])
    if self.jitter is not None:
      image = self.jitter(image, rng)
    labels = transforms.padded(geometry.move_label_map(label), self.frame, label_maps.IGNORE)
    present = self._segments(labels, record["name"])
    segment_labels = np.zeros(self.max_segments, np.int32)
    segment_labels[: len(present)] = present
    return {
      "image": transforms.padded(image, self.frame, 0),
      "image_size": np.array(geometry.size, np.int32),
      "labels": labels,
      "segment_labels": segment_labels,
      "segment_valid": np.arange(self.max_segments) < len(present),
    }

  def _segments(self, labels: np.ndarray, name: str) -> np.ndarray:
    counts = np.bincount(labels.ravel(), minlength=256)[: label_maps.IGNORE]
    present = np.flatnonzero(counts)
    if len(present) > self.max_segments:
      logging.log_first_n(
        logging.WARNING,
        "%s has %d classes, more than max_segments = %d: the largest are kept.",
        10,
        name,
        len(present),
        self.max_segments,
      )
      largest = np.argsort(-counts[present], kind="stable")[: self.max_segments]
      present = present[np.sort(largest)]
    return present


@dataclasses.dataclass(frozen=True)
class SegmentationEval:
  """Evaluation example of a fixed shape; needs no labels.

  Attributes:
    frame: (height, width) at scale 1, best a multiple of 32; content at the top left, zeros elsewhere.
    resize: how the image is placed at scale 1.
    scales: factors of frame and image for multi-scale testing; every one is resized from the source image.
  """

  frame: Size
  resize: transforms.ResizeToLimits = transforms.ResizeToLimits()
  scales: Sequence[float] = (1.0,)

  def __call__(self, record: dict[str, Any]) -> batches.SegmentationEvalBatch:
    """Makes one example, with `image.i` and `image_size.i` of every further scale i."""
    source = record["image"].shape[:2]
    example = {"original_size": np.array(source, np.int32)}
    for i, scale in enumerate(self.scales):
      frame = tuple(int(side * scale + 0.5) for side in self.frame)
      short = self.resize.short_side and int(self.resize.short_side * scale + 0.5)
      long = self.resize.long_side and int(self.resize.long_side * scale + 0.5)
      geometry = transforms.ResizeToLimits(short, long)(source, frame)
      ending = f".{i}" if i else ""
      padded = frame if scale == 1 else tuple(-(-side // _MULTIPLE) * _MULTIPLE for side in frame)
      example[f"image{ending}"] = transforms.padded(geometry.move_image(record["image"]), padded, 0)
      example[f"image_size{ending}"] = np.array(geometry.size, np.int32)
    return example
