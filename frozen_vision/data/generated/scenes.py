"""Generated scenes: coloured, textured shapes with exact instance masks and nothing to download.

The class of an object is its shape; colour, texture, size and rotation say nothing about it. 3 to 8
objects lie on a textured background, their visible boxes at least 12 pixels on the shorter side and
at most half of the image on the longer one. They are painted back to front, so that later ones hide
parts of earlier ones, and every mask holds the visible pixels only. An object that would hide too
much of another one, or lose too much at the border, is placed again, so that the truth is fair.

A scene is a pure function of (seed, split, index, image size), and of the imbalance of its classes, if there
is one: then the first class is so many times as frequent as the last, and those between fall geometrically.
"""

import dataclasses
import functools

from jaxtyping import Bool, Float32, Int16, Int32, UInt8
import numpy as np
from pycocotools import mask as coco_mask

from frozen_vision.data.generated import painting

CLASS_NAMES = painting.CLASS_NAMES

MIN_OBJECTS = 3
MAX_OBJECTS = 8
MIN_SIDE = 12  # pixels: the shorter side of every visible box
MIN_VISIBLE = 0.4  # fraction of the object's own area; with less of it, its shape cannot be told
MIN_IMAGE_SIDE = 64  # in less, there may be no room for three objects of 12 pixels or more
_NEIGHBOUR_FRACTION = 0.45  # of the objects are placed at another one, so that they overlap
_SPLITS = {"train": 0, "validation": 1}


@dataclasses.dataclass(frozen=True)
class Scene:
  """One generated scene with n objects, back to front.

  Attributes:
    image: RGB.
    labels: index into `CLASS_NAMES`.
    masks: visible pixels; no two masks share a pixel.
    visible: visible fraction of each object's area, in [MIN_VISIBLE, 1]; what lies outside of the
      image counts as not visible.
    overlapping: whether the object hides a part of another one or is partly hidden by one.
  """

  image: UInt8[np.ndarray, "h w 3"]
  labels: Int32[np.ndarray, " n"]
  masks: Bool[np.ndarray, "n h w"]
  visible: Float32[np.ndarray, " n"]
  overlapping: Bool[np.ndarray, " n"]


