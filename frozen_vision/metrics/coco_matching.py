"""COCO ground truth, matching and run-length encoding: what `coco_ap` is built from."""

from collections.abc import Mapping, Sequence
import json
import logging
import math
import os
from typing import Any, Literal

import faster_coco_eval
from faster_coco_eval.core import faster_eval_api
from jaxtyping import Float, Num
import numpy as np
from pycocotools import mask as mask_utils

from frozen_vision.ops import masks as mask_ops

_logger = logging.getLogger(__name__)

IouType = Literal["bbox", "segm"]
MaskArea = Literal["box", "mask"]

# In the order in which COCOeval.summarize() fills its `stats`.
METRIC_NAMES = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
PREFIXES: dict[IouType, str] = {"bbox": "box", "segm": "mask"}
KEYS: dict[IouType, str] = {"bbox": "bbox", "segm": "segmentation"}


def encode_mask(
  prob: Float[np.ndarray, "m m"],
  box: Num[np.ndarray, "4"],
  height: int,
  width: int,
  threshold: float = 0.5,
) -> dict[str, Any]:
  """Pastes a mask that fills a box into an image and encodes it, without ever filling the image.

  Only the rows and columns around the box are computed; their runs, moved by an offset, are the
  runs of the whole image in COCO's column-major order. To fill and encode the whole image instead
  costs the more, the larger the photograph is.

  Args:
    prob: probabilities at a regular grid inside `box`.
    box: xyxy in pixels of the image.
    height: of the image in pixels; `width` likewise.
    threshold: probability from which a pixel belongs to the mask.

  Returns:
    COCO's compressed RLE, `{"size": [height, width], "counts": str}`; possibly of an empty mask.
  """
  # One pixel more: with a threshold below 1/2 a mask reaches half a cell beyond its box.
  x1, y1 = max(math.floor(box[0]) - 1, 0), max(math.floor(box[1]) - 1, 0)
  x2, y2 = min(math.ceil(box[2]) + 1, width), min(math.ceil(box[3]) + 1, height)
  edges = np.zeros(0, np.int64)
  if x2 > x1 and y2 > y1:
    shifted = np.asarray(box, np.float64) - (x1, y1, x1, y1)
    inside = mask_ops.paste_mask(prob, shifted, y2 - y1, x2 - x1, threshold)
    rows = y2 - y1
    columns = np.zeros((x2 - x1, rows + 2), bool)  # With a zero before and after each column.
    columns[:, 1:-1] = inside.T
    # Where the mask begins and ends, alternating; first within the columns, then in the image.
    column, row = np.divmod(np.flatnonzero(columns[:, 1:] != columns[:, :-1]), rows + 1)
    edges = (x1 + column) * height + y1 + row
    # A run over the image's lower border goes on at the top of the next column.
    joined = np.flatnonzero(edges[1:-1:2] == edges[2::2])
    edges = np.delete(edges, np.concatenate([2 * joined + 1, 2 * joined + 2]))
  counts = np.diff(edges, prepend=0, append=height * width)
  if len(edges) and counts[-1] == 0:  # The mask ends in the last pixel: no run follows it.
    counts = counts[:-1]
  rle = {"size": [height, width], "counts": counts.tolist()}
  return as_rle(rle, height, width)


def as_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
  """Polygons, counts as a list, or compressed RLE as compressed RLE with counts of type str."""
  if isinstance(segmentation, list):
    polygons = [polygon for polygon in segmentation if len(polygon) >= 4]
    if not polygons:
      return encode_mask(np.zeros((1, 1)), np.zeros(4), height, width)
    rle = mask_utils.merge(mask_utils.frPyObjects(polygons, height, width))
  elif isinstance(segmentation["counts"], list):
    rle = mask_utils.frPyObjects(segmentation, height, width)
  else:
    rle = segmentation
  counts = rle["counts"]
  counts = counts.decode("ascii") if isinstance(counts, bytes) else counts
  return {"size": [int(size) for size in rle["size"]], "counts": counts}


def read_json(path: str | os.PathLike[str], what: str) -> Any:
  try:
    with open(path, encoding="utf-8") as file:
      return json.load(file)
  except FileNotFoundError as error:
    raise FileNotFoundError(f"{what} {os.fspath(path)!r} does not exist.") from error
  except ValueError as error:
    raise ValueError(f"{what} {os.fspath(path)!r} is not valid JSON: {error}.") from error


