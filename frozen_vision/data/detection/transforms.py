"""Geometry of detection examples: resizing, large-scale jitter, flips, and padding to fixed shapes.

A transform draws one `Geometry` and applies it to the image, the boxes and the masks, so that the
three cannot come apart. Records are those of `coco` (encoded image, polygons or RLE) and of
`scenes` (decoded image, bitmaps).

Choices that decide what a target is:
* Images are resized by Pillow's bilinear filter, which averages when it shrinks (OpenCV's, which
  mmdet uses, does not). Bitmaps take the nearest source pixel at the same coordinates. Polygons are
  moved and then rasterised, so small scales cost little and large ones stay sharp.
* Boxes are the annotated ones, moved. Only where the frame cuts an object, its box is drawn anew
  around the mask that is left, since the rest of a cut object may need a smaller one.
* Crowds are no targets, and neither are objects without a visible pixel.
* Without masks, boxes are clipped to the frame, and what is left of them counts.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

from absl import logging
from jaxtyping import Bool, Float, Int, Shaped, UInt8
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from frozen_vision.data import batches, images
from frozen_vision.data.segmentation import label_maps

Size = tuple[int, int]
Record = dict[str, Any]

# Rounding in float32 coordinates must not make an object at the image's border count as cut.
_CUT_TOLERANCE = 0.01


@dataclasses.dataclass(frozen=True)
class Patch:
  """A part of a bitmap that holds all its set pixels.

  Attributes:
    top: its first row in the bitmap.
    left: its first column.
    bits: bool [h, w].
  """

  top: int
  left: int
  bits: Bool[np.ndarray, "h w"]

  def box(self) -> np.ndarray:
    """xyxy of the smallest box around the set pixels, of which there is at least one."""
    rows, columns = np.flatnonzero(self.bits.any(axis=1)), np.flatnonzero(self.bits.any(axis=0))
    inside = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)
    return inside + np.array([self.left, self.top] * 2)

  def pack_into(self, packed: UInt8[np.ndarray, "h2 w8"]) -> None:
    """Writes the bits into a bitmap that is packed along its width (`ops.masks.pack`) and empty."""
    height, width = self.bits.shape
    byte, skipped = divmod(self.left, 8)
    aligned = np.zeros((height, skipped + width), bool)
    aligned[:, skipped:] = self.bits
    bits = np.packbits(aligned, axis=-1)
    packed[self.top : self.top + height, byte : byte + bits.shape[1]] = bits


@dataclasses.dataclass(frozen=True)
class Geometry:
  """Resizing, then cutting out a window, then mirroring it. Sizes are (height, width) in pixels.

  Attributes:
    source: size of the source image.
    resized: size of the whole image after resizing.
    top: first row of the window in the resized image.
    left: first column of it.
    size: size of the window, inside the resized image.
    flip: whether the window is mirrored left to right.
  """

  source: Size
  resized: Size
  top: int
  left: int
  size: Size
  flip: bool = False

  @property
  def scale(self) -> tuple[float, float]:
    """Resized over source, (height, width); the two differ by rounding."""
    return self.resized[0] / self.source[0], self.resized[1] / self.source[1]

  def move_points(self, points: Float[np.ndarray, "*n 2"]) -> Float[np.ndarray, "*n 2"]:
    """Maps (x, y) in source pixels to the window; points outside of it stay outside."""
    scale_y, scale_x = self.scale
    x = points[..., 0] * scale_x - self.left
    y = points[..., 1] * scale_y - self.top
    return np.stack([self.size[1] - x if self.flip else x, y], axis=-1)

  def move_boxes(self, boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
    """Maps xyxy boxes; not clipped."""
    corners = self.move_points(np.asarray(boxes, np.float64).reshape(-1, 2, 2))
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=-1)

  def move_image(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The window of the resized image."""
    height, width = self.size
    if self.resized == self.source:
      window = image[self.top : self.top + height, self.left : self.left + width]
      return window[:, ::-1] if self.flip else window
    scale_y, scale_x = self.scale
    # Pillow reads what the filter needs beyond the box, so this equals resizing it all first.
    box = (
      self.left / scale_x,
      self.top / scale_y,
      min((self.left + width) / scale_x, self.source[1]),
      min((self.top + height) / scale_y, self.source[0]),
    )
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR, box=box)
    if self.flip:  # by Pillow: copying a reversed view of an array takes as long as resizing
      resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(resized)

  def move_bitmaps(self, masks: Shaped[np.ndarray, "n h w"]) -> Shaped[np.ndarray, "n h2 w2"]:
    """The window of bitmaps or label maps, each pixel from the source pixel that holds its centre."""
    rows = _nearest(self.top, self.size[0], self.scale[0], self.source[0])
    columns = _nearest(self.left, self.size[1], self.scale[1], self.source[1])
    return masks[:, rows][:, :, columns[::-1] if self.flip else columns]

  def move_label_map(self, labels: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h2 w2"]:
    """The window of a label map; no label is invented between two others."""
    return self.move_bitmaps(labels[None])[0]

  def move_polygons(self, polygons: Sequence[Sequence[float]]) -> Patch:
    """The part that is seen in the window of the union of polygons [x1, y1, x2, y2, ...] in source pixels."""
    moved = [
      self.move_points(np.asarray(polygon, np.float64).reshape(-1, 2))
      for polygon in polygons
      if len(polygon) >= 6
    ]
    if not moved:
      return _UNSEEN
    # Rasterised on a canvas that begins at the object, since most objects are much smaller than the
    # window. It may begin outside: pycocotools rounds negative coordinates in another direction.
    points = np.concatenate(moved)
    low = np.floor(points.min(axis=0)).astype(int)
    high = np.minimum(np.ceil(points.max(axis=0)) + 1, self.size[::-1]).astype(int)
    first = np.maximum(low, 0)
    if np.any(high <= first):
      return _UNSEEN
    width, height = (high - low).tolist()
    runs = coco_mask.frPyObjects([(part - low).ravel().tolist() for part in moved], height, width)
    canvas = coco_mask.decode(coco_mask.merge(runs))
    skip_x, skip_y = first - low
    return Patch(int(first[1]), int(first[0]), canvas[skip_y:, skip_x:].astype(bool))


_UNSEEN = Patch(0, 0, np.zeros((0, 0), bool))


def _nearest(first: int, count: int, scale: float, source: int) -> np.ndarray:
  """Source positions of the pixels first..first + count - 1 of an axis resized by `scale`."""
  centres = (np.arange(first, first + count) + 0.5) / scale
  return np.minimum(centres.astype(int), source - 1)


def resized_size(source: Size, scale: float) -> Size:
  """(height, width) of an image after resizing, rounded, at least one pixel each."""
  return tuple(max(1, int(side * scale + 0.5)) for side in source)


@runtime_checkable
class Placement(Protocol):
  """Chooses how an image is resized, cut and placed in a frame."""

  def __call__(self, source: Size, frame: Size, rng: np.random.Generator) -> Geometry: ...

  def largest_scale(self, sizes: Int[np.ndarray, "m 2"], frame: Size) -> Float[np.ndarray, "m"]:
    """The largest factor that images of these (height, width) are ever resized by."""


@dataclasses.dataclass(frozen=True)
class LargeScaleJitter:
  """Random scale, then a random crop where the image exceeds the frame (Ghiasi et al. 2021, LSJ).

  As mmdet's `RandomResize(ratio_range, keep_ratio) + RandomCrop(absolute)`: scale 1 fits the image
  into the frame. Smaller images lie at the top left.

  Attributes:
    scale_range: of the uniform random factor.
  """

  scale_range: tuple[float, float] = (0.1, 2.0)

  def __call__(self, source: Size, frame: Size, rng: np.random.Generator) -> Geometry:
    low, high = self.scale_range
    factor = low + (high - low) * rng.random()
    fit = min(frame[0] / source[0], frame[1] / source[1])
    resized = resized_size(source, factor * fit)
    size = tuple(min(r, f) for r, f in zip(resized, frame))
    top, left = (int(rng.random() * (r - s + 1)) for r, s in zip(resized, size))
    return Geometry(source, resized, top, left, size)

  def largest_scale(self, sizes: Int[np.ndarray, "m 2"], frame: Size) -> Float[np.ndarray, "m"]:
    """See `Placement`."""
    return self.scale_range[1] * (np.asarray(frame) / sizes).min(axis=1)


@dataclasses.dataclass(frozen=True)
class ResizeToLimits:
  """Resizes to a short side, unless the long side or the frame would be exceeded; ratio kept.

  Attributes:
    short_side: pixels; a range (low, high) draws a whole number of it for each image; None fills
      the long side or the frame.
    long_side: most pixels of the longer side; None: as the frame allows.
  """

  short_side: int | tuple[int, int] | None = None
  long_side: int | None = None

  def __call__(self, source: Size, frame: Size, rng: np.random.Generator | None = None) -> Geometry:
    limits = [frame[0] / source[0], frame[1] / source[1]]
    if isinstance(self.short_side, tuple):
      if rng is None:
        raise ValueError(
          f"short_side is the range {self.short_side}, which needs randomness; give one number "
          "for evaluation."
        )
      low, high = self.short_side
      limits.append((low + int(rng.random() * (high - low + 1))) / min(source))
    elif self.short_side is not None:
      limits.append(self.short_side / min(source))
    if self.long_side is not None:
      limits.append(self.long_side / max(source))
    resized = tuple(min(r, f) for r, f in zip(resized_size(source, min(limits)), frame))
    return Geometry(source, resized, 0, 0, resized)

  def largest_scale(self, sizes: Int[np.ndarray, "m 2"], frame: Size) -> Float[np.ndarray, "m"]:
    """See `Placement`."""
    limits = [*(np.asarray(frame) / sizes).T]
    if self.short_side is not None:
      limits.append(np.max(self.short_side) / sizes.min(axis=1))
    if self.long_side is not None:
      limits.append(self.long_side / sizes.max(axis=1))
    return np.min(limits, axis=0)


@dataclasses.dataclass(frozen=True)
class DetectionTrain:
  """Training example of a fixed shape from a detection record.

  Attributes:
    frame: (height, width) of the result; content at the top left, zeros elsewhere.
    max_objects: rows of boxes and masks. Of more objects the largest are kept, with a warning.
    resize: how the image is placed: `LargeScaleJitter` or `ResizeToLimits`.
    flip_probability: of mirroring left to right.
    min_box_size: pixels; objects that are narrower or lower after moving and cutting are dropped.
    with_masks: False for data or heads without masks; boxes that the frame cuts are then clipped.
    semantic_stride: with records that have `semantic` (see `semantic_maps`): the stride at which a head reads
      them; 0 leaves them out.
    class_lists: how many classes there are, for a head that asks which of them an image was searched for
      (`data.detection.class_lists`); a record that does not say lists none. 0 leaves them out.
  """

  frame: Size
  max_objects: int
  resize: Callable[[Size, Size, np.random.Generator], Geometry] = LargeScaleJitter()
  flip_probability: float = 0.5
  min_box_size: float = 1.0
  with_masks: bool = True
  semantic_stride: int = 0
  class_lists: int = 0
  padded_keys: ClassVar[tuple[str, ...]] = ("masks",)  # see `pipeline.train_batches`

  def __call__(self, record: Record, rng: np.random.Generator) -> batches.DetectionTrainBatch:
    """Makes one example.

    Raises:
      ValueError: an undecodable image, annotations of another image size, or without a mask.
    """
    image = _image(record)
    geometry = self.resize(image.shape[:2], self.frame, rng)
    if rng.random() < self.flip_probability:
      geometry = dataclasses.replace(geometry, flip=True)
    boxes, labels, masks = _targets(record, geometry, self.min_box_size, self.with_masks)
    if len(boxes) > self.max_objects:
      logging.log_first_n(
        logging.WARNING,
        "%s has %d objects, more than max_objects = %d: the largest are kept.",
        10,
        _name(record),
        len(boxes),
        self.max_objects,
      )
      area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
      kept = np.sort(np.argsort(-area, kind="stable")[: self.max_objects])
      boxes, labels, masks = boxes[kept], labels[kept], [masks[i] for i in kept] if masks else []
    example = {
      **_padded_image(image, geometry, self.frame),
      "boxes": np.zeros((self.max_objects, 4), np.float32),
      "labels": np.zeros(self.max_objects, np.int32),
      "valid": np.arange(self.max_objects) < len(boxes),
    }
    example["boxes"][: len(boxes)] = boxes
    example["labels"][: len(boxes)] = labels
    if self.with_masks:
      height, width = self.frame
      example["masks"] = np.zeros((self.max_objects, height, -(-width // 8)), np.uint8)
      for packed, mask in zip(example["masks"], masks):
        mask.pack_into(packed)
    if self.semantic_stride:
      semantic = padded(geometry.move_label_map(record["semantic"]), self.frame, label_maps.IGNORE)
      example["semantic"] = semantic[:: self.semantic_stride, :: self.semantic_stride]
    if self.class_lists:
      for name in ("negative", "not_exhaustive"):
        example[name] = np.zeros(self.class_lists, bool)
        if f"{name}_classes" in record:
          example[name][record[f"{name}_classes"]] = True
    return example


@dataclasses.dataclass(frozen=True)
class DetectionEval:
  """Evaluation example of a fixed shape from a detection record; needs no annotations.

  Attributes:
    frame: (height, width) of the result; content at the top left, zeros elsewhere.
    resize: how the image is placed; by default as large as the frame allows.
  """

  frame: Size
  resize: ResizeToLimits = ResizeToLimits()

  def __call__(self, record: Record) -> batches.DetectionEvalBatch:
    """Makes one example, with the size of the source image."""
    image = _image(record)
    return {
      **_padded_image(image, self.resize(image.shape[:2], self.frame), self.frame),
      "original_size": np.array(image.shape[:2], np.int32),
      "image_id": np.int64(record["image_id"]),
    }


@dataclasses.dataclass(frozen=True)
class MultiScaleEval:
  """Evaluation example at several scales, each resized from the source, as `DetectionEval` would alone.

  Attributes:
    scales: at least one.
  """

  scales: tuple[DetectionEval, ...]

  def __call__(self, record: Record) -> batches.DetectionEvalBatch:
    """Makes the example of the first scale, and adds `image.i`, `image_size.i` of every further scale i."""
    record = {**record, "image": _image(record)}  # decoded once
    example = self.scales[0](record)
    for i, scale in enumerate(self.scales[1:], start=1):
      other = scale(record)
      example |= {f"{name}.{i}": other[name] for name in ("image", "image_size")}
    return example


def _image(record: Record) -> UInt8[np.ndarray, "h w 3"]:
  """The record's image, decoded if need be, checked against the size of its annotations."""
  image = record["image"]
  if not isinstance(image, np.ndarray):
    image = images.decode_image(image, name=_name(record))
  expected = record.get("height"), record.get("width")
  if None not in expected and tuple(expected) != image.shape[:2]:
    raise ValueError(
      f"{_name(record)} is {image.shape[0]} x {image.shape[1]} pixels (height x width) after "
      f"decoding, and its annotations are for {expected[0]} x {expected[1]}; prepare the data "
      "again."
    )
  return image


def _name(record: Record) -> str:
  return str(record.get("file_name", record.get("image_id", "the image")))


def padded(content: Shaped[np.ndarray, "h w *c"], frame: Size, value: int) -> Shaped[np.ndarray, "h2 w2 *c"]:
  """The content at the top left of a frame, `value` elsewhere, of the content's dtype."""
  result = np.full((*frame, *content.shape[2:]), value, content.dtype)
  result[: content.shape[0], : content.shape[1]] = content
  return result


def _padded_image(
  image: UInt8[np.ndarray, "h w 3"], geometry: Geometry, frame: Size
) -> dict[str, np.ndarray]:
  padded = np.zeros((*frame, 3), np.uint8)
  height, width = geometry.size
  padded[:height, :width] = geometry.move_image(image)
  return {"image": padded, "image_size": np.array(geometry.size, np.int32)}


def _targets(
  record: Record, geometry: Geometry, min_box_size: float, with_masks: bool
) -> tuple[np.ndarray, np.ndarray, list[Patch]]:
  """Boxes float [n,4], labels [n] and, if wanted, bitmaps of the objects seen in the window."""
  annotated = np.asarray(record["boxes"], np.float64).reshape(-1, 4)
  labels = np.asarray(record["labels"])
  crowd = np.asarray(record.get("crowd", np.zeros(len(labels), bool)), bool)
  height, width = geometry.size
  moved = geometry.move_boxes(annotated)
  boxes = np.clip(moved, 0.0, (width, height, width, height))
  cut = np.any(np.abs(boxes - moved) > _CUT_TOLERANCE, axis=1)
  seen = np.all(boxes[:, 2:] - boxes[:, :2] >= min_box_size, axis=1) & ~crowd
  if not with_masks:
    return boxes[seen], labels[seen], []
  kept, masks = [], []
  for i in np.flatnonzero(seen):
    mask = _mask(record, i, geometry)
    if not mask.bits.any():
      continue
    if cut[i]:
      boxes[i] = mask.box()
      if np.any(boxes[i, 2:] - boxes[i, :2] < min_box_size):
        continue
    kept.append(i)
    masks.append(mask)
  return boxes[kept], labels[kept], masks


def _mask(record: Record, index: int, geometry: Geometry) -> Patch:
  if "masks" in record:
    return Patch(0, 0, geometry.move_bitmaps(np.asarray(record["masks"][index : index + 1], bool))[0])
  segmentation = record["segmentations"][index]
  if segmentation is None:
    raise ValueError(
      f"Object {index} of {_name(record)} has no mask, and masks are trained here; drop such "
      "annotations when the data are read."
    )
  if isinstance(segmentation, dict):
    if isinstance(segmentation["counts"], (list, tuple)):
      segmentation = coco_mask.frPyObjects(segmentation, *segmentation["size"])
    return Patch(0, 0, geometry.move_bitmaps(coco_mask.decode(segmentation)[None].astype(bool))[0])
  return geometry.move_polygons(segmentation)
