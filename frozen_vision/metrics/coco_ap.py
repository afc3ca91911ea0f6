"""Average precision of boxes and instance masks, as the COCO server measures it, and LVIS.

Matching is done by faster-coco-eval and run-length encoding by pycocotools; the numbers equal those
of pycocotools (`COCOeval`) on the written file, and on an annotation file of LVIS's, whose images have
`neg_category_ids` and `not_exhaustive_category_ids`, those of the `lvis` package. On the command line:

    python -m frozen_vision.metrics.coco_ap ground_truth.json detections.json
"""

import argparse
from collections.abc import Mapping, Sequence
import logging
import os
from typing import Any

import jax
import numpy as np

from frozen_vision.files import atomic
from frozen_vision.metrics import coco_matching as matching
from frozen_vision.metrics import gather, mask_runs
from frozen_vision.metrics.coco_matching import IouType, MaskArea

_logger = logging.getLogger(__name__)


class CocoEvaluator:
  """Collects detections and measures them; gathers over processes by itself.

  Which area decides whether a *mask* is small, medium or large, where it matches no object, is a
  convention: pycocotools and the COCO server take the area of the box if results carry a box, else
  that of the mask. `mask_area="box"` follows the written file, which carries both. With
  `mask_area="mask"`, mask_AP_small, _medium, _large (and no other number) equal those of a file
  without boxes, `write(path, iou_types=("segm",))`, which is what mmdet and detectron2 report.

  Numbers for which there is no object in the truth (say, no large one) are -1, as COCO defines.
  """

  def __init__(
    self,
    ground_truth: Mapping[str, Any] | str | os.PathLike[str],
    iou_types: Sequence[IouType] = ("bbox", "segm"),
    *,
    mask_area: MaskArea = "box",
  ):
    """Reads the ground truth.

    Args:
      ground_truth: path or content of a COCO annotation file: `images`, `categories` and, if known,
        `annotations`. It is not modified. Without annotations, detections are collected and
        written, and `result()` is empty.
      iou_types: `bbox`, `segm` or both.
      mask_area: see above.

    Raises:
      FileNotFoundError, ValueError: the file is absent, no JSON, or lacks what is needed.
    """
    if not iou_types or set(iou_types) - set(matching.PREFIXES):
      raise ValueError(f"iou_types is {iou_types!r}; expected one or both of {tuple(matching.PREFIXES)}.")
    if mask_area not in ("box", "mask"):
      raise ValueError(f"mask_area is {mask_area!r}; expected 'box' or 'mask'.")
    self._iou_types = tuple(iou_types)
    self._mask_area: MaskArea = mask_area
    self._truth = matching.GroundTruth(ground_truth, iou_types)
    self._category_ids = [category["id"] for category in self._truth.categories]
    self.reset()

  @property
  def class_names(self) -> list[str]:
    """Name of each contiguous label: the categories in the order of their ids."""
    return [str(category.get("name", category["id"])) for category in self._truth.categories]

  def reset(self) -> None:
    """Forgets all detections; the ground truth stays."""
    self._detections: dict[int, list[dict[str, Any]]] = {}
    self._class_ap: dict[str, dict[str, float]] | None = None

  def update(self, predictions: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> None:
    """Adds the detections of one batch.

    Args:
      predictions: `boxes` [b, k, 4] xyxy in input pixels, `scores` [b, k], `labels` [b, k]
        contiguous, `valid` [b, k] and, for `segm`, `masks` [b, k, m, m] probabilities inside the
        box. All must be readable by this process.
      batch: `image_size` [b, 2] (h, w) of the content in input pixels, `original_size` [b, 2],
        `image_id` [b], and optionally `example_valid` [b], False for padding examples, which are
        ignored.

    Raises:
      ValueError: an unknown image, an image that was there before (padding that is not marked, or a
        second pass without `reset`), a label without category, numbers that are not finite, or a
        size other than the ground truth's.
    """
    if "segm" in self._iou_types and "masks" not in predictions:
      raise ValueError(
        f"predictions have {sorted(predictions)} and no 'masks'; a detector without masks is "
        "evaluated with iou_types=('bbox',)."
      )
    self._class_ap = None
    predictions = {key: np.asarray(value) for key, value in predictions.items()}
    batch = {
      key: np.asarray(batch[key])
      for key in ("image_size", "original_size", "image_id", "example_valid")
      if key in batch
    }
    for i, image_id in enumerate(batch["image_id"].tolist()):
      if "example_valid" in batch and not batch["example_valid"][i]:
        continue
      self._check_image(image_id, tuple(batch["original_size"][i].tolist()))
      self._detections[image_id] = self._image_detections(
        image_id,
        {key: value[i] for key, value in predictions.items()},
        batch["image_size"][i],
        batch["original_size"][i],
      )

  def _check_image(self, image_id: int, size: tuple[int, int]) -> None:
    if image_id not in self._truth.images:
      raise ValueError(
        f"Image {image_id} is not in the ground truth; the predictions and the annotation file "
        "belong to different data."
      )
    if image_id in self._detections:
      raise ValueError(
        f"Image {image_id} was given twice. Mark padding with example_valid=False; call reset() "
        "before a second pass."
      )
    if (expected := self._truth.image_size(image_id)) != size:
      raise ValueError(
        f"Image {image_id} is {size} (height, width), but {expected} in the ground truth; its "
        "annotations would not fit. Correct the file, or the image's orientation."
      )

  def _image_detections(self, image_id, predictions, image_size, original_size):
    kept = np.flatnonzero(predictions["valid"])
    labels, scores = predictions["labels"][kept], predictions["scores"][kept].astype(np.float32)
    boxes = predictions["boxes"][kept].astype(np.float64)
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
      raise ValueError(f"Image {image_id} has boxes or scores that are NaN or infinite.")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(self._category_ids):
      raise ValueError(
        f"Image {image_id} has labels {labels.min()}..{labels.max()}, but the ground truth has "
        f"{len(self._category_ids)} categories; the head was built for another data set."
      )
    height, width = (int(size) for size in original_size)
    scale = (original_size / image_size)[[1, 0, 1, 0]]
    boxes = np.clip(boxes * scale, 0, (width, height, width, height))
    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    # Written files and evaluation agree. A thousandth of a pixel is below float32 at 1024 px; the
    # shortest decimal of a float32 score keeps the order of scores, and creates no ties.
    detections = [
      {
        "image_id": image_id,
        "category_id": self._category_ids[label],
        "bbox": box,
        "score": float(str(score)),
      }
      for label, box, score in zip(labels, np.round(xywh, 3).tolist(), scores)
    ]
    if "segm" in self._iou_types:
      rles = mask_runs.encode_masks(predictions["masks"][kept], boxes, height, width)
      for detection, rle in zip(detections, rles, strict=True):
        detection["segmentation"] = rle
    return detections

  def detections(self) -> list[dict[str, Any]]:
    """All detections of all processes in COCO's results format, ordered by image id.

    Every process must call it. Boxes are xywh in pixels of the original image, categories are the
    official ids.

    Raises:
      ValueError: two processes were given the same image.
    """
    images = {}
    for state in gather.gather_objects(list(self._detections.items())):
      for image_id, detections in state:
        if image_id in images:
          raise ValueError(f"Image {image_id} was given on two processes; mark padding as such.")
        images[image_id] = detections
    self._num_seen = len(images)
    return [detection for _, image in sorted(images.items()) for detection in image]

  def write(self, path: str | os.PathLike[str], iou_types: Sequence[IouType] | None = None) -> None:
    """Writes `detections()` as the COCO server expects them; a file is complete or not there.

    Every process must call it; the first one writes.

    Args:
      path: usually `.../detections.json`; an existing file is replaced.
      iou_types: what entries carry beside image, category and score; default as constructed.
    """
    detections = self.detections()
    if jax.process_index() != 0:
      return
    written = iou_types or self._iou_types
    omitted = {key for iou_type, key in matching.KEYS.items() if iou_type not in written}
    rows = [{k: v for k, v in row.items() if k not in omitted} for row in detections]
    atomic.write_json(path, rows)

  def result(self) -> dict[str, float]:
    """12 numbers per type: box_AP, box_AP50, ..., mask_AR_large (`METRIC_NAMES` in the module
    `coco_matching`; for LVIS the 13 of `LVIS_METRIC_NAMES`, such as box_AP_rare).

    Every process must call it, and each gets the answer. Images of the ground truth without update
    count as images without detection, which a warning says. Without annotations: `{}`.
    """
    detections = self.detections()
    self._class_ap = {}
    if not self._truth.annotations:
      _logger.warning("The ground truth has no annotations: detections only, no AP.")
      return {}
    if self._num_seen < len(self._truth.images):
      _logger.warning(
          "%d of %d images of the ground truth were evaluated; all objects of the others count as "
          "missed.", self._num_seen, len(self._truth.images),
      )  # fmt: skip
    result = {}
    for iou_type in self._iou_types:
      evaluation = matching.match(self._truth, detections, iou_type, self._mask_area)
      result |= matching.stats(evaluation, iou_type)
      # precision is [IoU threshold, recall, category, area, maximum of detections].
      precision = evaluation.eval["precision"][:, :, :, 0, -1]
      for i, name in enumerate(self.class_names):
        row = self._class_ap.setdefault(name, {})
        for suffix, values in (("AP", precision[:, :, i]), ("AP50", precision[0, :, i])):
          known = values[values > -1]
          row[f"{matching.PREFIXES[iou_type]}_{suffix}"] = float(known.mean()) if known.size else -1.0
    return result

  def class_result(self) -> dict[str, dict[str, float]]:
    """`{class name: {"box_AP": ..., "box_AP50": ..., "mask_AP": ..., "mask_AP50": ...}}`.

    -1 for a class without objects; `{}` without annotations. Every process must call it.
    """
    if self._class_ap is None:
      self.result()
    return self._class_ap


def evaluate_files(
  ground_truth: str | os.PathLike[str],
  detections: str | os.PathLike[str],
  iou_types: Sequence[IouType] | None = None,
  *,
  mask_area: MaskArea = "box",
) -> dict[str, float]:
  """The numbers of `CocoEvaluator.result` for a written file of detections.

  Args:
    ground_truth: path of a COCO annotation file.
    detections: path of a file in COCO's results format.
    iou_types: default: what the detections carry.
    mask_area: as in `CocoEvaluator`.

  Raises:
    FileNotFoundError, ValueError: a file is absent, no JSON, or lacks what is needed.
  """
  rows = matching.read_json(detections, "Detections")
  name = f"Detections {os.fspath(detections)!r}"
  if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
    raise ValueError(f"{name} is not a list of objects, which is COCO's results format.")
  if iou_types is None:
    iou_types = [
      iou_type for iou_type, key in matching.KEYS.items() if not rows or any(key in row for row in rows)
    ]
  truth = matching.GroundTruth(ground_truth, iou_types)
  for i, row in enumerate(rows):
    keys = ["image_id", "category_id", "score", *(matching.KEYS[t] for t in iou_types)]
    if absent := [key for key in keys if key not in row]:
      raise ValueError(f"{name}, entry {i}, lacks {absent}.")
    row |= matching.checked_detection(row, truth, iou_types, f"{name}, entry {i}")
  matching.require_pixels(rows, name)
  if not truth.annotations:
    _logger.warning("Ground truth %r has no annotations, so there is no AP.", str(ground_truth))
    return {}
  result = {}
  for iou_type in iou_types:
    result |= matching.stats(matching.match(truth, rows, iou_type, mask_area), iou_type)
  return result


def main(arguments: Sequence[str] | None = None) -> None:
  """Prints the table for two files."""
  parser = argparse.ArgumentParser(
    prog="python -m frozen_vision.metrics.coco_ap",
    description="COCO metrics of a detections file.",
  )
  parser.add_argument("ground_truth", help="COCO annotation file")
  parser.add_argument("detections", help="detections in COCO's results format")
  parser.add_argument("--mask_area", choices=("box", "mask"), default="box",
                      help="area that tells small, medium and large masks apart")  # fmt: skip
  options = parser.parse_args(arguments)
  try:
    result = evaluate_files(options.ground_truth, options.detections, mask_area=options.mask_area)
  except (FileNotFoundError, ValueError) as error:
    parser.exit(1, f"{error}\n")
  print(matching.format_table(result) or "The ground truth has no annotations: there is no AP.")


if __name__ == "__main__":
  main()
