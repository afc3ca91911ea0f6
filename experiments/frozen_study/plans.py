"""The grids as reports: backbones, cells and options in the places that a command names."""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

from experiments.frozen_study import grids, recipes
from frozen_vision.options import Text
from frozen_vision.report import cells, entries
from frozen_vision.report.recipes import Recipe

# Options of every recipe that `--tiny` has: two steps on a handful of examples.
_TINY_RUN = {"steps": 2, "optimizer.warmup_steps": 0, "batch_size": 2, "eval_batch_size": 2, "log_every": 1}
_TINY_SCENES = {
  "detection.scenes.train_images": 4,
  "detection.scenes.validation_images": 2,
  "detection.scenes.image_size": 64,
  "detection.frame": (64, 64),
  "detection.eval_frame": (64, 64),
}
_TINY_GRID = {"steps": 2, "optimizer.warmup_steps": 0, "batch_size": 8, "classification.image_size": 32}
TINY: Mapping[str, Mapping[str, Any]] = {
  "detection": _TINY_RUN | _TINY_SCENES,
  "long_tail": _TINY_RUN | _TINY_SCENES | {"detection.scenes.train_images": 40},
  "coco": _TINY_RUN | {"detection.frame": (64, 64), "detection.eval_frame": (64, 64)},
  "tuned_cifar10": _TINY_GRID,
  "tuned_caltech101": _TINY_GRID,
  "segmentation": _TINY_RUN
  | {"segmentation.scenes.train_images": 4, "segmentation.scenes.validation_images": 2}
  | {"segmentation.frame": (64, 64), "segmentation.eval_frame": (64, 64)}
  | {"segmentation.short_sides": (64,), "segmentation.long_side": 64, "segmentation.scenes.image_size": 64},
  "action": _TINY_RUN | {"action.clips.train_clips": 4, "action.clips.validation_clips": 6},
}


def read_variants(
  variants: Sequence[grids.Variant], weights: pathlib.Path | None
) -> tuple[list[entries.Entry], dict[str, str]]:
  """(the backbones of variants, {label: why} of those whose weights are not there).

  Args:
    weights: a folder of weights files that go before shipped ones of the name.
  """
  found, absent = [], {}
  for variant in variants:
    path = None if weights is None else weights / f"{variant.backbone}.safetensors"
    source = str(path) if path is not None and path.is_file() else variant.backbone
    try:
      [entry] = entries.read([f"{variant.label}={source}"])
    except (FileNotFoundError, ConnectionError) as error:
      absent[variant.label] = str(error)
      continue
    if entry.label != variant.label:
      raise ValueError(f"The label {variant.label!r} is no name of a folder; take {entry.label!r}.")
    found.append(dataclasses.replace(entry, configs=variant.configs, changes=variant.changes))
  return found, absent


def needs(grid: grids.Grid) -> set[str]:
  """The places that the recipes of a grid read: `recipes.DATA`, `recipes.PART`."""
  texts = [
    value
    for recipe in grid.rows
    for value in grid.known[recipe].changes["demo"].values()
    if isinstance(value, str)
  ]
  return {place for place in (recipes.DATA, recipes.PART) if any(place in text for text in texts)}


def make_plan(name: str, asked: argparse.Namespace) -> tuple[cells.Plan, dict[str, str]]:
  """(the report that is one grid, {label: why} of variants without weights).

  Args:
    name: of the grid.
    asked: of the command line, as `run.read_arguments` gives it.

  Raises:
    ValueError: data that are missing, or labels of `only` that no grid has.
  """
  grid = grids.GRIDS[name]
  variants = [each for each in grid.variants if not asked.only or each.label in asked.only]
  backbones, absent = read_variants(variants, asked.weights)
  places = {recipes.PART: str(asked.workdir / "parts")}
  if recipes.DATA in needs(grid) or recipes.PART in needs(grid):
    if asked.data is None:
      raise ValueError(f"The grid {name} reads data: give --data=FOLDER, with coco_subset and so on in it.")
    places[recipes.DATA] = str(asked.data)
  known = grid.known
  if needs(grid):
    known = {key: _filled(recipe, places) for key, recipe in known.items()}
  plan = cells.Plan(
    workdir=asked.workdir,
    backbones=tuple(backbones),
    rows=grid.rows,
    seeds=tuple(range(asked.seeds)),
    budget=asked.budget,
    changes=_changes(grid, asked),
    known=known,
    with_cards=len({each.backbone for each in grid.variants}) == len(grid.variants),
    runner=(*asked.runner, f"--grid={name}"),
    title=grid.question,
    about=grid.about,
  )
  return plan, absent


def _filled(recipe: Recipe, places: Mapping[str, str]) -> Recipe:
  """A recipe with folders in the place of their placeholders."""

  def fill(value: Any) -> Any:
    for place, folder in places.items():
      value = value.replace(place, folder) if isinstance(value, str) else value
    return value

  changes = {
    budget: {key: fill(value) for key, value in options.items()} for budget, options in recipe.changes.items()
  }
  return dataclasses.replace(recipe, changes=changes)


def _changes(grid: grids.Grid, asked: argparse.Namespace) -> dict[str, dict[str, Any]]:
  """Options of all variants: those of --tiny, --separate and --option."""
  found: dict[str, dict[str, Any]] = {}
  if asked.tiny:
    found = {recipe: dict(TINY[recipe]) for recipe in grid.rows if recipe in TINY}
  if asked.separate:
    for recipe in grid.rows:
      found.setdefault(recipe, {})["cache.path"] = ""
  for text in asked.option:
    recipe, _, option = text.partition(":")
    key, equals, value = option.partition("=")
    if recipe not in grid.rows or not equals:
      continue  # of another grid
    found.setdefault(recipe, {})[key] = Text(value)
  return found
