"""Action recognition in several seeds or folds, with several heads; writes a table.

  PYTHONPATH=. python experiments/action_runs.py --study=motion --workdir=/tmp/motion \
    --out=experiments/results/motion_seeds.md
  PYTHONPATH=. python experiments/action_runs.py --study=fights --data=FOLDER/fight_video \
    --workdir=/tmp/fights --out=experiments/results/fights_folds.md

With --data=SHARDS the clips of `fights` are decoded once before, for both lists:

  python -m frozen_vision.data.prepare videos --videos FOLDER/fight_video/train.csv \
    --group-column scene_group --out SHARDS --split train
  python -m frozen_vision.data.prepare videos --videos FOLDER/fight_video/val.csv \
    --group-column scene_group --out SHARDS --split validation

`motion` is the demo on generated clips in seeds 0, 1, 2 with three heads, and a linear layer on one frame.
`fights` is a five-fold cross-validation by scene over real clips: every clip is predicted once, by a head
that saw none of its scene. The interval is the 95% one of a fraction of that many clips (Wilson); clips of a
scene are not independent, so it is rather too narrow.
"""

from collections.abc import Sequence
import math
import pathlib

from absl import app, flags
import numpy as np

from experiments import study as study_lib
from frozen_vision.data.video import prepared_videos

_STUDY = flags.DEFINE_enum("study", None, ["motion", "fights"], "What is run.")
_DATA = flags.DEFINE_string(
  "data",
  "fight_video",
  "For the study fights: folder with train.csv and val.csv, or what `prepare videos` has made of them.",
)
_RUNS = flags.DEFINE_list("runs", None, "Seeds (motion, default 0,1,2) or folds (fights, default 0 to 4).")

_VARIANTS_OF = {
  "motion": {
    "Video Swin": ("action.head.name=video_swin",),
    "attentive probe": ("action.head.name=attentive",),
    "average of 8 frames": ("action.head.name=average",),
    "one frame, linear": ("action.head.name=average", "action.frames=1"),
  },
  "fights": {
    "Video Swin": ("action.head.name=video_swin",),
    "attentive probe": ("action.head.name=attentive",),
    "average": ("action.head.name=average",),
  },
}


def run(folder: pathlib.Path, config: str, options: Sequence[str]) -> tuple[dict[str, float], np.ndarray]:
  """One run: its last evaluation with the minutes that the command took, and its confusion matrix."""
  metrics = study_lib.run(config, folder, options, "top1")
  rows = (folder / "confusion.csv").read_text().splitlines()[1:]
  return metrics, np.array([[int(x) for x in row.split(",")[1:]] for row in rows])


def wilson(correct: int, count: int) -> tuple[float, float]:
  """The 95% interval of a fraction (Wilson 1927)."""
  z, fraction = 1.959964, correct / count
  middle = fraction + z * z / (2 * count)
  half = z * math.sqrt(fraction * (1 - fraction) / count + z * z / (4 * count * count))
  return (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)


def _main(argv: list[str]) -> None:
  del argv
  study = _STUDY.value
  config = "configs/kinetics_video_swin.py" + (":fights" if study == "fights" else "")
  option, runs = ("seed", _RUNS.value or ["0", "1", "2"])
  fixed = []
  if study == "fights":
    option, runs = "action.fold", _RUNS.value or [str(fold) for fold in range(5)]
    data = pathlib.Path(_DATA.value).absolute()
    lists = [data / "train.csv", data / "val.csv"]
    if (data / prepared_videos.KIND.builder).is_dir():
      lists = [data / prepared_videos.KIND.builder / split for split in ("train", "validation")]
    fixed = [f"action.lists=('{lists[0]}','{lists[1]}')"]
  rows = [f"| head | {option} | top-1 | mean class accuracy | clips | minutes |", "|---|---|---|---|---|---|"]
  for number, variant, changes in study_lib.chosen(_VARIANTS_OF[study]):
    total = 0
    for value in runs:
      folder = pathlib.Path(study_lib.WORKDIR.value) / f"{study}_{number}_{value}"
      metrics, confusion = run(folder, config, [f"{option}={value}", *fixed, *changes])
      total = total + confusion
      rows.append(_row(variant, value, confusion, f"{metrics['minutes']:.1f}"))
      _write(rows)
    low, high = wilson(int(np.trace(total)), int(total.sum()))
    rows.append(_row(f"**{variant}**", f"all, 95% {low:.3f} to {high:.3f}", total, ""))
    _write(rows)


def _row(variant: str, name: str, confusion: np.ndarray, minutes: str) -> str:
  counts = confusion.sum(axis=1)
  mean = np.mean(np.diag(confusion)[counts > 0] / counts[counts > 0])
  top1 = np.trace(confusion) / counts.sum()
  return f"| {variant} | {name} | {top1:.3f} | {mean:.3f} | {counts.sum()} | {minutes} |"


def _write(rows: list[str]) -> None:
  study_lib.write(f"experiments/action_runs.py --study={_STUDY.value}", rows)


if __name__ == "__main__":
  flags.mark_flag_as_required("study")
  app.run(_main)
