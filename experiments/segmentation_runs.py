"""Semantic segmentation in several seeds, with several heads; writes a table.

  PYTHONPATH=. python experiments/segmentation_runs.py --study=scenes --workdir=/tmp/scenes \
    --out=experiments/results/segmentation_seeds.md
  PYTHONPATH=. python experiments/segmentation_runs.py --study=camvid --data=FOLDER/camvid \
    --workdir=/tmp/camvid --out=experiments/results/camvid.md

`scenes` is the demo on generated scenes in seeds 0, 1, 2; each IoU is computed once more from the
label images that the run wrote. `camvid` is Mask2Former, UPerNet and the linear head on 184 real road scenes,
and Mask2Former on a random frozen backbone, in seeds 0 and 1, evaluated on its `val` images.
"""

import json
import pathlib

from absl import app, flags
import numpy as np
from PIL import Image

from experiments import study as study_lib

_STUDY = flags.DEFINE_enum("study", None, ["scenes", "camvid"], "What is run.")
_DATA = flags.DEFINE_string("data", "camvid", "Folder with meta.json, train and val, for the study camvid.")
_SEEDS = flags.DEFINE_list("seeds", None, "Seeds; by default 0,1,2 (scenes) or 0,1 (camvid).")

_VARIANTS_OF = {
  "scenes": {"Mask2Former": ("segmentation.head.name=mask2former",)},
  "camvid": {
    "Mask2Former": ("segmentation.head.name=mask2former",),
    "UPerNet": ("segmentation.head.name=upernet",),
    "linear": ("segmentation.head.name=linear",),
    "Mask2Former, random backbone": ("segmentation.head.name=mask2former", "backbone.weights=random"),
  },
}
_COLUMNS = ("mIoU", "mean_accuracy", "pixel_accuracy")


def check_from_files(folder: pathlib.Path) -> None:
  """Recomputes each class's IoU from the label images of a run on generated scenes.

  Raises:
    ValueError: the run reported another one.
  """
  reported = json.loads((folder / "per_class.json").read_text())
  count = len(reported)
  confusion = np.zeros((count, count), np.int64)
  for truth in sorted((folder / "ground_truth").glob("*.png")):
    pair = [np.asarray(Image.open(path)).ravel() for path in (truth, folder / "label_maps" / truth.name)]
    known = pair[0] < count
    np.add.at(confusion, (pair[0][known], pair[1][known]), 1)
  found = np.diag(confusion) / (confusion.sum(0) + confusion.sum(1) - np.diag(confusion))
  for (name, entry), value in zip(reported.items(), found, strict=True):
    if abs(entry["IoU"] - value) > 1e-9:
      raise ValueError(f"{folder}: IoU of {name} is {entry['IoU']}, but its label images give {value}.")


def _main(argv: list[str]) -> None:
  del argv
  study = _STUDY.value
  config, fixed = "configs/ade20k_mask2former.py", []
  if study == "camvid":
    config, fixed = f"{config}:camvid", [f"segmentation.root={pathlib.Path(_DATA.value).absolute()}"]
  seeds = _SEEDS.value or (["0", "1", "2"] if study == "scenes" else ["0", "1"])
  rows = ["| head | seed | " + " | ".join(_COLUMNS) + " | minutes |", "|---" * (len(_COLUMNS) + 3) + "|"]
  for number, variant, changes in study_lib.chosen(_VARIANTS_OF[study]):
    for seed in seeds:
      folder = pathlib.Path(study_lib.WORKDIR.value) / f"{study}_{number}_{seed}"
      metrics = study_lib.run(config, folder, [f"seed={seed}", *fixed, *changes], "mIoU")
      if study == "scenes":
        check_from_files(folder)
      values = " | ".join(f"{metrics[name]:.3f}" for name in _COLUMNS)
      rows.append(f"| {variant} | {seed} | {values} | {metrics['minutes']:.1f} |")
      study_lib.write(
        f"experiments/segmentation_runs.py --study={study}",
        rows,
        ", each class's IoU recomputed from the written label images to 1e-9" * (study == "scenes"),
      )


if __name__ == "__main__":
  flags.mark_flag_as_required("study")
  app.run(_main)
