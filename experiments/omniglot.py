"""Omniglot's 20 one-shot runs by the nearest embedding of a frozen backbone; writes a table.

  PYTHONPATH=. python experiments/omniglot.py --runs=FOLDER/omniglot_small/all_runs.zip \
    --out=experiments/results/omniglot.md

A run has 20 characters of an alphabet, one drawing of each by one person, and 20 drawings of them by another,
each of which gets the character of the nearest drawing, by cosine similarity. The error is the fraction of
drawings that get a wrong one; guessing has 0.95. Nothing is fitted. Data and protocol: Lake et al.,
"Human-level concept learning through probabilistic program induction", Science 2015.
"""

import zipfile

from absl import app, flags
import numpy as np

from experiments import available, tables
from frozen_vision.data.classification import augment
from frozen_vision.freezing import embeddings
from frozen_vision.probes import knn

_RUNS = 20
_FILE = flags.DEFINE_string("runs", None, "The archive all_runs.zip.", required=True)
_SIZE = flags.DEFINE_integer("image_size", 96, "Side that drawings of 105 px are resized to.")
_BACKBONES = flags.DEFINE_list(
  "backbones", list(available.BACKBONES), f"Backbones, of {', '.join(available.BACKBONES)}."
)
_CACHE = flags.DEFINE_string("cache", None, "Folder to keep embeddings in; nowhere, if absent.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of random weights.")
_OUT = flags.DEFINE_string("out", None, "Markdown file to write; printed only, if absent.")


class Drawings:
  """The images of the archive that are named, as records."""

  def __init__(self, archive: zipfile.ZipFile, names: list[str]):
    self._images = [archive.read(name) for name in names]
    self.names = names

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, index: int) -> dict:
    return {"image": self._images[index], "label": np.int32(0), "name": self.names[index]}


def read_runs(archive: zipfile.ZipFile) -> list[list[tuple[str, str]]]:
  """(drawing to name, drawing of the right character) of every run."""
  found = []
  for run in range(1, _RUNS + 1):
    [listing] = [name for name in archive.namelist() if name.endswith(f"run{run:02d}/class_labels.txt")]
    root = listing[: -len(f"run{run:02d}/class_labels.txt")]
    lines = archive.read(listing).decode().splitlines()
    found.append([tuple(root + name for name in line.split()) for line in lines if line.strip()])
  return found


def errors(features: dict[str, np.ndarray], runs: list[list[tuple[str, str]]]) -> list[float]:
  """Error of every run."""
  found = []
  for pairs in runs:
    known = sorted({right for _, right in pairs})
    train = np.stack([features[name] for name in known])
    queries = np.stack([features[name] for name, _ in pairs])
    answers = np.array([known.index(right) for _, right in pairs])
    found.append(1 - knn.top1(queries, answers, train, np.arange(len(known)), ks=(1,))[1])
  return found


def _main(argv: list[str]) -> None:
  del argv
  with zipfile.ZipFile(_FILE.value) as archive:
    runs = read_runs(archive)
    drawings = Drawings(archive, sorted({name for pairs in runs for pair in pairs for name in pair}))
  lines = [
    "# Omniglot's one-shot runs",
    "",
    "`PYTHONPATH=. python experiments/omniglot.py --runs=FOLDER/omniglot_small/all_runs.zip "
    "--out=experiments/results/omniglot.md`",
    "",
    f"Nearest of 20 drawings by cosine similarity, {len(runs)} runs of 20 drawings, resized to",
    f"{_SIZE.value} px; guessing has an error of 0.95. {tables.versions()}, CPU.",
    "",
    "| backbone | error | 95% interval of the mean over runs | smallest and largest of a run |",
    "|---|---|---|---|",
  ]
  for name in _BACKBONES.value:
    for seed in map(int, _SEEDS.value if name == "random" else ["0"]):
      backbone, view = available.frozen(name, seed), augment.EvalTransform(_SIZE.value)
      vectors = embeddings.embed(backbone, drawings, view, path=_CACHE.value, num_threads=2).features
      found = errors(dict(zip(drawings.names, vectors)), runs)
      half = 1.96 * np.std(found) / len(found) ** 0.5
      title = available.BACKBONES[name][2] + (f", seed {seed}" if name == "random" else "")
      lines.append(
        f"| {title} | {np.mean(found):.3f} | {np.mean(found) - half:.3f} to {np.mean(found) + half:.3f} | "
        f"{min(found):.2f}, {max(found):.2f} |"
      )
      print(lines[-1], flush=True)
  tables.publish("\n".join(lines) + "\n", _OUT.value)


if __name__ == "__main__":
  app.run(_main)
