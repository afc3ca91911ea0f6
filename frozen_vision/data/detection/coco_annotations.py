"""Reads and checks the JSON of COCO-format instance annotations.

Every defect is either counted (the annotation or image is repaired, clipped or dropped, and the
report says how many and names the first) or, where nothing sensible can be done with the file,
one `CocoError` that lists what is wrong. `PROBLEMS` is the complete list of what is counted.
Format: https://cocodataset.org/#format-data
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from frozen_vision.data import findings, text_files
from frozen_vision.data import images as image_io
from frozen_vision.data import names as data_names
from frozen_vision.data.detection import mask_encoding
from frozen_vision.data.findings import Kind
from frozen_vision.messages import short

_BOXES_ONLY = "To train on boxes only, set --config.detection.head.with_masks=False."
# Every counted kind: what was found, and what was done about it.
PROBLEMS = {
  "image_invalid": Kind("image records without usable id, file_name or size: dropped", "images"),
  "image_duplicate": Kind(
    "image records that repeat another word for word: dropped", "images", dropped=False
  ),
  "image_missing": Kind("image files that do not exist: image dropped", "images"),
  "image_unreadable": Kind("image files that cannot be read: image dropped", "images"),
  "image_size": Kind("image files of another size than their record: image dropped", "images"),
  "image_renamed": Kind(
    "image files whose name has another Unicode form than in the annotations: found all the same",
    "images",
    dropped=False,
  ),
  "category_unnamed": Kind("categories without a name: called by their id", "categories", dropped=False),
  "annotation_invalid": Kind(
    "annotations without usable image_id, category_id or bbox: dropped", "annotations"
  ),
  "annotation_duplicate": Kind(
    "annotations that repeat another word for word: dropped", "annotations", dropped=False
  ),
  "annotation_id": Kind(
    "annotations whose id is absent, repeated or not above 0: given a new id", "annotations", dropped=False
  ),
  "unknown_image": Kind("annotations of an image that the file does not list: dropped", "annotations"),
  "unknown_category": Kind("annotations of a category that is not listed: dropped", "annotations"),
  "box_from_mask": Kind("annotations without bbox: taken from the mask", "annotations", dropped=False),
  "box_clipped": Kind("boxes partly outside their image: clipped", "annotations", dropped=False),
  "box_outside": Kind("boxes wholly outside their image: not used for training", "annotations"),
  "box_empty": Kind("boxes of no width or height: not used for training", "annotations"),
  "polygon_invalid": Kind(
    "polygons of fewer than 3 points or with unusable numbers: dropped", "polygons", dropped=False
  ),
  "mask_missing": Kind(
    "annotations without any usable segmentation: dropped", "annotations", advice=_BOXES_ONLY
  ),
  "rle_invalid": Kind("run-length masks that do not fit their image: not used", "annotations", dropped=False),
  "area_missing": Kind("annotations without area: computed", "annotations", dropped=False),
  "crowd_only": Kind(
    "files with nothing but crowds (iscrowd 1), which are not trained on", "files", dropped=False
  ),
}
_EXAMPLES = findings.EXAMPLES
MAX_FILE = 2**36
# Pixels, far above any image; a box may lie outside of it.
MAX_BOX = 1e9
# pycocotools allocates in proportion to the length of a polygon's outline, in C, unchecked.
MAX_COORDINATE = 1e5
# COCO rounds boxes to 0.01 pixel; less than this outside is rounding, not worth a word.
_CLIP_TOLERANCE = 0.5


class CocoError(ValueError):
  """A COCO annotation file that cannot be used; the message lists what is wrong."""


@dataclasses.dataclass(frozen=True)
class ImageRow:
  """One image record of the file."""

  id: int
  file_name: str
  height: int
  width: int


@dataclasses.dataclass(frozen=True)
class AnnotationRow:
  """One annotation that passed the checks.

  Attributes:
    image_id: of the image it belongs to.
    id: unique and above 0, since official matching takes 0 for "not matched".
    label: 0..num_classes-1, the place of its category in the order of ids.
    box: x1, y1, x2, y2 in pixels, clipped to the image; None where nothing is left of it. Such
      an annotation is not for training, but the official evaluation counts it.
    segmentation: JSON of a list of polygons or of a compressed RLE dict, "null" without one.
    crowd: COCO's iscrowd.
    area: pixels, as the file says where it does.
    source: the annotation as it stands in the file.
  """

  image_id: int
  id: int
  label: int
  box: tuple[float, float, float, float] | None
  segmentation: str
  crowd: bool
  area: float
  source: Mapping[str, Any]


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The parsed file, with at least a list of images; raises FileNotFoundError or CocoError."""
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such annotation file.")
  try:
    raw = text_files.read_json(path, max_bytes=MAX_FILE)
  except text_files.TextError as error:
    raise CocoError(str(error)) from error
  if not isinstance(raw, dict):
    raise CocoError(
      f"{path}: holds a {type(raw).__name__} at the top, expected an object with the keys"
      " images, annotations, categories. (A list is the format of detections.)"
    )
  missing = [key for key in ("images", "annotations", "categories") if key not in raw]
  unlabelled = "annotations" not in raw
  if "images" in missing or ("categories" in missing and not unlabelled):
    raise CocoError(f"{path}: lacks {', '.join(missing)}; found the keys {', '.join(raw)}.")
  for key in ("images", "annotations", "categories"):
    if not isinstance(raw.get(key, []), list):
      raise CocoError(f"{path}: {key} is a {type(raw[key]).__name__}, expected a list.")
  if not raw["images"]:
    raise CocoError(f"{path}: lists no images.")
  return raw