class GroundTruth:
  """The part of a COCO annotation file that evaluation needs, checked, with masks as RLE.

  Encoding the polygons once makes repeated evaluations cheaper. Annotation ids are replaced by
  1, 2, ...: matching uses them as marks in which 0 means "none" (pycocotools counts an object of id
  0 as never found), and ids that occur twice hide each other.
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
    self.images = {int(image["id"]): image for image in source["images"]}
    self.categories = sorted(source["categories"], key=lambda category: category["id"])
    self.annotations = []
    missing_area = 0
    for i, annotation in enumerate(source.get("annotations") or ()):
      where = f"{name}, annotation {i} (id {annotation.get('id')})"
      required = ["image_id", "category_id", "bbox"]
      required += ["segmentation"] if "segm" in iou_types else []
      if absent := [key for key in required if key not in annotation]:
        hint = " Use iou_types=('bbox',) for boxes only." if absent == ["segmentation"] else ""
        raise ValueError(f"{where}, lacks {absent}.{hint}")
      image = self.images.get(int(annotation["image_id"]))
      if image is None:
        continue  # As pycocotools: annotations of images that are not listed do not count.
      kept = {
        "id": len(self.annotations) + 1,
        "image_id": int(annotation["image_id"]),
        "category_id": annotation["category_id"],
        "bbox": annotation["bbox"],
        "iscrowd": int(annotation.get("iscrowd", 0)),
        "area": annotation.get("area"),
      }
      if "segm" in iou_types:
        height, width = self.image_size(kept["image_id"])
        kept["segmentation"] = as_rle(annotation["segmentation"], height, width)
      if kept["area"] is None:
        missing_area += 1
        width, height = annotation["bbox"][2:]
        kept["area"] = width * height
        if "segm" in iou_types:
          kept["area"] = int(mask_utils.area(kept["segmentation"]))
      self.annotations.append(kept)
    if missing_area:
      _logger.warning(
          "%s: %d annotations have no 'area'; it was computed from the mask or the box.",
          name, missing_area,
      )  # fmt: skip

  def image_size(self, image_id: int) -> tuple[int, int]:
    """(height, width) of a listed image."""
    image = self.images[image_id]
    if "height" not in image or "width" not in image:
      raise ValueError(f"Image {image_id} of the ground truth has no 'height' and 'width'.")
    return int(image["height"]), int(image["width"])


def match(
  truth: GroundTruth,
  detections: Sequence[Mapping[str, Any]],
  iou_type: IouType,
  mask_area: MaskArea,
) -> faster_eval_api.COCOeval_faster:
  """Matches detections to objects; `stats` of the answer holds the 12 numbers."""
  by_box = iou_type == "bbox" or (mask_area == "box" and "bbox" in (detections or [{}])[0])
  annotations = []
  for i, detection in enumerate(detections):
    annotation = {
      "id": i + 1,
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
    annotations.append(annotation)

  def coco(annotations):
    index = faster_coco_eval.COCO()
    # Copies, because evaluation writes into the annotations.
    index.dataset = {
      "images": list(truth.images.values()),
      "categories": truth.categories,
      "annotations": [dict(annotation) for annotation in annotations],
    }
    index.createIndex()
    return index

  evaluation = faster_eval_api.COCOeval_faster(
    coco(truth.annotations), coco(annotations), iou_type, print_function=_logger.debug
  )
  evaluation.run()
  return evaluation


def stats(evaluation: faster_eval_api.COCOeval_faster, iou_type: IouType) -> dict[str, float]:
  prefix = PREFIXES[iou_type]
  return {
    f"{prefix}_{name}": float(value) for name, value in zip(METRIC_NAMES, evaluation.stats, strict=True)
  }


def format_table(result: Mapping[str, float]) -> str:
  """The lines that pycocotools prints, for each type in `result`."""
  lines = []
  for prefix in PREFIXES.values():
    if f"{prefix}_AP" not in result:
      continue
    lines.append(f"{prefix}:")
    for name in METRIC_NAMES:
      kind, _, rest = name.replace("50", "_50").replace("75", "_75").partition("_")
      iou = f"0.{rest}" if rest in ("50", "75") else "0.50:0.95"
      area = rest if rest in ("small", "medium", "large") else "all"
      most = rest if kind == "AR" and rest.isdigit() else "100"
      title = f"Average {'Precision' if kind == 'AP' else 'Recall'}"
      lines.append(
        f" {title:<18} ({kind}) @[ IoU={iou:<9} | area={area:>6} | maxDets={most:>3} ] = "
        f"{result[f'{prefix}_{name}']:.3f}"
      )
  return "\n".join(lines)
