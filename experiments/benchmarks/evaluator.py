"""The COCO evaluator end to end against pycocotools: masks pasted, encoded and matched, and boxes matched.

  OPENBLAS_NUM_THREADS=1 PYTHONPATH=. python experiments/benchmarks/evaluator.py --rounds=7 \
    --out=experiments/results/evaluator.md
  PYTHONPATH=. python experiments/benchmarks/evaluator.py --images=3 --detections=8 --rounds=1   # seconds

Predictions are what a detector gives: boxes of log-uniform sides, 12 to 400 px, with ellipses of 28 x 28
probabilities, on images of 480 x 640; a tenth of them lie near one of the 8 objects of their image. Ours is
`CocoEvaluator`, from arrays to numbers. Its peer pastes each mask with NumPy into a whole image (only the
box is computed), encodes that with pycocotools, loads the results and runs `COCOeval`. Both are one
process, and with `OPENBLAS_NUM_THREADS=1` one thread; the 24 numbers of both must agree to 1e-9.
"""

import argparse
from collections.abc import Sequence
import contextlib
import copy
import io
import os
from typing import Any

import numpy as np
from pycocotools import coco as pycoco
from pycocotools import cocoeval
from pycocotools import mask as mask_utils

from experiments import rounds, tables
from frozen_vision.metrics import coco_ap, coco_matching
from frozen_vision.ops import masks as mask_ops
from frozen_vision.planning import machines

_HEIGHT, _WIDTH, _CELLS, _CLASSES, _OBJECTS = 480, 640, 28, 80, 8