def read_categories(
  raw: Mapping[str, Any], path: pathlib.Path, problems: findings.Findings
) -> tuple[dict[str, Any], ...]:
  """The categories in the order of their ids; label i is the i-th of them.

  Raises:
    CocoError: a category without an integer id, or an id used twice.
  """
  categories, wrong = {}, []
  for position, entry in enumerate(raw.get("categories", [])):
    identity = integer(entry.get("id")) if isinstance(entry, dict) else None
    if identity is None:
      wrong.append(f"number {position} has no integer id: {short(entry)}")
      continue
    name = entry.get("name")
    if not isinstance(name, str) or not name:
      problems.add("category_unnamed", f"id {identity}")
      name = str(identity)
    if identity in categories:
      wrong.append(f"id {identity} is used by {categories[identity]['name']!r} and {name!r}")
      continue
    categories[identity] = {**entry, "id": identity, "name": name}
  if wrong:
    raise CocoError(f"{path}: {len(wrong)} unusable categories: {_first(wrong)}.")
  return tuple(categories[identity] for identity in sorted(categories))


def read_images(
  raw: Mapping[str, Any],
  path: pathlib.Path,
  image_dir: pathlib.Path,
  problems: findings.Findings,
  chosen: Collection[int] | None,
  *,
  allow_outside: bool = False,
) -> list[ImageRow]:
  """The usable image records, in the file's order, restricted to the ids in `chosen`.

  Args:
    allow_outside: takes file names that lead out of the folder.

  Raises:
    CocoError: one id stands for different images, or `chosen` has ids that the file lacks.
    OutsideError: a file name that leads out of the folder.
  """
  rows: dict[int, ImageRow] = {}
  seen, wrong = {}, []
  for position, entry in enumerate(raw["images"]):
    identity = integer(entry.get("id")) if isinstance(entry, dict) else None
    name = _file_name(entry) if identity is not None else ""
    if identity is None or not name:
      problems.saw("images")
      problems.add("image_invalid", f"number {position}: {short(entry)}")
      continue
    if identity in seen:
      if entry == seen[identity]:
        problems.add("image_duplicate", f"id {identity}, {name}")
      else:
        wrong.append(f"id {identity} is {_file_name(seen[identity])} and {name}")
      continue
    seen[identity] = entry
    if chosen is not None and identity not in chosen:
      continue
    problems.saw("images")
    data_names.require_inside(name, f"{path}, image {identity},", allow_outside=allow_outside)
    height, width = integer(entry.get("height")), integer(entry.get("width"))
    if not height or not width or min(height, width) < 0 or height * width > image_io.MAX_PIXELS:
      if "height" in entry and "width" in entry:
        size = f"height {short(entry['height'])}, width {short(entry['width'])}"
        problems.add("image_invalid", f"{name}: {size}")
        continue
      try:
        height, width = image_io.read_size(image_dir / name, name=name)
      except image_io.ImageError as error:
        problems.add("image_unreadable", str(error))
        continue
    rows[identity] = ImageRow(identity, name, height, width)
  if wrong:
    raise CocoError(f"{path}: {len(wrong)} image ids stand for several images: {_first(wrong)}.")
  absent = [str(i) for i in chosen or () if i not in seen]
  if absent:
    raise CocoError(f"{path}: has no images with the {len(absent)} ids asked: {_first(absent)}.")
  return list(rows.values())


