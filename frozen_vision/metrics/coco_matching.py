"""COCO ground truth and matching: parts of `coco_ap`."""

import collections
from collections.abc import Mapping, Sequence
import logging
import os
from typing import Any, Literal

import faster_coco_eval
from faster_coco_eval.core import faster_eval_api
import numpy as np
from pycocotools import mask as mask_utils

from frozen_vision.data import images, text_files
from frozen_vision.data.detection import coco_annotations, mask_encoding
from frozen_vision.metrics import mask_runs

_logger = logging.getLogger(__name__)

IouType = Literal["bbox", "segm"]
MaskArea = Literal["box", "mask"]

# In the order in which COCOeval.summarize() fills its `stats`.
METRIC_NAMES = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
# LVIS's: one bound on detections, 300 an image, and precision by how many training images have a class.
LVIS_METRIC_NAMES = (
  "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AP_rare", "AP_common", "AP_frequent",
  "AR_300", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
_LVIS_KEYS = (
  "AP_all", "AP_50", "AP_75", "AP_small", "AP_medium", "AP_large", "APr", "APc", "APf",
  "AR_all", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
_LVIS_DETECTIONS = 300
_LVIS_LISTS = ("neg_category_ids", "not_exhaustive_category_ids")
_FREQUENCIES = ("r", "c", "f")  # in up to 10, up to 100 and more training images
PREFIXES: dict[IouType, str] = {"bbox": "box", "segm": "mask"}
KEYS: dict[IouType, str] = {"bbox": "bbox", "segm": "segmentation"}


def as_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
  """Polygons, counts as a list, or compressed RLE as compressed RLE with counts of type str.

  Raises:
    ValueError: run lengths that do not fit the image, or neither of these.
  """
  size = [height, width]
  if isinstance(segmentation, list):
    polygons = [polygon for polygon in segmentation if _is_polygon(polygon)]
    if not polygons:
      return mask_runs.encode_masks(np.zeros((1, 1, 1), np.float32), np.zeros((1, 4)), height, width)[0]
    rle = mask_utils.merge(mask_utils.frPyObjects(polygons, height, width))
  else:
    given = segmentation.get("counts") if isinstance(segmentation, Mapping) else None
    given = given.decode("ascii", "replace") if isinstance(given, bytes) else given
    counts = mask_encoding.rle_counts(given)
    if (
      counts is None
      or counts.sum() != height * width
      or segmentation.get("size", size) not in (size, tuple(size))
    ):
      raise ValueError(f"a segmentation is neither polygons nor run lengths of {height} x {width} pixels.")
    if isinstance(given, str):
      return {"size": size, "counts": given}
    rle = mask_utils.frPyObjects({"size": size, "counts": given}, height, width)
  counts = rle["counts"]
  counts = counts.decode("ascii") if isinstance(counts, bytes) else counts
  return {"size": [int(size) for size in rle["size"]], "counts": counts}


def _is_polygon(polygon: Any) -> bool:
  if not isinstance(polygon, list) or len(polygon) < 4:
    return False
  return all(isinstance(x, int | float) and abs(x) <= coco_annotations.MAX_COORDINATE for x in polygon)


def read_json(path: str | os.PathLike[str], what: str) -> Any:
  """The content of a JSON file; raises FileNotFoundError, or ValueError with the place of what is wrong."""
  if not os.path.exists(path):
    raise FileNotFoundError(f"{what} {os.fspath(path)!r} does not exist.")
  try:
    return text_files.read_json(path, max_bytes=coco_annotations.MAX_FILE)
  except text_files.TextError as error:
    raise ValueError(f"{what} {error}") from error


class GroundTruth:
  """The part of a COCO annotation file that evaluation needs, checked, with masks as RLE.

  Encoding the polygons once makes repeated evaluations cheaper. Annotation ids are replaced by
  1, 2, ...: matching uses them as marks in which 0 means "none" (pycocotools counts an object of id
  0 as never found), and ids that occur twice hide each other.

  In a file of LVIS's an image tells of few classes whether they are there: `neg_category_ids` are not, and of
  `not_exhaustive_category_ids` only some objects are marked.

  Attributes:
    images: the records, by id.
    categories: in the order of ids.
    annotations: of listed images.
    is_lvis: the images say which classes they were searched for.
  """

  def __init__(self, source: Mapping[str, Any] | str | os.PathLike[str], iou_types):
    name = "The ground truth"
    if not isinstance(source, Mapping):
      name = f"Ground truth {os.fspath(source)!r}"
      source = read_json(source, "Ground truth")
    for key in ("images", "categories"):
      if not isinstance(source, Mapping) or not source.get(key):
        raise ValueError(
          f"{name} has no {key!r}; expected COCO's format, an object with 'images', "
          "'categories' and, where the truth is known, 'annotations'."
        )
    for key in ("images", "categories", "annotations"):
      if not isinstance(source.get(key) or [], list | tuple):
        raise ValueError(f"{name}: {key!r} is a {type(source[key]).__name__}; expected a list.")
    self.images = {_identity(image, "image", name): image for image in source["images"]}
    self.categories = sorted(source["categories"], key=lambda category: _identity(category, "category", name))
    self.is_lvis = any(key in image for image in source["images"] for key in _LVIS_LISTS)
    if self.is_lvis:
      self._check_lvis(name)
    self.annotations = []
    missing_area = 0
    for i, annotation in enumerate(source.get("annotations") or ()):
      where = f"{name}, annotation {i}"
      kept = self._annotation(annotation, where, with_masks="segm" in iou_types)
      if kept is None:
        continue  # As pycocotools: annotations of images that are not listed do not count.
      if kept["area"] is None:
        missing_area += 1
        kept["area"] = kept["bbox"][2] * kept["bbox"][3]
        if "segm" in iou_types:
          kept["area"] = int(mask_utils.area(kept["segmentation"]))
      self.annotations.append(kept | {"id": len(self.annotations) + 1})
    if missing_area:
      _logger.warning(
          "%s: %d annotations have no 'area'; it was computed from the mask or the box.",
          name, missing_area,
      )  # fmt: skip

  def _check_lvis(self, name: str) -> None:
    known = {category["id"] for category in self.categories}
    for image in self.images.values():
      for key in _LVIS_LISTS:
        listed = image.get(key)
        if not isinstance(listed, list) or not all(isinstance(x, int) and x in known for x in listed):
          raise ValueError(
            f"{name}: image {image['id']} has {key} = {listed!r}; expected a list of ids of 'categories', "
            "as in every image of an LVIS file."
          )
    for category in self.categories:
      if (frequency := category.get("frequency")) not in _FREQUENCIES:
        raise ValueError(
          f"{name}: category {category['id']} has the frequency {frequency!r}; expected 'r', 'c' or 'f', "
          "as in every category of an LVIS file."
        )

  def _annotation(self, annotation: Any, where: str, *, with_masks: bool) -> dict[str, Any] | None:
    """The annotation as matching reads it, None of an image that is not listed; raises ValueError."""
    if not isinstance(annotation, Mapping):
      raise ValueError(f"{where}, is a {type(annotation).__name__}; expected an object.")
    where = f"{where} (id {annotation.get('id')})"
    required = ["image_id", "category_id", "bbox", *(["segmentation"] if with_masks else [])]
    if absent := [key for key in required if key not in annotation]:
      hint = " Use iou_types=('bbox',) for boxes only." if absent == ["segmentation"] else ""
      raise ValueError(f"{where}, lacks {absent}.{hint}")
    image_id = _whole(annotation["image_id"], f"{where}, image_id")
    if image_id not in self.images:
      return None
    kept = {
      "image_id": image_id,
      "category_id": _whole(annotation["category_id"], f"{where}, category_id"),
      "bbox": checked_box(annotation["bbox"], where),
      "iscrowd": int(coco_annotations.is_crowd(annotation)),
      "area": annotation.get("area"),
    }
    if kept["area"] is not None and not _is_finite(kept["area"]):
      raise ValueError(f"{where}, has the area {kept['area']!r}; expected a number.")
    if with_masks:
      try:
        kept["segmentation"] = as_rle(annotation["segmentation"], *self.image_size(image_id))
      except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return kept

  def image_size(self, image_id: int) -> tuple[int, int]:
    """(height, width) of a listed image."""
    image = self.images[image_id]
    if "height" not in image or "width" not in image:
      raise ValueError(f"Image {image_id} of the ground truth has no 'height' and 'width'.")
    height, width = (text_files.whole_number(image[key], 1, 2**24) for key in ("height", "width"))
    if height is None or width is None or height * width > images.MAX_PIXELS:
      raise ValueError(
        f"Image {image_id} of the ground truth is {image['height']!r} x {image['width']!r}; expected pixels."
      )
    return height, width


def _identity(entry: Any, what: str, name: str) -> int:
  return _whole(entry.get("id") if isinstance(entry, Mapping) else None, f"{name}, the id of an {what}")


def _whole(value: Any, what: str) -> int:
  """Ids are numbered anew for matching, so that they may have any size (`match`)."""
  number = None if isinstance(value, str) else text_files.whole_number(value, -(2**200), 2**200)
  if number is None:
    raise ValueError(f"{what} is {value!r}; expected a whole number.")
  return number


def _is_finite(value: Any) -> bool:
  return coco_annotations.is_number(value, 1e18)


def checked_box(box: Any, where: str) -> list[float]:
  """x, y, width and height in pixels; raises ValueError where it is none."""
  if not isinstance(box, list) or len(box) != 4 or not all(_is_finite(side) for side in box):
    raise ValueError(f"{where}, has the bbox {box!r}; expected [x, y, width, height] in pixels.")
  return box


def checked_detection(
  row: Mapping[str, Any], truth: GroundTruth, iou_types: Sequence[IouType], where: str
) -> dict[str, Any]:
  """The parts of a detection that matching reads, checked; raises ValueError."""
  checked = {key: _whole(row[key], f"{where}, {key}") for key in ("image_id", "category_id")}
  if checked["image_id"] not in truth.images:
    raise ValueError(f"{where}: image {checked['image_id']} is not in the ground truth.")
  if not _is_finite(row["score"]):
    raise ValueError(f"{where}, has the score {row['score']!r}; expected a number.")
  if "bbox" in row:
    checked["bbox"] = checked_box(row["bbox"], where)
  if "segmentation" in row and "segm" in iou_types:
    try:
      checked["segmentation"] = as_rle(row["segmentation"], *truth.image_size(checked["image_id"]))
    except ValueError as error:
      raise ValueError(f"{where}: {error}") from error
  return checked


def require_pixels(rows: Sequence[Mapping[str, Any]], name: str) -> None:
  """Raises ValueError where most boxes lie within 0..1 without being empty: fractions, and not pixels."""
  boxes = [row["bbox"] for row in rows if "bbox" in row]
  within = [(x, y, w, h) for x, y, w, h in boxes if w > 0 and h > 0 and max(x + w, y + h) <= 1.001]
  if len(within) > len(boxes) / 2:
    raise ValueError(
      f"{name}: {len(within)} of {len(boxes)} boxes lie within 0..1, such as {within[0]}; expected x, y, "
      "width and height in pixels of the image."
    )


def match(
  truth: GroundTruth,
  detections: Sequence[Mapping[str, Any]],
  iou_type: IouType,
  mask_area: MaskArea,
) -> faster_eval_api.COCOeval_faster:
  """Matches detections to objects; `stats` of the answer holds the 12 numbers.

  Images and categories are numbered 1, 2, ... in the order of their ids: faster-coco-eval confuses ids above
  2^53, which pycocotools evaluates. Against a truth of LVIS's, the 300 detections of the highest scores of
  each image count; those of classes that the image says nothing of do not.
  """
  image_numbers = {identity: number for number, identity in enumerate(sorted(truth.images), 1)}
  category_numbers = {category["id"]: number for number, category in enumerate(truth.categories, 1)}
  by_box = iou_type == "bbox" or (mask_area == "box" and "bbox" in (detections or [{}])[0])
  found = []
  for detection in _best_of_each_image(detections) if truth.is_lvis else detections:
    if detection["category_id"] not in category_numbers:
      continue  # as pycocotools
    annotation = {
      "id": len(found) + 1,
      "image_id": detection["image_id"],
      "category_id": detection["category_id"],
      "score": detection["score"],
      "iscrowd": 0,
    }
    if iou_type == "segm":
      annotation["segmentation"] = detection["segmentation"]
    if iou_type == "bbox" or by_box:
      annotation["bbox"] = detection["bbox"]
      annotation["area"] = detection["bbox"][2] * detection["bbox"][3]
    else:
      annotation["area"] = int(mask_utils.area(detection["segmentation"]))
    found.append(annotation)

  def renumbered(image: Mapping[str, Any], number: int) -> dict[str, Any]:
    lists = {key: [category_numbers[x] for x in image[key]] for key in _LVIS_LISTS if truth.is_lvis}
    return {**image, **lists, "id": number}

  def coco(annotations: Sequence[Mapping[str, Any]]) -> faster_coco_eval.COCO:
    index = faster_coco_eval.COCO()
    # Copies, because evaluation writes into the annotations.
    index.dataset = {
      "images": [renumbered(truth.images[identity], number) for identity, number in image_numbers.items()],
      "categories": [{**category, "id": number} for number, category in enumerate(truth.categories, 1)],
      "annotations": [
        {
          **annotation,
          "image_id": image_numbers[annotation["image_id"]],
          "category_id": category_numbers[annotation["category_id"]],
        }
        for annotation in annotations
        if annotation["category_id"] in category_numbers
      ],
    }
    index.createIndex()
    return index

  evaluation = faster_eval_api.COCOeval_faster(
    coco(truth.annotations), coco(found), iou_type, print_function=_logger.debug, lvis_style=truth.is_lvis
  )
  if truth.is_lvis:
    evaluation.params.maxDets = [_LVIS_DETECTIONS]
  evaluation.run()
  return evaluation


def _best_of_each_image(detections: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """The detections that LVIS counts."""
  of_images = collections.defaultdict(list)
  for detection in detections:
    of_images[detection["image_id"]].append(detection)
  best = (sorted(rows, key=lambda row: -row["score"])[:_LVIS_DETECTIONS] for rows in of_images.values())
  return [row for rows in best for row in rows]


def stats(evaluation: faster_eval_api.COCOeval_faster, iou_type: IouType) -> dict[str, float]:
  """The numbers of an evaluation by name: `METRIC_NAMES`, or `LVIS_METRIC_NAMES`, after `box_` or `mask_`."""
  names, values = METRIC_NAMES, evaluation.stats
  if evaluation.lvis_style:
    by_key = evaluation.stats_as_dict
    names, values = LVIS_METRIC_NAMES, [by_key[key] for key in _LVIS_KEYS]
  return {f"{PREFIXES[iou_type]}_{name}": float(value) for name, value in zip(names, values, strict=True)}


def format_table(result: Mapping[str, float]) -> str:
  """The lines that pycocotools prints, for each type in `result`; of LVIS's results, those of its package."""
  lines = []
  for prefix in PREFIXES.values():
    names = LVIS_METRIC_NAMES if f"{prefix}_AR_300" in result else METRIC_NAMES
    if f"{prefix}_AP" not in result:
      continue
    lines.append(f"{prefix}:")
    for name in names:
      kind, _, rest = name.replace("50", "_50").replace("75", "_75").partition("_")
      iou = f"0.{rest}" if rest in ("50", "75") else "0.50:0.95"
      area = rest if rest in ("small", "medium", "large") else "all"
      most = "300" if names is LVIS_METRIC_NAMES else rest if kind == "AR" and rest.isdigit() else "100"
      title = f"Average {'Precision' if kind == 'AP' else 'Recall'}"
      classes = f" | classes={rest}" if rest in ("rare", "common", "frequent") else ""
      lines.append(
        f" {title:<18} ({kind}) @[ IoU={iou:<9} | area={area:>6} | maxDets={most:>3}{classes} ] = "
        f"{result[f'{prefix}_{name}']:.3f}"
      )
  return "\n".join(lines)
