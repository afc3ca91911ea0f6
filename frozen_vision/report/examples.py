"""Scores of single test examples of a finished run, from the files that it left."""

import collections
import csv
import json
import pathlib
from typing import Any

from jaxtyping import Float
import numpy as np
from PIL import Image

from frozen_vision.data import names
from frozen_vision.metrics import coco_matching, mean_iou
from frozen_vision.tasks import base

Scores = dict[str, Float[np.ndarray, "_"]]


def of_run(task: base.Task, kind: str, folder: pathlib.Path) -> Scores:
  """The scores of every validation example, in the order of the data; NaN for one without a score.

  Args:
    task: with its data, as the run had it.
    kind: of the config: `detection`, `segmentation`, `action` or `dense_regression`.
    folder: the run's.

  Raises:
    OSError: a file is gone.
    ValueError: files that do not fit the data.
  """
  validation = task.data["validation"]
  match kind:
    case "detection":
      return of_detections(validation.ground_truth, folder / "detections.json")
    case "segmentation":
      return {"mIoU": _of_label_maps(validation, len(task.classes), folder / "label_maps")}
    case "action":
      return {"top1": _of_predictions(len(validation), folder / "predictions.csv")}
    case "dense_regression":
      return _of_dense_maps(validation, folder / "per_image.json")
  raise ValueError(f"Runs of task {kind!r} leave no scores of single examples.")


def of_detections(truth: dict[str, Any], path: pathlib.Path) -> Scores:
  """Box and mask AP of every image by itself, in the order of its id; NaN for an image without objects."""
  detections = json.loads(path.read_text(encoding="utf-8"))
  by_image, objects = collections.defaultdict(list), collections.defaultdict(list)
  for rows, found in ((detections, by_image), (truth["annotations"], objects)):
    for row in rows:
      found[row["image_id"]].append(row)
  types: list[coco_matching.IouType] = ["bbox"]
  # A head with masks that finds nothing has a mask AP, too: as `coco_ap.evaluate_files`.
  with_masks = detections or [row for row in truth["annotations"] if row.get("segmentation")]
  if any("segmentation" in row for row in with_masks):
    types.append("segm")
  scores = {"box_AP": [], "mask_AP": []} if len(types) == 2 else {"box_AP": []}
  for image in sorted(truth["images"], key=lambda image: image["id"]):
    own = {**truth, "images": [image], "annotations": objects[image["id"]]}
    metrics = {}
    if objects[image["id"]]:
      known = coco_matching.GroundTruth(own, types)
      for kind in types:
        matched = coco_matching.match(known, by_image[image["id"]], kind, "box")
        metrics |= coco_matching.stats(matched, kind)
    for name, values in scores.items():
      value = metrics.get(name, -1.0)
      values.append(np.nan if value < 0 else value)
  return {name: np.asarray(values) for name, values in scores.items()}


def _of_label_maps(source: Any, num_classes: int, folder: pathlib.Path) -> Float[np.ndarray, "n"]:
  """Mean IoU of every image, over the classes that occur in its truth or prediction."""
  found = np.full(len(source), np.nan)
  for index in range(len(source)):
    truth = source.label(index)
    if truth is None:
      continue
    with Image.open(folder / f"{names.output_name(source.name(index))}.png") as image:
      predicted = np.asarray(image)
    counts = mean_iou.confusion_counts(truth, predicted, num_classes)
    if counts.sum():
      found[index] = np.nanmean(mean_iou.class_iou(counts))
  return found


def _of_predictions(count: int, path: pathlib.Path) -> Float[np.ndarray, "n"]:
  """1 for a video that is classified right, 0 for another, NaN for one that could not be read."""
  found = np.full(count, np.nan)
  with open(path, newline="", encoding="utf-8") as file:
    for row in csv.DictReader(file):
      found[int(row["index"])] = row["true"] == row["predicted"]
  return found


def _of_dense_maps(source: Any, path: pathlib.Path) -> Scores:
  """Mean angle and relative error of every image; NaN for one without a true normal, or depth."""
  found = json.loads(path.read_text(encoding="utf-8"))
  images = [found.get(source.name(index), {}) for index in range(len(source))]
  scores = {
    name: np.array([image.get(name, np.nan) for image in images]) for name in ("mean_angle", "abs_rel")
  }
  return {name: values for name, values in scores.items() if not np.isnan(values).all()}