def _file_name(entry: Mapping[str, Any]) -> str:
  """The name of an image's file; LVIS has addresses instead, which end like `train2017/000000000009.jpg`."""
  name = entry.get("file_name")
  if name is None and isinstance(address := entry.get("coco_url"), str):
    name = "/".join(address.split("/")[-2:])
  return name if isinstance(name, str) else ""


def is_crowd(annotation: Mapping[str, Any]) -> bool:
  """COCO's iscrowd, of an annotation as it stands in the file."""
  return annotation.get("iscrowd") in (1, True, "1")


def read_annotations(
  raw: Mapping[str, Any],
  images: Sequence[ImageRow],
  categories: Sequence[Mapping[str, Any]],
  problems: findings.Findings,
  *,
  require_masks: bool,
) -> Iterator[AnnotationRow]:
  """Yields the usable annotations of `images`, in the file's order, and counts the others.

  Args:
    raw: the parsed file.
    images: annotations of other images that the file lists are passed over silently.
    categories: the label space, in order.
    problems: gets the counts.
    require_masks: drop annotations without a usable segmentation; otherwise it may be "null".
  """
  by_id = {row.id: row for row in images}
  # Raw ids may be of any type, unhashable ones too; those are already counted as invalid.
  listed = {integer(entry.get("id")) for entry in raw["images"] if isinstance(entry, dict)}
  labels = {category["id"]: label for label, category in enumerate(categories)}
  annotations = raw.get("annotations", [])
  ids = [integer(a.get("id")) if isinstance(a, dict) else None for a in annotations]
  next_id = max([i for i in ids if i is not None], default=0) + 1
  used = {}
  for position, annotation in enumerate(annotations):
    if not isinstance(annotation, dict):
      problems.saw("annotations")
      problems.add("annotation_invalid", f"number {position}: {short(annotation)}")
      continue
    identity, fresh = ids[position], False
    if identity in used and annotation == used[identity]:
      problems.add("annotation_duplicate", f"annotation {identity}")
      continue
    if identity is None or identity <= 0 or identity in used:
      identity, fresh = max(next_id, 1), True
      next_id = identity + 1
    used[identity] = annotation
    what = f"annotation {annotation.get('id', f'number {position}')}"
    image_id = integer(annotation.get("image_id"))
    category_id = integer(annotation.get("category_id"))
    image = by_id.get(image_id)
    if image is None and image_id is not None and image_id in listed:
      continue
    problems.saw("annotations")
    if fresh:
      problems.add("annotation_id", f"{what} is now {identity}")
    if image_id is None or category_id is None:
      key = "image_id" if image_id is None else "category_id"
      problems.add("annotation_invalid", f"{what}: {key} {short(annotation.get(key))}")
    elif image is None:
      problems.add("unknown_image", f"{what}: image_id {image_id}")
    elif category_id not in labels:
      problems.add("unknown_category", f"{what}: category_id {category_id}")
    else:
      row = _read_one(annotation, identity, labels[category_id], image, what, problems, require_masks)
      if row is not None:
        yield row


