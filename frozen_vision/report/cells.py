"""The cells of a report: one run of one recipe on one backbone with one seed, each in a folder of its own.

    WORKDIR/cells/BUDGET/BACKBONE/RECIPE/seed_N/
      config.json, metrics.jsonl, checkpoints/ ...   of a run, as any run leaves them
      cell_examples.npz                              scores of single examples
      cell.json                                      what the page is made from; written last
      error.json                                     why the last try failed, if it did
      log.txt                                        what it printed

A cell with a `cell.json` is finished, and is never run again. It remembers everything that its numbers depend
on: the config, the weights, the data, the versions. A report that asks for anything else names the cell as
stale and leaves it out.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import importlib.metadata
import json
import pathlib
from typing import Any, Literal
import zipfile

import numpy as np

from frozen_vision.config import Config
from frozen_vision.data import content
from frozen_vision.files import atomic
from frozen_vision.report import entries, recipes
from frozen_vision.runs import workdir as workdir_lib

CARD = "card"
_EXAMPLES = "cell_examples.npz"
# Options that change no number.
_FREE = (
  "headline",
  "log_every",
  "checkpoint_every",
  "keep_checkpoints",
  "pictures",
  "tensorboard",
)
_FREE_SECTIONS = ("loader", "mesh")
# Of other sections; the backbone's name and weights are compared by themselves.
_FREE_OF_SECTION = {
  "backbone": ("name", "weights"),
  "cache": ("path",),
  "data": ("allow_changes", "allow_drops"),
}

State = Literal["finished", "stale", "failed", "missing"]
STATES: tuple[State, ...] = ("finished", "stale", "failed", "missing")


@dataclasses.dataclass(frozen=True)
class Plan:
  """A report as it was asked for.

  Attributes:
    backbones: in the order of the page.
    rows: {recipe: names of its rows}.
    seeds: of every recipe.
    changes: options that the user sets, {recipe: {dotted path: value}}.
    known: the recipes by name; those of reports, or of a study that has others.
    with_cards: make a card of every backbone.
    runner: the command that runs one cell, without `--cell=NAME`; empty: `main --mode=report`.
    title, about: of the page, where it is no report card.
  """

  workdir: pathlib.Path
  backbones: tuple[entries.Entry, ...]
  rows: Mapping[str, tuple[str, ...]]
  seeds: tuple[int, ...]
  budget: recipes.Budget
  data: recipes.Data = recipes.Data()
  changes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  known: Mapping[str, recipes.Recipe] = dataclasses.field(default_factory=lambda: recipes.RECIPES)
  with_cards: bool = True
  runner: tuple[str, ...] = ()
  title: str = "Report card"
  about: str = ""

  def cells(self) -> Iterator["Cell"]:
    """All cells; every backbone's card first, then seed by seed, so that an early end leaves whole seeds."""
    for entry in self.backbones if self.with_cards else ():
      yield Cell(entry, CARD, 0)
    for seed in self.seeds:
      for recipe in self.rows:
        for entry in self.backbones:
          yield Cell(entry, recipe, seed)

  def cell(self, name: str) -> "Cell":
    """The cell that is called `name`; raises a ValueError that lists the names."""
    for cell in self.cells():
      if cell.name == name:
        return cell
    raise ValueError(f"--cell is {name!r}; this report has {', '.join(cell.name for cell in self.cells())}.")

  def folder(self, cell: "Cell") -> pathlib.Path:
    """The folder of a cell's run."""
    return self.workdir / "cells" / self.budget / cell.entry.label / cell.recipe / f"seed_{cell.seed}"

  def config(self, cell: "Cell") -> Config:
    """The config of a cell's run; raises as `recipes.make_config` does."""
    recipe, own = self.known[cell.recipe], cell.entry.configs.get(cell.recipe)
    if own:
      recipe = dataclasses.replace(recipe, config=own, files_config=own, paper_config=own)
    return recipes.make_config(
      recipe,
      cell.entry,
      cell.seed,
      budget=self.budget,
      data=self.data,
      cache=str(self.workdir / "features"),
      changes={**cell.entry.changes.get(cell.recipe, {}), **self.changes.get(cell.recipe, {})},
    )

  def fingerprint(self, cell: "Cell") -> dict[str, Any]:
    """What a cell's numbers depend on, as JSON."""
    found: dict[str, Any] = {
      "weights": cell.entry.weights,
      "variant": cell.entry.options.name,
      "sizes": workdir_lib.to_json(dict(cell.entry.options.overrides), "sizes"),
      "version": {
        "frozen_vision": workdir_lib.library_version(),
        "jax": importlib.metadata.version("jax"),
      },
    }
    if cell.recipe == CARD:
      return found
    config = self.config(cell).to_dict()
    options = {key: value for key, value in config.items() if key not in (*_FREE, *_FREE_SECTIONS)}
    for section, free in _FREE_OF_SECTION.items():
      options[section] = {key: value for key, value in options[section].items() if key not in free}
    kind = self.known[cell.recipe].data
    return {
      **found,
      "config": workdir_lib.to_json(options, "config"),
      "data": self._stamps.get(kind, []),
    }

  @functools.cached_property
  def _stamps(self) -> dict[str, list[Any]]:
    """What tells the user's data from others, looked up once: a folder may hold a million files."""
    paths = dataclasses.asdict(self.data)
    return {name: [_stamp(path) for path in own] for name, own in paths.items() if own}


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run of a report."""

  entry: entries.Entry
  recipe: str
  seed: int

  @property
  def name(self) -> str:
    return f"{self.entry.label}/{self.recipe}/{self.seed}"


@dataclasses.dataclass(frozen=True)
class Found:
  """What lies in a cell's folder.

  Attributes:
    reason: why it is stale, failed or missing, in a sentence's words.
    result: what `cell.json` holds; None unless it is finished.
  """

  cell: Cell
  state: State
  reason: str = ""
  result: Mapping[str, Any] | None = None


def look(plan: Plan, cell: Cell) -> Found:
  """Reads a cell's folder; changes nothing."""
  folder = plan.folder(cell)
  try:
    result = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
    found = result["fingerprint"]
  except FileNotFoundError:
    return _unfinished(folder, cell)
  except (ValueError, KeyError, TypeError) as error:
    return Found(
      cell, "failed", f"{folder / 'cell.json'} cannot be read ({error}); the same command runs the cell again"
    )
  try:
    wanted = plan.fingerprint(cell)
  except (ValueError, OSError) as error:
    return Found(cell, "failed", str(error))
  differing = workdir_lib.changes(found, wanted)
  if differing:
    parts = [f"{key} was {was} and is {now}" for key, (was, now) in list(differing.items())[:4]]
    more = f", and {len(differing) - 4} more" if len(differing) > 4 else ""
    return Found(
      cell, "stale", f"it was run otherwise: {'; '.join(parts)}{more}; delete {folder} to run it again"
    )
  if result.get("data") and _read_examples(folder) is None:
    return Found(cell, "failed", f"{folder / _EXAMPLES} cannot be read; the same command runs the cell again")
  return Found(cell, "finished", result=result)


