"""Time of a grid of logistic regressions against scikit-learn's, and their agreement, in one run.

  PYTHONPATH=. python experiments/benchmarks/logistic.py --data=FOLDER/caltech101 \
    --reference=PYTHON_WITH_SCIKIT_LEARN --out=experiments/results/logistic.md

Features are the embeddings of a frozen EfficientNet-Lite0; a fifth of the training images is held out by
seed 0. The grid has the paper's 45 weight decays. In rounds, one after the other:

* ours, float32, with its compilation in the first round and the search for the principal axes in each;
* scikit-learn to convergence, float64: tolerance 1e-14, at most 2,000 iterations, from the largest weight
  decay to the smallest, each from the solution before;
* scikit-learn with its defaults, in the order of the paper's code: at most 100 iterations, tolerance 1e-4,
  from the smallest weight decay to the largest.

Accuracies stand beside each other. scikit-learn runs in the Python that --reference names
(`logistic_scikit_learn.py`) and is no dependency of the package.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

from absl import app, flags
import numpy as np

from experiments import tables
from frozen_vision.config import BackboneOptions, Config
from frozen_vision.data.classification import augment, folders, splits
from frozen_vision.freezing import embeddings, prepare
from frozen_vision.metrics import accuracy
from frozen_vision.probes import basis, linear, logistic

_DATA = flags.DEFINE_string("data", None, "Folder with train and test.", required=True)
_BACKBONE = flags.DEFINE_string("backbone", "efficientnet_lite0", "Name of the backbone and of its weights.")
_SIZE = flags.DEFINE_integer("image_size", 224, "Side of the images in pixels.")
_REFERENCE = flags.DEFINE_string("reference", sys.executable, "A Python that has scikit-learn.")
_ROUNDS = flags.DEFINE_integer("rounds", 1, "Rounds over the solvers.")
_OUT = flags.DEFINE_string("out", None, "Markdown file to write; printed only, if absent.")

_SCIKIT_LEARN = pathlib.Path(__file__).with_name("logistic_scikit_learn.py")


def features() -> dict[str, np.ndarray]:
  """Features and labels of the parts, by their names in the file."""
  config = Config(backbone=BackboneOptions(name=_BACKBONE.value, weights=_BACKBONE.value))
  frozen = prepare.Backbones().of(config)
  parts = []
  for part in ("train", "test"):
    source = folders.open_source(pathlib.Path(_DATA.value) / part)
    parts.append(embeddings.embed(frozen, source, augment.EvalTransform(_SIZE.value), num_threads=2))
  train, test = parts
  kept, held = splits.split(train.labels, seed=0)
  return {
    "features": train.features[kept],
    "labels": train.labels[kept],
    "held_features": train.features[held],
    "held_labels": train.labels[held],
    "test_features": test.features,
    "test_labels": test.labels,
    "decays": np.array(linear.GRID),
  }


def ours(data: dict[str, np.ndarray]) -> dict:
  """Seconds, and for every weight decay (its index, accuracy on validation and test data, iterations)."""
  started = time.perf_counter()
  axes = basis.principal(data["features"])
  coordinates = [axes.coordinates(data[name]) for name in ("features", "held_features", "test_features")]
  truth = data["labels"][:, None] == np.arange(data["labels"].max() + 1)
  rows = []
  for fit in logistic.path(coordinates[0], truth, data["decays"]):
    scores = [
      accuracy.top1(basis.scores(part, fit.weights), data[f"{name}_labels"])
      for part, name in zip(coordinates[1:], ("held", "test"))
    ]
    rows.append([len(data["decays"]) - 1 - len(rows), *scores, fit.iterations])
  return {"seconds": time.perf_counter() - started, "rows": sorted(rows)}


def reference(data: dict[str, np.ndarray], kind: str) -> dict:
  """What scikit-learn's process printed."""
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "data.npz"
    np.savez(file, **data)
    command = [_REFERENCE.value, _SCIKIT_LEARN, file, kind]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _main(argv: list[str]) -> None:
  del argv
  data = features()
  solvers = {
    "ours": ours,
    "scikit-learn, converged": lambda data: reference(data, "converged"),
    "scikit-learn, defaults": lambda data: reference(data, "defaults"),
  }
  found = {name: [] for name in solvers}
  for _ in range(_ROUNDS.value):
    for name, solve in solvers.items():
      found[name].append(solve(data))
      print(f"{name}: {found[name][-1]['seconds']:.1f} s", flush=True)
  version = found["scikit-learn, defaults"][0]["version"]
  lines = [
    "# The grid of logistic regressions",
    "",
    f"{len(data['features']):,} training, {len(data['held_features']):,} validation and "
    f"{len(data['test_features']):,} test images of {data['labels'].max() + 1} classes;",
    f"{_BACKBONE.value} at {_SIZE.value} px, {data['features'].shape[1]:,} dimensions; "
    f"{tables.versions()}, scikit-learn {version}.",
    "",
    "| solver | seconds for 45 weight decays, each round | iterations |",
    "|---|---|---|",
  ]
  for name, rounds in found.items():
    seconds = ", ".join(f"{each['seconds']:.1f}" for each in rounds)
    lines.append(f"| {name} | {seconds} | {sum(row[3] for row in rounds[0]['rows']):,} |")
  lines += _agreement({name: rounds[0]["rows"] for name, rounds in found.items()}, data["decays"])
  tables.publish("\n".join(lines) + "\n", _OUT.value)


def _agreement(rows: dict[str, list[list[float]]], decays: np.ndarray) -> list[str]:
  """Accuracies of the solvers beside each other."""
  lines = [
    "",
    "Accuracy in percent on validation and test data:",
    "",
    f"| weight decay | {' | '.join(rows)} |",
    "|---" * (len(rows) + 1) + "|",
  ]
  for index, decay in enumerate(decays):
    cells = [f"{100 * each[index][1]:.2f}, {100 * each[index][2]:.2f}" for each in rows.values()]
    lines.append(f"| {decay:.3g} | {' | '.join(cells)} |")
  own, converged = np.array(rows["ours"]), np.array(rows["scikit-learn, converged"])
  worst = 100 * np.abs(own - converged)[:, 1:3].max()
  best = [int(np.argmax(each[:, 1])) for each in (own, converged)]
  return [
    *lines,
    "",
    f"Largest difference to the converged one: {worst:.2f} points. Selected on validation data: "
    f"{decays[best[0]]:.3g} by ours,",
    f"{decays[best[1]]:.3g} by scikit-learn; test accuracy there {100 * own[best[0], 2]:.2f} and "
    f"{100 * converged[best[1], 2]:.2f}.",
  ]


if __name__ == "__main__":
  app.run(_main)