def _read_one(
  annotation: Mapping[str, Any],
  identity: int,
  label: int,
  image: ImageRow,
  what: str,
  problems: findings.Findings,
  require_masks: bool,
) -> AnnotationRow | None:
  what = f"{what} of {image.file_name}"
  segmentation = _read_segmentation(annotation, image, what, problems)
  if segmentation is None and require_masks:
    problems.add("mask_missing", what)
    return None
  bbox = annotation.get("bbox")
  if bbox is None and segmentation is not None:
    rle = mask_encoding.to_rle(segmentation, image.height, image.width)
    bbox = mask_utils.toBbox(rle).tolist()
    problems.add("box_from_mask", what)
  if not isinstance(bbox, list) or len(bbox) != 4 or not all(is_number(side, MAX_BOX) for side in bbox):
    problems.add("annotation_invalid", f"{what}: bbox {short(bbox)}")
    return None
  area = annotation.get("area")
  if not is_number(area, MAX_BOX**2) or area < 0:
    if segmentation is None:
      area = max(bbox[2], 0) * max(bbox[3], 0)
    else:
      rle = mask_encoding.to_rle(segmentation, image.height, image.width)
      area = float(mask_utils.area(rle))
    problems.add("area_missing", what)
  return AnnotationRow(
    image_id=image.id,
    id=identity,
    label=label,
    box=_clip_box(bbox, image, what, problems),
    segmentation=json.dumps(segmentation, separators=(",", ":")),
    crowd=is_crowd(annotation),
    area=float(area),
    source=annotation,
  )


def _clip_box(
  bbox: Sequence[float], image: ImageRow, what: str, problems: findings.Findings
) -> tuple[float, float, float, float] | None:
  x, y, w, h = bbox
  if w <= 0 or h <= 0:
    problems.add("box_empty", f"{what}: bbox {bbox}")
    return None
  x1, x2 = max(x, 0.0), min(x + w, image.width)
  y1, y2 = max(y, 0.0), min(y + h, image.height)
  if x1 >= x2 or y1 >= y2:
    problems.add("box_outside", f"{what}: bbox {bbox}, image {image.width} x {image.height}")
    return None
  if max(x1 - x, y1 - y, x + w - x2, y + h - y2) > _CLIP_TOLERANCE:
    problems.add("box_clipped", f"{what}: bbox {bbox}, image {image.width} x {image.height}")
  return float(x1), float(y1), float(x2), float(y2)


def _read_segmentation(
  annotation: Mapping[str, Any], image: ImageRow, what: str, problems: findings.Findings
) -> list[list[float]] | dict[str, Any] | None:
  segmentation = annotation.get("segmentation")
  if isinstance(segmentation, dict):
    counts = mask_encoding.rle_counts(segmentation.get("counts"))
    size = [image.height, image.width]
    total = None if counts is None else int(counts.sum())
    if segmentation.get("size") != size or total != image.height * image.width:
      found = f"size {short(segmentation.get('size'))}, {total} pixels"
      problems.add("rle_invalid", f"{what}: {found}, expected size {size}")
      return None
    if isinstance(segmentation["counts"], str):
      return {"size": size, "counts": segmentation["counts"]}
    compressed = mask_utils.frPyObjects({"size": size, "counts": counts.tolist()}, *size)
    return {"size": size, "counts": compressed["counts"].decode("ascii")}
  if not isinstance(segmentation, list):
    return None
  polygons = []
  for polygon in segmentation:
    try:
      points = np.asarray(polygon, np.float64)
    except (TypeError, ValueError, OverflowError):
      points = np.zeros((0, 0))
    # pycocotools would take a list of 4 numbers for a box.
    usable = points.ndim == 1 and points.size >= 6 and points.size % 2 == 0
    if usable and np.all(np.abs(points) <= MAX_COORDINATE):  # NaN compares as False
      polygons.append(points.tolist())
    else:
      problems.add("polygon_invalid", f"{what}: {short(polygon)}")
  return polygons or None


def integer(value: Any) -> int | None:
  """`value` as an int, None unless it is a whole number of at most 63 bits; texts are none."""
  return None if isinstance(value, str) else text_files.whole_number(value, 1 - 2**63, 2**63 - 1)


def is_number(value: Any, largest: float) -> bool:
  """Whether it is a number of at most that size; NaN is none, and neither is true."""
  return isinstance(value, int | float) and not isinstance(value, bool) and -largest <= value <= largest


def _first(items: Sequence[str]) -> str:
  more = f"; and {len(items) - _EXAMPLES} more" if len(items) > _EXAMPLES else ""
  return "; ".join(items[:_EXAMPLES]) + more