def make_data(images: int, detections: int) -> tuple[dict[str, Any], list[dict[str, np.ndarray]]]:
  """(COCO ground truth, the predictions for each image), always the same."""
  rng = np.random.default_rng(0)
  truth = {
    "images": [{"id": i + 1, "height": _HEIGHT, "width": _WIDTH} for i in range(images)],
    "categories": [{"id": i + 1, "name": f"class {i}"} for i in range(_CLASSES)],
    "annotations": [],
  }
  predictions = []
  for image in truth["images"]:
    objects, labels = _boxes(rng, _OBJECTS), rng.integers(0, _CLASSES, _OBJECTS)
    for (x1, y1, x2, y2), label in zip(objects.tolist(), labels.tolist(), strict=True):
      x, y = (x1 + x2) / 2, (y1 + y2) / 2
      truth["annotations"].append({
        "id": len(truth["annotations"]) + 1, "image_id": image["id"], "category_id": label + 1, "iscrowd": 0,
        "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1) / 2,
        "segmentation": [[x1, y, x, y1, x2, y, x, y2]],
      })  # fmt: skip
    near = rng.integers(0, _OBJECTS, -(-detections // 10))
    boxes = np.concatenate([objects[near] + rng.normal(0, 3, (len(near), 4)), _boxes(rng, detections)])
    row = {
      "boxes": np.sort(boxes[:detections].reshape(-1, 2, 2), axis=1).reshape(-1, 4),
      "labels": np.concatenate([labels[near], rng.integers(0, _CLASSES, detections)])[:detections],
      "scores": rng.random(detections),
      "masks": _ellipses(rng, detections),
    }
    predictions.append({key: value[None].astype(np.float32) for key, value in row.items()})
    predictions[-1] |= {"labels": row["labels"][None], "valid": np.ones((1, detections), bool)}
  return truth, predictions


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
  half = np.exp(rng.uniform(np.log(6), np.log(200), (count, 2)))
  centres = rng.random((count, 2)) * (_WIDTH, _HEIGHT)
  corners = np.concatenate([centres - half, centres + half], axis=1)
  return np.clip(corners, 0, (_WIDTH, _HEIGHT) * 2)


def _ellipses(rng: np.random.Generator, count: int) -> np.ndarray:
  cells = np.linspace(-1, 1, _CELLS)
  radii = rng.uniform(0.6, 1, (2, count, 1, 1))
  distance = np.hypot(cells[:, None] / radii[0], cells / radii[1])
  return 1 / (1 + np.exp(-8 * (1 - distance) - rng.normal(0, 0.3, distance.shape)))


def ours(truth: dict[str, Any], predictions: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
  """The 24 numbers by `CocoEvaluator`."""
  evaluator = coco_ap.CocoEvaluator(truth)
  size = np.array([[_HEIGHT, _WIDTH]])
  for image, row in zip(truth["images"], predictions, strict=True):
    batch = {"image_id": np.array([image["id"]]), "original_size": size, "image_size": size}
    evaluator.update(row, batch)
  return evaluator.result()


def pycocotools(truth: dict[str, Any], predictions: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
  """The 24 numbers by pycocotools."""
  rows = []
  for image, row in zip(truth["images"], predictions, strict=True):
    boxes = np.clip(row["boxes"][0].astype(np.float64), 0, (_WIDTH, _HEIGHT) * 2)
    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    for box, bbox, label, score, mask in zip(
      boxes, np.round(xywh, 3).tolist(), row["labels"][0].tolist(), row["scores"][0], row["masks"][0]
    ):
      pasted = mask_ops.paste_mask(mask, box, _HEIGHT, _WIDTH)
      rows.append({
        "image_id": image["id"], "category_id": label + 1, "bbox": bbox, "score": float(str(score)),
        "segmentation": mask_utils.encode(np.asfortranarray(pasted, np.uint8)),
      })  # fmt: skip
  found = {}
  with contextlib.redirect_stdout(io.StringIO()):
    known = pycoco.COCO()
    known.dataset = copy.deepcopy(truth)
    known.createIndex()
    results = known.loadRes(rows)
    for iou_type, prefix in coco_matching.PREFIXES.items():
      evaluation = cocoeval.COCOeval(known, results, iou_type)
      evaluation.evaluate()
      evaluation.accumulate()
      evaluation.summarize()
      found |= {
        f"{prefix}_{key}": x for key, x in zip(coco_matching.METRIC_NAMES, evaluation.stats, strict=True)
      }
  return found


def main(arguments: Sequence[str] | None = None) -> str:
  """Runs the comparison and returns the table."""
  parser = argparse.ArgumentParser(prog="experiments/benchmarks/evaluator.py")
  parser.add_argument("--images", type=int, default=500)
  parser.add_argument("--detections", type=int, default=100, help="of each image")
  parser.add_argument("--rounds", type=int, default=7, help="from 6 on, intervals are known")
  parser.add_argument("--out", help="Markdown file to write")
  options = parser.parse_args(arguments)
  data = make_data(options.images, options.detections)
  found, peer = ours(*data), pycocotools(*data)
  if set(found) != set(peer) or max(abs(found[key] - peer[key]) for key in peer) > 1e-9:
    raise ValueError(f"The numbers differ: {found} and {peer}; there is nothing to compare.")
  seconds = rounds.interleaved(
    {"ours": lambda: ours(*data), "pycocotools": lambda: pycocotools(*data)}, options.rounds
  )
  lines = [
    f"Made by `experiments/benchmarks/evaluator.py`: {options.images} images of {_HEIGHT} x {_WIDTH} with "
    f"{options.detections} detections each, boxes and masks, {options.rounds} interleaved rounds on "
    f"{os.cpu_count()} cores of {machines.processor()}, {tables.blas_threads()}. The 24 numbers agree to "
    f"1e-9 (mask AP {found['mask_AP']:.4f}).",
    "",
    "| evaluator | seconds, median (95% interval) | of pycocotools' time |",
    "|---|---|---|",
  ]
  for name, values in seconds.items():
    cells = [name, rounds.median(values, "{:.2f}"), rounds.ratio(values, seconds["pycocotools"])]
    lines.append(f"| {' | '.join(cells)} |")
  text = "\n".join(lines) + "\n"
  tables.publish(text, options.out)
  return text


if __name__ == "__main__":
  main()