def _unfinished(folder: pathlib.Path, cell: Cell) -> Found:
  try:
    error = json.loads((folder / "error.json").read_text(encoding="utf-8"))["error"]
  except (OSError, ValueError, KeyError, TypeError):
    begun = (folder / "config.json").exists()
    return Found(cell, "missing", "it has begun and is not finished" if begun else "it has not been run")
  return Found(cell, "failed", str(error).rstrip("."))


def finish(
  plan: Plan,
  cell: Cell,
  *,
  fingerprint: Mapping[str, Any],
  scores: Mapping[str, float],
  examples: Mapping[str, np.ndarray],
  data: Mapping[str, str],
  details: Mapping[str, Any],
) -> None:
  """Writes a cell's files; with the last of them it is finished.

  Args:
    fingerprint: of the plan, from before the run.
    scores: by row.
    examples: scores of single examples by row.
    data: what identifies the test examples, by row.
    details: what else the page shows.
  """
  folder = plan.folder(cell)
  with atomic.open_aside(folder / _EXAMPLES) as file:
    np.savez(file, **examples)
  result = {
    "cell": cell.name,
    "fingerprint": fingerprint,
    "scores": dict(scores),
    "data": dict(data),
    "details": dict(details),
  }
  atomic.write_json(folder / "cell.json", workdir_lib.to_json(result, "cell"), indent=1, allow_nan=True)
  (folder / "error.json").unlink(missing_ok=True)


def read_examples(plan: Plan, cell: Cell) -> dict[str, np.ndarray]:
  """Scores of single examples of a finished cell, by row; empty where there are none."""
  return _read_examples(plan.folder(cell)) or {}


def _read_examples(folder: pathlib.Path) -> dict[str, np.ndarray] | None:
  """The arrays of a cell's file of examples; None where it is gone or damaged."""
  try:
    with open(folder / _EXAMPLES, "rb") as file, np.load(file) as arrays:
      return {name: arrays[name] for name in arrays.files}
  except (OSError, ValueError, EOFError, zipfile.BadZipFile):
    return None


def _stamp(path: str) -> list[Any]:
  """What tells data in files from other data: names and sizes of all files, without reading one."""
  root = pathlib.Path(path).expanduser()
  files = sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]
  try:
    sizes = [file.stat().st_size for file in files]
  except OSError:
    return ["absent"]
  names = [file.relative_to(root).as_posix() if file != root else file.name for file in files]
  return [len(files), sum(sizes), content.digest([names, sizes])[:32]]


def tally(found: Sequence[Found]) -> str:
  """How many cells are in which state, in words."""
  counts = {state: sum(each.state == state for each in found) for state in STATES}
  words = {"finished": "finished", "stale": "stale", "failed": "failed", "missing": "not finished"}
  return ", ".join(f"{count} {words[state]}" for state, count in counts.items() if count) or "none"
