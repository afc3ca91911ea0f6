"""Probes of frozen backbones on CIFAR-10 and Caltech-101; writes a table.

  PYTHONPATH=. python experiments/transfer.py --data=FOLDER --workdir=/tmp/transfer \
    --out=experiments/results/transfer.md

FOLDER holds `cifar10_jpeg` (train.tar.xz and test.tar.xz) and `caltech101` (train and test), folders of
classes or archives of them. Embeddings and results are kept in the workdir, so that a run that was stopped,
or one with other --backbones, goes on where they are. Three seeds decide which fifth of the training data is
held out for validation, the episodes and, of the random backbone, its weights.
"""

import dataclasses
import json
import pathlib
import time

from absl import app, flags
import numpy as np

from experiments import available, tables
from frozen_vision.data.classification import augment, folders, splits
from frozen_vision.files import atomic
from frozen_vision.freezing import embeddings
from frozen_vision.probes import linear, suite


@dataclasses.dataclass(frozen=True)
class Data:
  """A data set of `--data`.

  Attributes:
    train, test: below the folder.
    size: side that images are resized to.
    every: steps through the training and the test images, in order of class and name: 20 uses one of 20.
    metric: of the linear evaluation.
  """

  title: str
  train: str
  test: str
  size: int
  every: tuple[int, int] = (1, 1)
  metric: linear.Metric = "top1"


DATA = {
  "cifar10": Data(
    "CIFAR-10", "cifar10_jpeg/train.tar.xz", "cifar10_jpeg/test.tar.xz", size=64, every=(20, 10)
  ),
  "caltech101": Data("Caltech-101", "caltech101/train", "caltech101/test", size=128, metric="mean_per_class"),
}

_ROOT = flags.DEFINE_string("data", None, "Folder with the data sets.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for embeddings and results.", required=True)
_SETS = flags.DEFINE_list("sets", list(DATA), f"Data sets, of {', '.join(DATA)}.")
_BACKBONES = flags.DEFINE_list(
  "backbones", list(available.BACKBONES), f"Backbones, of {', '.join(available.BACKBONES)}."
)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")
_COLLECT = flags.DEFINE_bool("collect", False, "Only write what the workdir has, and what it lacks.")
_OUT = flags.DEFINE_string("out", None, "Markdown file to write; printed only, if absent.")


class Every:
  """One of every `step` records of a source."""

  def __init__(self, source, step: int):
    self._source, self._positions = source, np.arange(0, len(source), step)

  def __len__(self) -> int:
    return len(self._positions)

  def __getitem__(self, index: int):
    return self._source[int(self._positions[index])]


def embed(data: Data, name: str, seed: int, workdir: pathlib.Path) -> tuple[suite.Examples, suite.Examples]:
  """Embeddings of the training and of the test images, from the workdir where they are there."""
  of_seed = f"_{seed}" if name == "random" else ""
  folder = workdir / "embeddings" / f"{data.title}_{name}{of_seed}"
  parts = []
  frozen = None
  for part, path, step in zip(("train", "test"), (data.train, data.test), data.every):
    file = folder / f"{part}.npz"
    if not file.exists():
      if frozen is None:
        frozen = available.frozen(name, seed)
      source = Every(folders.open_source(pathlib.Path(_ROOT.value) / path), step)
      started = time.perf_counter()
      found = embeddings.embed(frozen, source, augment.EvalTransform(data.size), batch_size=64, num_threads=2)
      print(
        f"{data.title}, {name}: {len(source)} images in {time.perf_counter() - started:.0f} s", flush=True
      )
      with atomic.open_aside(file) as out:
        np.savez(out, features=found.features, labels=found.labels)
    with np.load(file) as arrays:
      parts.append(suite.Examples(arrays["features"], arrays["labels"]))
  return parts[0], parts[1]


def result_file(key: str, name: str, seed: int, workdir: pathlib.Path) -> pathlib.Path:
  """The folder of the results of one seed."""
  return workdir / "results" / f"{key}_{name}_{seed}.json"


