"""The demo in several seeds, on the shipped backbone and on a random frozen one; writes a table.

  python experiments/demo_seeds.py --workdir=/tmp/demo_seeds --seeds=0,1,2 --out=experiments/results/demo_seeds.md

Each run is the README's command with another seed; its metrics are compared with pycocotools on the files that it
wrote. Seeds change the scenes, the head's initial weights and the order of examples.
"""

import contextlib
import io
import json
import pathlib
import platform
import subprocess
import sys
import time

from absl import app
from absl import flags
from pycocotools import coco as pycoco
from pycocotools import cocoeval

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the runs.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")
_BACKBONES = flags.DEFINE_list("backbones", ["shipped", "random"], "Values of config.backbone.weights.")
_OUT = flags.DEFINE_string("out", None, "Markdown file to write.")

_REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
_COLUMNS = (
    "box_AP50", "box_AP", "box_AP_small", "box_AP_medium", "mask_AP50", "mask_AP", "mask_AP_small",
    "mask_AP_medium")


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


def run(folder: pathlib.Path, seed: str, backbone: str) -> dict[str, float]:
  """One run of the demo; its last evaluation, with the minutes that the command took."""
  started = time.perf_counter()
  subprocess.run(
      [sys.executable, "-m", "frozen_vision.main", "--config=configs/coco_htc.py", f"--workdir={folder}",
       f"--config.seed={seed}", f"--config.backbone.weights={backbone}"],
      cwd=_REPOSITORY, check=True)
  minutes = (time.perf_counter() - started) / 60
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  last = [line for line in lines if "eval/box_AP" in line][-1]
  metrics = {key.removeprefix("eval/"): value for key, value in last.items() if key.startswith("eval/")}
  for name, value in pycocotools_metrics(folder).items():
    if abs(value - metrics[name]) > 1e-9:
      raise ValueError(f"{folder}: {name} is {metrics[name]}, but pycocotools finds {value}.")
  return {**metrics, "minutes": minutes}


def _main(argv: list[str]) -> None:
  del argv
  rows = ["| backbone | seed | " + " | ".join(_COLUMNS) + " | minutes |",
          "|---|---|" + "---|" * (len(_COLUMNS) + 1)]
  for backbone in _BACKBONES.value:
    for seed in _SEEDS.value:
      metrics = run(pathlib.Path(_WORKDIR.value) / f"{backbone}_{seed}", seed, backbone)
      values = " | ".join(f"{metrics[name]:.3f}" for name in _COLUMNS)
      rows.append(f"| {backbone} | {seed} | {values} | {metrics['minutes']:.1f} |")
      text = (
          "Made by `experiments/demo_seeds.py`; minutes are those of the whole command on "
          f"{platform.processor() or platform.machine()}, each metric equal to pycocotools' to 1e-9.\n\n"
          + "\n".join(rows) + "\n")
      pathlib.Path(_OUT.value).parent.mkdir(parents=True, exist_ok=True)
      pathlib.Path(_OUT.value).write_text(text)
      print(rows[-1], flush=True)


if __name__ == "__main__":
  flags.mark_flags_as_required(["workdir", "out"])
  app.run(_main)
