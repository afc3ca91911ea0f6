"""Finds the conventions of a COCO-format file: unit of boxes, masks or none, label space."""

from collections.abc import Mapping, Sequence
import json
import math
import pathlib
from typing import Any

from frozen_vision import messages
from frozen_vision.data.detection import coco_annotations as checks
from frozen_vision.messages import short

# A box of fractions of its image ends here, but for rounding.
_NORMALISED = 1.001


def require_pixels(raw: Mapping[str, Any], images: Sequence[checks.ImageRow], path: pathlib.Path) -> None:
  """Raises CocoError where most boxes lie within 0..1: fractions of the image, and not pixels."""
  by_id = {row.id: row for row in images if min(row.height, row.width) > 2}
  found, total, example = 0, 0, ""
  for annotation in raw.get("annotations", []):
    image = by_id.get(checks.integer(annotation.get("image_id"))) if isinstance(annotation, dict) else None
    corner = None if image is None else _far_corner(annotation)
    if corner is None:
      continue
    total += 1
    if max(corner) <= _NORMALISED:
      found += 1
      box = short(annotation.get("bbox") or annotation["segmentation"])
      size = f"{image.width} x {image.height} pixels"
      example = example or f"annotation {annotation.get('id')} with {box} in an image of {size}"
  if found > total / 2:
    raise checks.CocoError(
      f"{path}: {found} of {total} boxes lie within 0..1, such as {example}; expected pixels. Multiply x and "
      "width by the image's width, y and height by its height, and likewise what segmentations hold."
    )


def _far_corner(annotation: Mapping[str, Any]) -> tuple[float, float] | None:
  """The right and lower end of an annotation's box, or of its first polygon; None where it has neither."""
  match annotation:
    case {"bbox": [x, y, w, h]} if all(checks.is_number(side, checks.MAX_BOX) for side in (x, y, w, h)):
      return (x + w, y + h) if w > 0 and h > 0 and min(x, y) >= 0 else (math.inf, math.inf)
    case {"segmentation": [list(polygon), *_]} if all(
      checks.is_number(side, checks.MAX_BOX) for side in polygon
    ):
      return (max(polygon, default=math.inf), 0.0)
  return None


def have_masks(raw: Mapping[str, Any], images: Sequence[checks.ImageRow]) -> bool:
  """Whether any annotation of these images has a segmentation; of crowds only where there is nothing else."""
  kept = {row.id for row in images}
  of_crowds = of_objects = has_objects = False
  for annotation in raw.get("annotations", []):
    if isinstance(annotation, dict) and checks.integer(annotation.get("image_id")) in kept:
      has_mask = isinstance(annotation.get("segmentation"), list | dict) and bool(annotation["segmentation"])
      crowd = checks.is_crowd(annotation)
      has_objects |= not crowd
      of_crowds |= crowd and has_mask
      of_objects |= not crowd and has_mask
  return of_objects if has_objects else of_crowds


def label_space(
  own: tuple[dict[str, Any], ...],
  given: Sequence[Mapping[str, Any]] | None,
  path: pathlib.Path,
) -> tuple[dict[str, Any], ...]:
  """The categories of a file, or those `given` that a model was trained with, if the file has no others."""
  if given is None:
    return own
  names = {category["id"]: category["name"] for category in given}
  foreign = [f"{c['id']} {c['name']!r}" for c in own if names.get(c["id"]) != c["name"]]
  if foreign:
    trained = [f"{identity} {name!r}" for identity, name in names.items()]
    raise checks.CocoError(
      f"{path}: of its {len(own)} categories {len(foreign)} are not, with this id and name, those of the"
      f" training: {messages.listed(foreign)}. The training has {messages.listed(trained)}. Give a file with"
      " the categories of the training."
    )
  return tuple(sorted((dict(category) for category in given), key=lambda c: c["id"]))


def evaluable(row: checks.AnnotationRow, categories: Sequence[Mapping[str, Any]]) -> dict:
  """The annotation of a row as an evaluator reads it, with `id`, `area` and `iscrowd` filled in."""
  annotation = {**row.source, "id": row.id, "image_id": row.image_id}
  annotation["category_id"] = categories[row.label]["id"]
  annotation["area"] = row.area
  annotation["iscrowd"] = int(row.crowd)
  segmentation = json.loads(row.segmentation)
  if segmentation is None:
    annotation.pop("segmentation", None)
  else:
    annotation["segmentation"] = segmentation
  if annotation.get("bbox") is None:
    x1, y1, x2, y2 = row.box or (0.0, 0.0, 0.0, 0.0)
    annotation["bbox"] = [x1, y1, x2 - x1, y2 - y1]
  return annotation
