"""Reports of cells that were never run: their files are written, as a run would have left them."""

import json
import pathlib

import numpy as np
from PIL import Image

from frozen_vision.report import cells, command

BACKBONES = ("swinv2_nano", "other=swinv2_nano")
_SCORES = {
  "detection": {"box_AP": 0.5, "mask_AP": 0.4},
  "linear_segmentation": {"mIoU": 0.6},
  "action": {"top1": 0.7},
  "probes": {"linear": 0.8, "knn": 0.7, "few_shot": 0.75, "calibration": 0.05},
}


def plan(workdir: pathlib.Path, **flags) -> cells.Plan:
  """A report of two backbones; `flags` as `command.make_plan` takes them."""
  tasks = ("detection", "linear_segmentation", "action", "linear", "knn", "few_shot", "calibration")
  return command.make_plan(flags.pop("backbones", BACKBONES), workdir, **{"tasks": tasks, **flags})


def fill(asked: cells.Plan, *, gain: float = 0.0, without: tuple[str, ...] = ()) -> None:
  """Writes the files of all cells but those of the names `without`; `gain` is the second backbone's."""
  for cell in asked.cells():
    if cell.name not in without:
      finish(asked, cell, gain if cell.entry == asked.backbones[-1] else 0.0)


def finish(asked: cells.Plan, cell: cells.Cell, gain: float = 0.0) -> None:
  """Writes the files of one cell."""
  details, scores, examples = _card(cell), {}, {}
  if cell.recipe != cells.CARD:
    rng = np.random.default_rng([cell.seed, len(cell.recipe)])
    for row, score in _SCORES[cell.recipe].items():
      sign = -0.1 if row == "calibration" else 1.0
      hardness = rng.normal(size=80)
      scores[row] = score + sign * gain + 0.003 * cell.seed
      if row != "calibration":
        examples[row] = (hardness < 3 * (scores[row] - 0.5)).astype(float)
    details = _probes(cell) if cell.recipe == "probes" else _trained(cell)
  if cell.recipe == "action":
    picture = asked.folder(cell) / "pictures" / "00000100_clips.png"
    picture.parent.mkdir(parents=True)
    Image.fromarray(np.full((40, 900, 3), 90, np.uint8)).save(picture)
  cells.finish(
    asked,
    cell,
    fingerprint=json.loads(json.dumps(asked.fingerprint(cell))),
    scores=scores,
    examples=examples,
    data={row: f"of seed {cell.seed}" for row in scores},
    details=details,
  )


def _card(cell: cells.Cell) -> dict:
  factor = 1 + len(cell.entry.label)
  return {
    "variant": "swinv2_nano",
    "weights": "0123456789abcdef0123",
    "licence": "",
    "parameters": 300_000 * factor,
    "storage": "float32, folded",
    "storage_bytes": 1_200_000 * factor,
    "flops": 10**8 * factor,
    "images_per_second": 900 / factor,
    "machine": "a processor, cpu",
    "batch": 8,
    "side": 224,
    "embed_dim": 256,
    "strides": [4, 8],
    "channels": [32, 64],
  }


def _probes(cell: cells.Cell) -> dict:
  grid = [[10.0**k, 0.8 - 0.02 * abs(k)] for k in range(-6, 6)]
  return {"selected": 1.0, "at_edge_of_grid": cell.seed == 1, "grid": grid, "seconds": 30.0}


def _trained(cell: cells.Cell) -> dict:
  return {
    "trained_parameters": 12_345,
    "steps": 100,
    "batch_size": 8,
    "optimizer": "adamw",
    "learning_rate": 1e-3,
    "seconds": 90.0,
    "curves": {
      "train/loss": [[step, 3.0 / (step + 10) + 0.1 * (cell.seed + 1)] for step in range(0, 100, 10)]
    },
  }
