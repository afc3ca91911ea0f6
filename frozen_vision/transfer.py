"""Probes frozen backbones on many data sets: the benchmark of arXiv 2011.13377, and CD-FSL's.

  python -m frozen_vision.transfer --backbones=swinv2_nano,efficientnet_lite0 --data=FOLDER \
    --sets=caltech101,pets,eurosat --workdir=DIR

Backbones are given as to `--mode=report`. FOLDER holds the sets under the names that their authors or TFDS
give them; `NAME=PATH` says where one is, or brings one of your own: `train` and `test` (and perhaps `val`)
with a folder for each class, or folders of classes alone for few-shot episodes. Without --sets, all that are
in FOLDER are taken.

Writes DIR/transfer.md and .json. Embeddings and the results of every backbone, set and seed are kept in DIR,
so that an interrupted run, or one with more of them, goes on where it was.
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import functools
import json
import logging
import os
import pathlib
import re
import sys
from typing import Any

import jax
import numpy as np

from frozen_vision import config as config_lib
from frozen_vision import output
from frozen_vision.data import findings, fingerprint, text_files
from frozen_vision.data.classification import augment, benchmarks, folders, layouts, splits
from frozen_vision.files import atomic
from frozen_vision.freezing import embeddings, prepare
from frozen_vision.probes import few_shot, suite
from frozen_vision.report import entries

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Settings:
  """What decides the numbers, beside backbones and data.

  Attributes:
    image_size: side of the central squares in pixels.
    held_out: fraction of the training data, drawn by the seed, that weight decays are selected on where the
      authors of a set name no validation data.
    shots, episodes: of few-shot classification.
    neighbours: of the nearest-neighbour classifier.
    dtype: that embeddings are rounded to.
  """

  image_size: int = 224
  held_out: float = 0.2
  shots: tuple[int, ...] = few_shot.SHOTS
  episodes: int = few_shot.EPISODES
  neighbours: tuple[int, ...] = (20,)
  dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class DataSet:
  """One set: its title, how linear classifiers are scored, and its sources by part."""

  title: str
  metric: benchmarks.Metric
  parts: layouts.Parts

  @functools.cached_property
  def fingerprints(self) -> dict[str, str]:
    """By part, of what its source holds."""
    return {part: fingerprint.of_source(source) for part, source in self.parts.items()}


def open_sets(names: Sequence[str], data: str | os.PathLike[str] | None) -> dict[str, DataSet]:
  """Opens sets by `NAME` or `NAME=PATH`; without names, those of `benchmarks.BENCHMARKS` that are in `data`.

  Raises:
    FileNotFoundError, ValueError: a set that is not there, is damaged, is too small, or is named twice.
  """
  if not names:
    if data is None:
      raise ValueError("There is no set to look for; give --data=FOLDER, --sets=NAME=PATH, or both.")
    found = {}
    for name in benchmarks.BENCHMARKS:
      try:
        found[name] = _open_set(name, data, is_shared=True)
      except FileNotFoundError as error:
        _logger.info("Left out: %s", error)
    if not found:
      raise FileNotFoundError(
        f"{data} holds none of the sets {', '.join(benchmarks.BENCHMARKS)}. If it is a set of your own, give "
        f"--sets=mine={data}."
      )
    return found
  found = {}
  for text in names:
    name, _, path = text.partition("=")
    if not re.fullmatch(r"\w[\w.+-]*", name):
      raise ValueError(
        f"--sets has the name {name!r}, which a folder of results cannot have; expected letters and digits, "
        "such as mine=PATH."
      )
    if name in found:
      raise ValueError(f"--sets names {name!r} twice; give one of them another name: other=PATH.")
    if not path and data is None:
      raise ValueError(f"--sets names {name!r} without a folder; give --data=FOLDER or {name}=PATH.")
    found[name] = _open_set(name, os.path.expanduser(path) or data, is_shared=not path)
  return found


def _open_set(name: str, path: str | os.PathLike[str], *, is_shared: bool) -> DataSet:
  if name in benchmarks.BENCHMARKS:
    row = benchmarks.BENCHMARKS[name]
    parts = benchmarks.open_benchmark(name, path, is_shared=is_shared)
    found = DataSet(row.title, row.metric, parts)
  else:
    found = DataSet(name, "top1", _own_parts(name, pathlib.Path(path)))
  for part, source in found.parts.items():
    source.check()
    for line in source.findings.lines():
      _logger.info("%s, %s: %s.", found.title, part, line)
    if refused := source.findings.too_many_dropped():
      raise findings.DroppedError(f"{found.title}, {part}: {' '.join(refused)} Get these files again.")
  classes = len(np.unique(found.parts["all"].labels)) if "all" in found.parts else few_shot.WAYS
  if classes < few_shot.WAYS:
    raise ValueError(
      f"{found.title} has images of {classes} classes and no train and test folders, so that it serves "
      f"few-shot episodes alone, which take {few_shot.WAYS}; expected more classes, or NAME=FOLDER with "
      "train and test in it."
    )
  return found


def _own_parts(name: str, root: pathlib.Path) -> layouts.Parts:
  if not root.exists() or (not root.is_dir() and not root.name.endswith(folders.TAR_SUFFIXES)):
    raise ValueError(
      f"{name!r} is no known set, and {root} is no folder of images; known are "
      f"{', '.join(benchmarks.BENCHMARKS)}. Give a set of your own as NAME=FOLDER."
    )
  if layouts.find_folder(root, "train") and layouts.find_folder(root, "test"):
    return layouts.class_folders(root)
  return {"all": folders.open_source(root)}


class Bench:
  """Runs sets on backbones, and keeps what was computed in a workdir."""

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    settings: Settings = Settings(),
    *,
    batch_size: int = 64,
    threads: int = 1,
  ):
    self._folder, self._settings = pathlib.Path(workdir), settings
    self._batch_size, self._threads = batch_size, threads
    self._backbones = prepare.Backbones()

  def results(self, entry: entries.Entry, name: str, data: DataSet, seed: int) -> dict[str, Any]:
    """`suite.Results.to_dict` of one backbone, set and seed; from the workdir where it is there."""
    frozen = self._backbones.of(config_lib.Config(backbone=entry.options, seed=seed))
    identity = {
      "backbone": frozen.key,
      "data": data.fingerprints,
      "metric": data.metric,
      "settings": dataclasses.asdict(self._settings),
      "seed": seed,
    }
    identity = json.loads(json.dumps(identity))
    path = self._folder / "results" / name / f"{entry.label}_{seed}.json"
    if path.is_file():
      kept = text_files.read_json(path)
      if isinstance(kept, dict) and kept.get("identity") == identity:
        return kept["results"]
    parts = {
      part: self._embed(frozen, source, f"{data.title}, {part}") for part, source in data.parts.items()
    }
    try:
      found = self._probe(parts, data.metric, seed).to_dict()
    except ValueError as error:
      raise ValueError(f"{data.title}: {error}") from error
    atomic.write_json(path, {"identity": identity, "results": found}, indent=1)
    return found

  def _embed(self, frozen: prepare.FrozenBackbone, source: Any, what: str) -> suite.Examples:
    _logger.info("Embeddings of %s: %s images.", what, f"{len(source):,}")
    return suite.Examples(
      *embeddings.embed(
        frozen,
        source,
        augment.EvalTransform(self._settings.image_size),
        batch_size=self._batch_size,
        path=self._folder / "features",
        dtype=self._settings.dtype,
        num_threads=self._threads,
      )
    )

  def _probe(self, parts: dict[str, suite.Examples], metric: benchmarks.Metric, seed: int) -> suite.Results:
    episodic = dict(shots=self._settings.shots, episodes=self._settings.episodes, seed=seed)
    if "all" in parts:
      return suite.run_few_shot(parts["all"], **episodic)
    if "validation" not in parts:
      train = parts["train"]
      kept, held = splits.split(train.labels, fraction=self._settings.held_out, seed=seed)
      parts |= {"train": take(train, kept), "validation": take(train, held)}
    return suite.run(
      parts["train"],
      parts["validation"],
      parts["test"],
      metric=metric,
      ks=self._settings.neighbours,
      **episodic,
    )


def take(examples: suite.Examples, rows: np.ndarray) -> suite.Examples:
  """Some examples."""
  return suite.Examples(examples.features[rows], examples.labels[rows])


def run(
  backbones: Sequence[entries.Entry],
  sets: Mapping[str, DataSet],
  workdir: str | os.PathLike[str],
  *,
  settings: Settings = Settings(),
  seeds: Sequence[int] = (0,),
  batch_size: int = 64,
  threads: int = 1,
) -> dict[str, Any]:
  """Runs every backbone on every set with every seed, and writes `transfer.json` and `transfer.md`.

  Args:
    backbones: of `report.entries.read`.
    sets: of `open_sets`, by name.
    seeds: of which training images are held out, of episodes, and of random weights.
    batch_size, threads: of the passes over images.

  Returns:
    What `transfer.json` holds: `results`, by set and backbone a list over seeds, and what led to them.
  """
  if jax.process_count() > 1:
    raise ValueError("The transfer benchmark runs in one process; start it without --distributed.")
  if not seeds or len(set(seeds)) < len(seeds):
    raise ValueError(f"--seeds is {' '.join(map(str, seeds))}; expected one or more different numbers.")
  bench = Bench(workdir, settings, batch_size=batch_size, threads=threads)
  results: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in sets}
  for name, data in sets.items():
    for entry in backbones:
      results[name][entry.label] = [bench.results(entry, name, data, seed) for seed in seeds]
  found = {
    "backbones": {entry.label: {"source": entry.source, "weights": entry.weights} for entry in backbones},
    "sets": {
      name: {
        "title": data.title,
        "metric": data.metric,
        "classes": len(next(iter(data.parts.values())).classes),
      }
      for name, data in sets.items()
    },
    "settings": dataclasses.asdict(settings),
    "seeds": list(seeds),
    "results": results,
  }
  folder = pathlib.Path(workdir)
  atomic.write_json(folder / "transfer.json", found, indent=1)
  atomic.write_text(folder / "transfer.md", to_markdown(found))
  return found


def to_markdown(found: Mapping[str, Any]) -> str:
  """The tables of what `run` found, scores in percent."""
  settings, seeds = found["settings"], found["seeds"]
  spread = f"± the standard deviation over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else ""
  lines = [
    "# Transfer of frozen backbones",
    "",
    f"Central squares of {settings['image_size']} px. Scores in percent{f', {spread}' if spread else ''}. "
    "Weight decays are selected on validation data, and classifiers fitted again on training and validation "
    "data and tested once.",
  ]
  metrics = {name: suite.METRICS[entry["metric"]] for name, entry in found["sets"].items()}
  lines += _table(
    found,
    "Linear classifier",
    "A star marks a weight decay at the end of the grid with some seed.",
    lambda result: result["linear"]["test"] if "linear" in result else None,
    heads={name: f"{found['sets'][name]['title']}, {metric}" for name, metric in metrics.items()},
    mark=lambda result: "*" * result["linear"]["at_edge_of_grid"],
  )
  for k in settings["neighbours"]:
    lines += _table(
      found, f"{k} nearest neighbours, top-1", "", lambda result, k=k: result["knn"].get(str(k))
    )
  for shots in settings["shots"]:
    lines += _table(
      found,
      f"{few_shot.WAYS}-way {shots}-shot",
      f"{settings['episodes']} episodes, nearest class mean"
      + (", ± the 95% interval of the mean." if len(seeds) == 1 else ".")
      + " In brackets how many classes have enough images, where not all do.",
      lambda result, shots=shots: result["few_shot"].get(str(shots), {}).get("mean"),
      width=lambda result, shots=shots: result["few_shot"][str(shots)]["half_width_95"],
      classes=lambda result, shots=shots: result["few_shot"][str(shots)]["classes"],
    )
  lines += _table(
    found,
    "Calibration error of the linear classifier",
    "ECE in 15 bins, with a temperature fitted on validation data.",
    lambda result: result["calibration"]["scaled_ece"] if "calibration" in result else None,
  )
  return "\n".join([*lines, ""])


def _table(found, title, note, score, *, heads=None, mark=None, width=None, classes=None) -> list[str]:
  """A section with backbones below and sets beside each other; none where no set has the score."""
  results = found["results"]
  names = [
    name for name, rows in results.items() if any(score(each[0]) is not None for each in rows.values())
  ]
  if not names:
    return []
  heads = [heads[name] if heads else found["sets"][name]["title"] for name in names]
  lines = ["", f"## {title}", "", *([note, ""] if note else [])]
  lines += [f"| backbone | {' | '.join(heads)} | mean |", "|---" * (len(heads) + 2) + "|"]
  for label in found["backbones"]:
    cells, means = [], []
    for name in names:
      of_seeds = results[name][label]
      scores = [100 * score(each) for each in of_seeds]
      means.append(float(np.mean(scores)))
      text = f"{means[-1]:.2f}"
      if len(scores) > 1:
        text += f" ± {np.std(scores, ddof=1):.2f}"
      elif width:
        text += f" ± {100 * width(of_seeds[0]):.2f}"
      if classes and classes(of_seeds[0]) < found["sets"][name]["classes"]:
        text += f" ({classes(of_seeds[0])})"
      cells.append(text + (max(map(mark, of_seeds)) if mark else ""))
    lines.append(f"| {label} | {' | '.join(cells)} | {np.mean(means):.2f} |")
  return lines


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  options = _parser().parse_args(arguments)
  try:
    settings = Settings(
      image_size=options.image_size,
      shots=tuple(options.shots),
      episodes=options.episodes,
      neighbours=tuple(options.neighbours),
      dtype=options.dtype,
    )
    sets = open_sets([name for name in options.sets.split(",") if name], options.data)
    backbones = entries.read(options.backbones.split(","))
    run(
      backbones,
      sets,
      options.workdir,
      settings=settings,
      seeds=options.seeds,
      batch_size=options.batch_size,
      threads=options.threads,
    )
  except (OSError, ValueError) as error:
    print(f"Error: {error}", file=sys.stderr)
    return 1
  print((pathlib.Path(options.workdir) / "transfer.md").read_text(encoding="utf-8"))
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m frozen_vision.transfer",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )

  def positive(text: str) -> int:
    if not text.isdigit() or not int(text):
      raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)

  def natural(text: str) -> int:
    if not text.isdigit():
      raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0")
    return int(text)

  defaults = Settings()
  parser.add_argument("--backbones", required=True, help="comma-separated, as to --mode=report")
  parser.add_argument("--workdir", required=True, help="the folder of embeddings and results")
  parser.add_argument("--data", help="the folder that holds the sets")
  parser.add_argument(
    "--sets", default="", help=f"comma-separated, of {', '.join(benchmarks.BENCHMARKS)}, or NAME=PATH"
  )
  parser.add_argument("--seeds", type=natural, nargs="+", default=[0], help="such as --seeds 0 1 2")
  parser.add_argument("--image-size", type=positive, default=defaults.image_size, help="side in pixels")
  parser.add_argument("--shots", type=positive, nargs="+", default=defaults.shots, help="images of a class")
  parser.add_argument(
    "--episodes", type=positive, default=defaults.episodes, help="of few-shot classification"
  )
  parser.add_argument("--neighbours", type=positive, nargs="+", default=defaults.neighbours)
  parser.add_argument(
    "--dtype", choices=("float32", "bfloat16"), default=defaults.dtype, help="of embeddings on disk"
  )
  parser.add_argument("--batch-size", type=positive, default=64, help="images of a pass")
  parser.add_argument("--threads", type=positive, default=2, help="that decode images")
  return parser


if __name__ == "__main__":
  output.log_progress(_logger)
  sys.exit(main())