class SceneSource:
  """Random access to `num_images` generated scenes.

  Args:
    num_images: number of scenes; scene i does not depend on it.
    image_size: side of a square image, or (height, width), in pixels.
    seed: non-negative integer. Different seeds give unrelated scenes.
    split: "train" or "validation". The two never share a scene, whatever their seeds.
    imbalance: how many times as frequent the first class is as the last; 1 for equal classes.
    frequencies: categories say whether they are frequent, common or rare in imbalanced scenes, and the ground
      truth is one of LVIS's, of images that were searched for every class.

  Raises:
    ValueError: for an unknown split, a negative count or seed, images below 64 pixels, or an imbalance below
      1.
  """

  class_names = CLASS_NAMES

  def __init__(
    self,
    num_images: int,
    image_size: int | tuple[int, int] = 128,
    seed: int = 0,
    split: str = "train",
    *,
    imbalance: float = 1.0,
    frequencies: bool = False,
  ):
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if split not in _SPLITS:
      raise ValueError(f"split is {split!r}; expected one of {sorted(_SPLITS)}.")
    if num_images < 0 or not 0 <= seed < 2**32:
      raise ValueError(
        f"num_images={num_images}, seed={seed}; expected num_images >= 0 and 0 <= seed < 2**32."
      )
    if min(height, width) < MIN_IMAGE_SIDE:
      raise ValueError(f"image_size is {height}x{width}; both sides must be >= {MIN_IMAGE_SIDE}.")
    if imbalance < 1:
      raise ValueError(f"imbalance is {imbalance}; expected 1 (equal classes) or more.")
    self.imbalance = float(imbalance)
    self.frequencies = frequencies
    self.num_images = int(num_images)
    self.image_size = (int(height), int(width))
    self.seed = int(seed)
    self.split = split

  def __len__(self) -> int:
    return self.num_images

  def __repr__(self) -> str:
    return (
      f"SceneSource(num_images={self.num_images}, image_size={self.image_size}, "
      f"seed={self.seed}, split={self.split!r}"
      + f", imbalance={self.imbalance}" * (self.imbalance > 1)
      + ", frequencies=True" * self.frequencies
      + ")"
    )

  def __getstate__(self) -> dict:
    return {key: value for key, value in self.__dict__.items() if key != "ground_truth"}

  def scene(self, index: int) -> Scene:
    """Paints scene `index`; raises IndexError outside of [0, num_images)."""
    if not 0 <= index < self.num_images:
      raise IndexError(f"scene {index} of {self.num_images}.")
    return _make_scene(self.seed, self.split, int(index), self.image_size, self.imbalance)

  def __getitem__(self, index: int) -> dict:
    """Record of scene `index`.

    Returns:
      image uint8 [h, w, 3], RGB; image_id int, from 1; file_name str (no such file exists); height,
      width int; boxes float32 [n, 4], xyxy in pixels, tight around the visible mask; labels int32
      [n], index into `class_names`; masks bool [n, h, w], visible pixels; crowd bool [n], all
      False; area float32 [n], pixels of the mask.
    """
    scene = self.scene(index)
    height, width = self.image_size
    return {
      "image": scene.image,
      "image_id": int(index) + 1,
      "file_name": f"scene_{self.split}_{self.seed}_{index:06d}.png",
      "height": height,
      "width": width,
      "boxes": _tight_boxes(scene.masks),
      "labels": scene.labels,
      "masks": scene.masks,
      "crowd": np.zeros(len(scene.labels), bool),
      "area": scene.masks.sum((1, 2)).astype(np.float32),
    }

  @property
  def categories(self) -> list[dict]:
    """COCO categories; label i is category id i + 1."""
    categories = [dict(id=i + 1, name=name, supercategory="shape") for i, name in enumerate(CLASS_NAMES)]
    if self.frequencies:
      for category in categories:  # a third of the classes each
        category["frequency"] = "fcr"[(category["id"] - 1) * 3 // len(categories)]
    return categories

  @functools.cached_property
  def ground_truth(self) -> dict:
    """COCO instances dictionary of all scenes with RLE masks, JSON-serialisable.

    Paints every scene once (milliseconds each): meant for validation sets.
    """
    images, annotations = [], []
    for index in range(self.num_images):
      record = self[index]
      size = {key: record[key] for key in ("file_name", "height", "width")}
      absent = sorted(set(range(len(CLASS_NAMES))) - set(record["labels"].tolist()))
      searched = dict(neg_category_ids=[i + 1 for i in absent], not_exhaustive_category_ids=[])
      images.append({"id": record["image_id"], **size, **(searched if self.frequencies else {})})
      masks = record["masks"].transpose(1, 2, 0).astype(np.uint8)
      rles = coco_mask.encode(np.asfortranarray(masks))
      for box, label, area, rle in zip(record["boxes"], record["labels"], record["area"], rles):
        x1, y1, x2, y2 = (float(x) for x in box)
        annotations.append(
          dict(
            id=len(annotations) + 1,
            image_id=record["image_id"],
            category_id=int(label) + 1,
            bbox=[x1, y1, x2 - x1, y2 - y1],
            area=float(area),
            iscrowd=0,
            segmentation=dict(size=list(rle["size"]), counts=rle["counts"].decode("ascii")),
          )
        )
    info = dict(description=repr(self), version="1")
    truth = dict(images=images, annotations=annotations, categories=self.categories)
    return dict(info=info, licenses=[], **truth)


def statistics(source: SceneSource) -> dict[str, float]:
  """Figures about the objects of all scenes of `source`.

  Returns:
    objects: their number; per_image_{min,mean,max}: objects per image; overlapping: fraction of the
    objects that hide a part of another one or are partly hidden; side_min, side_median, side_max:
    shortest side, median longer side and longest side of the visible boxes, in pixels;
    visible_{min,mean}: visible fraction of an object's area; class_{min,max}: fraction of the rarest and
    of the most frequent class.
  """
  scenes = [source.scene(i) for i in range(len(source))]
  if not scenes:
    raise ValueError(f"{source!r} has no scene to describe.")
  counts = np.array([len(s.labels) for s in scenes])
  boxes = np.concatenate([_tight_boxes(s.masks) for s in scenes])
  sides = boxes[:, 2:] - boxes[:, :2]
  visible = np.concatenate([s.visible for s in scenes])
  labels = np.concatenate([s.labels for s in scenes])
  classes = np.bincount(labels, minlength=len(CLASS_NAMES)) / len(labels)
  figures = dict(
    objects=counts.sum(),
    per_image_min=counts.min(),
    per_image_mean=counts.mean(),
    per_image_max=counts.max(),
    overlapping=np.concatenate([s.overlapping for s in scenes]).mean(),
    side_min=sides.min(),
    side_median=np.median(sides.max(1)),
    side_max=sides.max(),
    visible_min=visible.min(),
    visible_mean=visible.mean(),
    class_min=classes.min(),
    class_max=classes.max(),
  )
  return {key: float(value) for key, value in figures.items()}


def _make_scene(
  seed: int, split: str, index: int, image_size: tuple[int, int], imbalance: float = 1.0
) -> Scene:
  height, width = image_size
  rng = painting.Random(seed, _SPLITS[split], index)
  canvas = painting.paint_background(rng, height, width)
  owner = np.full((height, width), -1, np.int16)  # which object a pixel shows
  placed: list[painting.Shape] = []
  full_areas: list[int] = []
  overlapping: list[bool] = []
  count = rng.integer(MIN_OBJECTS, MAX_OBJECTS + 1)
  for _ in range(count):
    label = _draw_class(rng, imbalance)  # before any refusal: rare shapes stay as frequent
    attempts = 40 if len(placed) >= MIN_OBJECTS else 4000
    for attempt in range(attempts):
      # The largest size shrinks with every refusal, so that full scenes have a place for it too.
      candidate = _sample_object(rng, label, placed, height, width, shrink=0.93**attempt)
      patch = painting.make_patch(candidate, height, width)
      hidden = _hidden_objects(patch, owner, full_areas)
      if hidden is None:
        continue
      for j in hidden:
        overlapping[j] = True
      overlapping.append(bool(hidden))
      painting.paint_shape(rng, candidate, patch, canvas)
      owner[patch.rows, patch.columns][patch.distance < 0] = len(placed)
      placed.append(candidate)
      full_areas.append(patch.full_area)
      break
  masks = owner == np.arange(len(placed), dtype=np.int16)[:, None, None]
  return Scene(
    image=(np.clip(canvas, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8),
    labels=np.array([p.label for p in placed], np.int32),
    masks=masks,
    visible=(masks.sum((1, 2)) / np.array(full_areas)).astype(np.float32),
    overlapping=np.array(overlapping),
  )


def _draw_class(rng: painting.Random, imbalance: float) -> int:
  """A label; label i of k is imbalance^(-i / (k - 1)) times as frequent as the first."""
  count = len(CLASS_NAMES)
  if imbalance == 1:
    return rng.integer(0, count)
  weights = imbalance ** (-np.arange(count) / (count - 1))
  return int(np.searchsorted(np.cumsum(weights)[:-1], rng.uniform() * weights.sum(), side="right"))


def _sample_object(
  rng: painting.Random,
  label: int,
  placed: list[painting.Shape],
  height: int,
  width: int,
  shrink: float,
) -> painting.Shape:
  """An object of log-uniform size, near another one or anywhere; its centre is inside the image."""
  smallest = MIN_SIDE / 2 + 0.5
  # At 1.6 times the smallest radius every shape has a box of MIN_SIDE in some rotation.
  largest = max(1.6 * smallest, shrink * (min(height, width) / 4 - 0.5))
  radius = smallest * (largest / smallest) ** rng.uniform()
  if placed and rng.uniform() < _NEIGHBOUR_FRACTION:
    other = placed[rng.integer(0, len(placed))]
    dx, dy = rng.direction()
    distance = (other.radius + radius) * rng.uniform(0.4, 0.8)
    x, y = other.x + dx * distance, other.y + dy * distance
  else:
    x, y = rng.uniform(0, width), rng.uniform(0, height)
  # Up to a third of the radius may be cut off by the border of the image.
  margin = radius * 0.67
  x = min(max(x, margin), width - margin)
  y = min(max(y, margin), height - margin)
  return painting.Shape(label, x, y, radius, rng.direction(), rng.uniform())


def _hidden_objects(
  patch: painting.Patch, owner: Int16[np.ndarray, "h w"], full_areas: list[int]
) -> list[int] | None:
  """Objects that lose pixels to a new one, or None when the new one would leave an unfair truth."""
  mask = patch.distance < 0
  if not _fair(mask, patch.full_area):
    return None
  below = owner[patch.rows, patch.columns][mask]
  hidden = np.flatnonzero(np.bincount(below + 1, minlength=1)[1:]).tolist()
  for j in hidden:
    remaining = owner == j
    remaining[patch.rows, patch.columns] &= ~mask
    if not _fair(remaining, full_areas[j]):
      return None
  return hidden


def _fair(mask: Bool[np.ndarray, "h w"], full_area: int) -> bool:
  """Whether enough of an object is visible: by the fraction of its area, and by the sides of its box."""
  if np.count_nonzero(mask) < MIN_VISIBLE * full_area:
    return False
  rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
  return rows[-1] - rows[0] + 1 >= MIN_SIDE and columns[-1] - columns[0] + 1 >= MIN_SIDE


def _tight_boxes(masks: Bool[np.ndarray, "n h w"]) -> Float32[np.ndarray, "n 4"]:
  rows, columns = masks.any(2), masks.any(1)
  x1, y1 = columns.argmax(1), rows.argmax(1)
  x2 = columns.shape[1] - columns[:, ::-1].argmax(1)
  y2 = rows.shape[1] - rows[:, ::-1].argmax(1)
  return np.stack([x1, y1, x2, y2], 1).astype(np.float32)