def probe(key: str, name: str, seed: int, workdir: pathlib.Path) -> dict:
  """The results of one seed, from the workdir where they are there."""
  file = result_file(key, name, seed, workdir)
  if not file.exists():
    train, test = embed(DATA[key], name, seed, workdir)
    kept, held = splits.split(train.labels, seed=seed)
    parts = (suite.Examples(*(array[rows] for array in train)) for rows in (kept, held))
    started = time.perf_counter()
    found = suite.run(*parts, test, metric=DATA[key].metric, seed=seed)
    print(f"{key}, {name}, seed {seed}: probes in {time.perf_counter() - started:.0f} s", flush=True)
    atomic.write_json(file, found.to_dict(), indent=1)
  return json.loads(file.read_text())


def table(key: str, found: dict[str, list[dict]]) -> list[str]:
  """Rows of one data set: means over seeds, and the standard deviation where they differ."""
  data, counts = DATA[key], next(iter(found.values()))[0]["examples"]
  metric = {"top1": "top-1", "mean_per_class": "mean accuracy of classes"}[data.metric]
  shots = sorted({int(shot) for results in found.values() for shot in results[0]["few_shot"]})
  heads = [f"linear, {metric}", "weight decays", "20-NN", *(f"5-way {shot}-shot" for shot in shots)]
  heads += ["ECE", "ECE, temperature of validation data", "ECE, temperature of test folds"]
  lines = [
    "",
    f"## {data.title}",
    "",
    f"{counts['train'] + counts['validation']:,} training images, a fifth of them held out for validation, "
    f"and {counts['test']:,} test images, resized to {data.size} px.",
    "",
    f"| backbone | {' | '.join(heads)} |",
    "|---" * (len(heads) + 1) + "|",
  ]
  for name, results in found.items():
    decays = ", ".join(
      f"{each['linear']['weight_decay']:.2g}{'*' * each['linear']['at_edge_of_grid']}" for each in results
    )
    cells = [_mean([each["linear"]["test"] for each in results]), decays]
    cells.append(_mean([each["knn"]["20"] for each in results]))
    for shot in shots:
      episodes = [each["few_shot"][str(shot)] for each in results]
      cells.append(_mean([each["mean"] for each in episodes]))
    cells.append(_mean([each["calibration"]["ece"] for each in results], 3))
    cells.append(_mean([each["calibration"]["scaled_ece"] for each in results], 3))
    cells.append(_mean([each["calibration_on_test_folds"]["scaled_ece"] for each in results], 3))
    lines.append(f"| {available.BACKBONES[name][2]} | {' | '.join(cells)} |")
  return lines


def _mean(values: list[float], digits: int = 3) -> str:
  spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
  return f"{np.mean(values):.{digits}f}{spread}"


def _main(argv: list[str]) -> None:
  del argv
  workdir = pathlib.Path(_WORKDIR.value)
  seeds = [int(seed) for seed in _SEEDS.value]
  lines = [
    "# Probes of frozen backbones",
    "",
    "`PYTHONPATH=. python experiments/transfer.py --data=FOLDER --workdir=/tmp/transfer "
    "--out=experiments/results/transfer.md`",
    "",
    f"{tables.versions()}, CPU. Mean and standard deviation over seeds {', '.join(map(str, seeds))}, which",
    "decide the images that are held out, the episodes and the random weights. Weight decays are those that",
    "were selected, one per seed; a star marks an end of the grid. Few-shot episodes draw from all images",
    "together. SwinV2-nano was pretrained on CIFAR-10's training images with their labels, so that its row",
    "there shows no transfer. Images are smaller than those that the ImageNet backbones were trained on.",
  ]
  absent = []
  for key in _SETS.value:
    found = {}
    for name in _BACKBONES.value:
      if _COLLECT.value and not all(result_file(key, name, seed, workdir).exists() for seed in seeds):
        absent.append(f"{available.BACKBONES[name][2]} on {DATA[key].title}")
      else:
        found[name] = [probe(key, name, seed, workdir) for seed in seeds]
    if found:
      lines += table(key, found)
  if absent:
    lines += ["", f"Not run yet: {'; '.join(absent)}."]
  tables.publish("\n".join(lines) + "\n", _OUT.value)


if __name__ == "__main__":
  app.run(_main)
