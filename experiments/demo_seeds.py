"""The demo in several seeds, in variants that differ in one thing; writes a table.

  PYTHONPATH=. python experiments/demo_seeds.py --workdir=/tmp/demo_seeds --seeds=0,1,2 \
    --out=experiments/results/demo_seeds.md
  PYTHONPATH=. python experiments/demo_seeds.py --study=heads --workdir=/tmp/heads \
    --out=experiments/results/head_comparison.md

The study `backbones` is the shipped backbone against a random frozen one; `heads` is HTC against Cascade and
Mask R-CNN, and BiFPN against FPN under HTC, with the same number of steps. Each run is the README's command
with other options; its metrics are compared with pycocotools on the files that it wrote. Seeds change the
scenes, the head's initial weights and the order of examples.
"""

from collections.abc import Sequence
import contextlib
import io
import pathlib

from absl import app, flags
from pycocotools import coco as pycoco
from pycocotools import cocoeval

from experiments import study as study_lib

_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")
_STUDY = flags.DEFINE_enum("study", "backbones", ["backbones", "heads"], "What is compared.")

_STUDIES = {
  "backbones": {"shipped": ("backbone.weights=shipped",), "random": ("backbone.weights=random",)},
  "heads": {
    "HTC + FPN": ("detection.head.name=htc",),
    "Cascade Mask R-CNN + FPN": ("detection.head.name=cascade_mask_rcnn",),
    "Mask R-CNN + FPN": ("detection.head.name=mask_rcnn",),
    "HTC + BiFPN x 1": ("detection.head.name=htc", "detection.neck.name=bifpn"),
    "HTC + BiFPN x 3": ("detection.head.name=htc", "detection.neck.name=bifpn", "detection.neck.repeats=3"),
  },
}
_COLUMNS = (
  "box_AP50",
  "box_AP",
  "box_AP_small",
  "box_AP_medium",
  "mask_AP50",
  "mask_AP",
  "mask_AP_small",
  "mask_AP_medium",
)


def pycocotools_metrics(folder: pathlib.Path) -> dict[str, float]:
  """AP and AP50 of the files in a workdir by pycocotools itself."""
  metrics = {}
  with contextlib.redirect_stdout(io.StringIO()):
    truth = pycoco.COCO(str(folder / "ground_truth.json"))
    found = truth.loadRes(str(folder / "detections.json"))
    for kind, name in (("bbox", "box"), ("segm", "mask")):
      evaluation = cocoeval.COCOeval(truth, found, kind)
      evaluation.evaluate()
      evaluation.accumulate()
      evaluation.summarize()
      metrics[f"{name}_AP"], metrics[f"{name}_AP50"] = (float(x) for x in evaluation.stats[:2])
  return metrics


def run(folder: pathlib.Path, options: Sequence[str]) -> dict[str, float]:
  """One run of the demo; its last evaluation, with the minutes that the command took."""
  metrics = study_lib.run("configs/coco_htc.py", folder, options, "box_AP")
  for name, value in pycocotools_metrics(folder).items():
    if abs(value - metrics[name]) > 1e-9:
      raise ValueError(f"{folder}: {name} is {metrics[name]}, but pycocotools finds {value}.")
  return metrics


def _main(argv: list[str]) -> None:
  del argv

  def run_one(number: int, seed: str, options: Sequence[str]) -> dict[str, float]:
    return run(pathlib.Path(study_lib.WORKDIR.value) / f"{_STUDY.value}_{number}_{seed}", options)

  columns = {name: name for name in _COLUMNS}
  study_lib.run_seeds(_STUDY.value, _STUDIES[_STUDY.value], _SEEDS.value, columns, run_one, _write)


def _write(rows: Sequence[str]) -> None:
  study_lib.write(
    f"experiments/demo_seeds.py --study={_STUDY.value}", rows, ", each metric equal to pycocotools' to 1e-9"
  )


if __name__ == "__main__":
  app.run(_main)
