"""Surface normals and depth of generated rooms in several seeds, on frozen backbones; writes a table.

  PYTHONPATH=. python experiments/depth_normals_seeds.py --workdir=/tmp/depth_normals \
    --out=experiments/results/depth_normals_seeds.md

A linear head on the shipped backbone, on an EfficientNet-Lite0 with ImageNet weights, and on a random frozen
backbone, with the same number of steps. Seeds change the rooms, the head's initial weights and the order of
examples. Means over images are computed once more from the files that each run wrote.
"""

from collections.abc import Sequence
import json
import pathlib

from absl import app, flags
import numpy as np

from experiments import study as study_lib

_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")

_VARIANTS = {
  "shipped `swinv2_nano`": ("backbone.weights=shipped",),
  "random `swinv2_nano`": ("backbone.weights=random",),
  "`efficientnet_lite0`": ("backbone.name=efficientnet_lite0", "backbone.weights=efficientnet_lite0"),
}
_COLUMNS = {
  "mean_angle": "mean angle",
  "median_angle": "median angle",
  "within_11.25": "within 11.25",
  "within_22.5": "within 22.5",
  "within_30": "within 30",
  "abs_rel": "abs rel",
  "rmse": "RMSE, m",
  "silog": "SILog",
  "delta1": "delta 1",
}


def check_from_files(folder: pathlib.Path, metrics: dict[str, float]) -> None:
  """Compares a run's metrics with the means of those of its images, all of whose pixels are known.

  Raises:
    ValueError: they differ.
  """
  images = json.loads((folder / "per_image.json").read_text()).values()
  for name in ("mean_angle", "abs_rel", "rmse", "silog", "delta1"):
    mean = float(np.mean([image[name] for image in images]))
    if abs(mean - metrics[name]) > 1e-6 * max(1.0, abs(mean)):
      raise ValueError(f"{folder}: {name} is {metrics[name]}, but the mean of its images is {mean}.")


def run(folder: pathlib.Path, options: Sequence[str]) -> dict[str, float]:
  """One run of the config; its last evaluation, with the minutes that the command took."""
  metrics = study_lib.run("configs/depth_normals.py", folder, options, "mean_angle")
  check_from_files(folder, metrics)
  return metrics


def _main(argv: list[str]) -> None:
  del argv

  def run_one(number: int, seed: str, options: Sequence[str]) -> dict[str, float]:
    return run(pathlib.Path(study_lib.WORKDIR.value) / f"{number}_{seed}", options)

  study_lib.run_seeds("frozen backbone", _VARIANTS, _SEEDS.value, _COLUMNS, run_one, _write)


def _write(rows: Sequence[str]) -> None:
  study_lib.write(
    "experiments/depth_normals_seeds.py",
    rows,
    "; angles in degrees, fractions of the pixels within them; 200 rooms of 128 px that were not trained on",
  )


if __name__ == "__main__":
  app.run(_main)
