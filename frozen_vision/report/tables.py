"""Everything that the page shows, from the files of the cells: `report.json`."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import pathlib
from typing import Any

from frozen_vision.report import cells, recipes, statistics

FORMAT = 1
Report = dict[str, Any]


def collect(plan: cells.Plan) -> Report:
  """The report as JSON: cards, scores with intervals, ranks, comparisons, choices, and what is not there.

  Numbers that nothing tells are None.
  """
  found = [cells.look(plan, cell) for cell in plan.cells()]
  done = [each for each in found if each.state == "finished"]
  rows = rows_of(plan)
  table = score_table(plan, done)
  lower = [row["key"] for row in rows if row["lower_is_better"]]
  ranks = statistics.mean_ranks(table, lower_is_better=lower)
  return {
    "format": FORMAT,
    "title": plan.title,
    "about": plan.about,
    "budget": plan.budget,
    "seeds": list(plan.seeds),
    "level": statistics.LEVEL,
    "backbones": [_backbone(entry, done) for entry in plan.backbones],
    "rows": rows,
    "scores": {key: {label: _cell(scores) for label, scores in row.items()} for key, row in table.items()},
    "mean_ranks": {label: _numbers(dataclasses.asdict(rank)) for label, rank in ranks.items()},
    "ranked_rows": len(statistics.ranked_rows(table)),
    "comparisons": [_comparison(each) for each in statistics.compare(table, lower_is_better=lower)],
    "choices": [_choice(each) for each in done if _kind(plan, each) == "probe"],
    "runs": [_run(plan, each) for each in done if _kind(plan, each) == "train"],
    "pictures": _pictures(plan, done),
    "data": {name: list(paths) for name, paths in dataclasses.asdict(plan.data).items() if paths},
    "options": {
      recipe: {name: getattr(value, "text", value) for name, value in options.items()}
      for recipe, options in plan.changes.items()
    },
    "absent": [
      {"cell": each.cell.name, "state": each.state, "reason": each.reason}
      for each in found
      if each.state != "finished"
    ],
    "not_asked_for": _not_asked_for(plan),
    "not_offered": dict(recipes.ABSENT) if plan.known is recipes.RECIPES else {},
    "cells": {state: sum(each.state == state for each in found) for state in cells.STATES},
  }


def _not_asked_for(plan: cells.Plan) -> list[str]:
  """The tasks of reports that this one leaves out; a study with recipes of its own leaves out none."""
  if plan.known is not recipes.RECIPES:
    return []
  return [
    name for name, (recipe, rows) in recipes.TASKS.items() if not set(rows) <= set(plan.rows.get(recipe, ()))
  ]


def rows_of(plan: cells.Plan) -> list[dict[str, Any]]:
  """The rows of the table, `key` being what the other parts call them."""
  found = []
  for name, wanted in plan.rows.items():
    recipe = plan.known[name]
    for row in recipe.rows:
      if row.name in wanted:
        found.append(
          {
            "key": f"{name}/{row.name}",
            "recipe": name,
            "task": recipe.title,
            "title": row.title,
            "compared": row.compared,
            "lower_is_better": row.lower_is_better,
          }
        )
  return found


def score_table(plan: cells.Plan, done: Sequence[cells.Found]) -> dict[str, dict[str, statistics.Scores]]:
  """{row: {backbone: scores}} of finished cells, without what no seed has."""
  examples = {each.cell.name: cells.read_examples(plan, each.cell) for each in done}
  table: dict[str, dict[str, statistics.Scores]] = {}
  for row in rows_of(plan):
    _, _, name = row["key"].partition("/")
    is_mean = next(each.is_mean for each in plan.known[row["recipe"]].rows if each.name == name)
    for entry in plan.backbones:
      own = {
        each.cell.seed: each
        for each in done
        if each.cell.recipe == row["recipe"]
        and each.cell.entry.label == entry.label
        and name in each.result["scores"]
      }
      if own:
        table.setdefault(row["key"], {})[entry.label] = statistics.Scores(
          by_seed={seed: each.result["scores"][name] for seed, each in own.items()},
          examples={
            seed: examples[each.cell.name][name]
            for seed, each in own.items()
            if name in examples[each.cell.name]
          },
          data={seed: each.result["data"].get(name, "") for seed, each in own.items()},
          is_mean=is_mean,
        )
  return table


def _backbone(entry: Any, done: Sequence[cells.Found]) -> dict[str, Any]:
  cards = [
    each.result["details"]
    for each in done
    if each.cell.recipe == cells.CARD and each.cell.entry.label == entry.label
  ]
  return {
    "label": entry.label,
    "source": entry.source,
    "weights": entry.weights,
    "licence": entry.licence,
    "card": cards[0] if cards else None,
  }


def _cell(scores: statistics.Scores) -> dict[str, Any]:
  found = _numbers(dataclasses.asdict(statistics.estimate(scores)))
  del found["p_value"]
  for name, bound, inner in (("low", 0.0, max), ("high", 1.0, min)):  # every score of a report is in 0..1
    found[name] = None if found[name] is None else inner(bound, found[name])
  return {**found, "by_seed": {str(seed): value for seed, value in sorted(scores.by_seed.items())}}


def _comparison(found: statistics.Comparison) -> dict[str, Any]:
  result = dataclasses.asdict(found)
  return {**_numbers(result), "difference": _numbers(result["difference"])}


def _choice(found: cells.Found) -> dict[str, Any]:
  """How the linear probe of one cell was chosen."""
  details = found.result["details"]
  names = ("selected", "at_edge_of_grid", "grid", "examples", "neighbours", "ece", "temperature")
  return {
    "backbone": found.cell.entry.label,
    "seed": found.cell.seed,
    **{name: details.get(name) for name in names},
  }


def _run(plan: cells.Plan, found: cells.Found) -> dict[str, Any]:
  """What one trained head was trained with, and its curve."""
  details = found.result["details"]
  names = (
    "trained_parameters",
    "steps",
    "batch_size",
    "optimizer",
    "learning_rate",
    "test_examples",
    "stride",
    "seconds",
  )
  return {
    "backbone": found.cell.entry.label,
    "recipe": found.cell.recipe,
    "task": plan.known[found.cell.recipe].title,
    "seed": found.cell.seed,
    **{name: details.get(name) for name in names},
    "loss": details.get("curves", {}).get("train/loss", []),
  }


def _pictures(plan: cells.Plan, done: Sequence[cells.Found]) -> list[dict[str, str]]:
  """The last pictures of the first seed's runs: the same inputs for every backbone."""
  found = []
  for recipe in plan.rows:
    for each in done:
      if each.cell.recipe == recipe and each.cell.seed == plan.seeds[0]:
        path = _last_picture(plan.folder(each.cell) / "pictures")
        if path is not None:
          found.append(
            {
              "recipe": recipe,
              "task": plan.known[recipe].title,
              "backbone": each.cell.entry.label,
              "file": path.relative_to(plan.workdir).as_posix(),
            }
          )
  return found


def _last_picture(folder: pathlib.Path) -> pathlib.Path | None:
  return max(folder.glob("*.png"), default=None, key=lambda path: path.name)


def _kind(plan: cells.Plan, found: cells.Found) -> str:
  recipe = plan.known.get(found.cell.recipe)
  return recipe.kind if recipe else ""


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
  """Numbers that JSON has: None in the place of NaN."""
  return {
    key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()
  }
