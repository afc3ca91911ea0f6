"""The page of one grid: its scores, and what they say of the statements that it tests."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

from experiments.frozen_study import grids
from frozen_vision.files import atomic
from frozen_vision.report import cells, page, statistics, tables, words


@dataclasses.dataclass(frozen=True)
class Finding:
  """A claim and the comparisons that test it, each of a better one (first) with a worse one."""

  claim: grids.Claim
  comparisons: tuple[statistics.Comparison, ...]

  def verdict(self) -> str:
    """What the intervals allow to say, in a sentence."""
    tested = [each for each in self.comparisons if each.adjusted == each.adjusted]
    for_it = sum(each.winner == each.first for each in tested)
    against = sum(each.winner == each.second for each in tested)
    open_ones, count = len(tested) - for_it - against, len(tested)
    if not count:
      return "Not tested: cells are missing, or there is one seed."
    of = f"of {count} comparison{'' if count == 1 else 's'}"
    rest = f"; {open_ones} {'is' if open_ones == 1 else 'are'} open" if open_ones else ""
    if for_it and against:
      return f"Seen in {for_it} {of}, the opposite in {against}{rest}."
    if for_it:
      return f"Seen in {for_it} {of}, the opposite in none{rest}."
    if against:
      return f"The opposite is seen in {against} {of}, the statement in none{rest}."
    return f"Open: no difference beyond its interval in any {of}. That does not say that there is none."


def findings(plan: cells.Plan, grid: grids.Grid) -> list[Finding]:
  """Tests the claims of a grid on its finished cells, with Holm's correction over all that they compare."""
  found = [cells.look(plan, cell) for cell in plan.cells()]
  table = tables.score_table(plan, [each for each in found if each.state == "finished"])
  lower = [row["key"] for row in tables.rows_of(plan) if row["lower_is_better"]]
  pairs = [
    [
      (row, better, worse)
      for row in claim.rows or tuple(row["key"] for row in tables.rows_of(plan))
      for better in claim.better
      for worse in claim.worse
      if better != worse
    ]
    for claim in grid.claims
  ]
  # One family of tests: a pair that two claims share is in it once.
  family = list(dict.fromkeys(pair for each in pairs for pair in each))
  compared = {
    (each.row, each.first, each.second): each
    for each in statistics.compare(table, lower_is_better=lower, pairs=family)
  }
  return [
    Finding(claim, tuple(compared[pair] for pair in each if pair in compared))
    for claim, each in zip(grid.claims, pairs)
  ]


def write(
  name: str, plan: cells.Plan, absent: Mapping[str, str], costs: Mapping[str, Any], out: pathlib.Path
) -> pathlib.Path:
  """Writes `NAME.md`, `.html` and `.json` of a grid into the folder `out`.

  Args:
    absent: {label: why} of variants without weights.
    costs: {label: what `costs.measure` gives}.

  Returns:
    The path of the Markdown.
  """
  grid = grids.GRIDS[name]
  report = tables.collect(plan)
  found = findings(plan, grid)
  folder = out
  folder.mkdir(parents=True, exist_ok=True)
  report["findings"] = [
    {"claim": each.claim.text, "verdict": each.verdict(), "comparisons": len(each.comparisons)}
    for each in found
  ]
  report["without_weights"] = dict(absent)
  report["costs"] = dict(costs)
  atomic.write_json(folder / f"{name}.json", json.loads(json.dumps(report, default=str)), indent=1)
  atomic.write_text(folder / f"{name}.html", page.render(report, plan.workdir))
  atomic.write_text(folder / f"{name}.md", render(name, plan, report, found, absent, costs))
  return folder / f"{name}.md"


def render(
  name: str,
  plan: cells.Plan,
  report: Mapping[str, Any],
  found: Sequence[Finding],
  absent: Mapping[str, str],
  costs: Mapping[str, Any],
) -> str:
  """The Markdown of a grid."""
  grid = grids.GRIDS[name]
  titles = {variant.label: variant.title for variant in grid.variants}
  rows = report["rows"]
  parts = [
    f"# {grid.question}",
    f"{words.state(report)} {words.budget(report)} Made by `experiments/frozen_study/run.py --grid={name}`.",
    "## Scores",
    _table(
      ["variant", *(words.row_title(row) for row in rows)],
      [
        [titles[label], *(words.score(report["scores"].get(row["key"], {}).get(label)) for row in rows)]
        for label in titles
      ],
    ),
    words.about_intervals(report),
    "## Statements of the papers, at this size",
    "Each statement is tested by comparisons that are paired over seeds and test examples, with Holm's "
    "correction over all of this page, at a level of 5%. A verdict is about these data, steps and sizes.",
    _table(["statement", "verdict"], [[each.claim.text, each.verdict()] for each in found]),
  ]
  for each in found:
    if each.comparisons:
      parts += [f"### {each.claim.text}", _comparisons(report, each, titles)]
  cost_rows = _costs(plan, report, titles, costs)
  if cost_rows:
    heads = ["variant", "task", "trained parameters", "minutes a run", "GFLOP a step", "temporaries, MB"]
    parts += ["## Costs", _table(heads, cost_rows), _spent(plan)]
  missing = [[each["cell"], f"{each['state']}: {each['reason']}"] for each in report["absent"]]
  missing += [[titles.get(label, label), reason] for label, reason in absent.items()]
  if missing:
    parts += ["## What was not run", _table(["what", "why"], missing)]
  return "\n\n".join(part for part in parts if part) + "\n"


def _comparisons(report: Mapping[str, Any], found: Finding, titles: Mapping[str, str]) -> str:
  lines = []
  for each in found.comparisons:
    as_json = dataclasses.asdict(each)
    for values in (as_json, as_json["difference"]):
      values |= {key: None if value != value else value for key, value in values.items()}
    row, advantage, adjusted, winner = words.comparison(report, as_json)
    names = f"{titles[each.first]} over {titles[each.second]}"
    lines.append([names, row, advantage, adjusted, titles.get(winner, winner)])
  return _table(words.COMPARISON_HEADS, lines)


def _costs(
  plan: cells.Plan, report: Mapping[str, Any], titles: Mapping[str, str], costs: Mapping[str, Any]
) -> list[list[str]]:
  """A line for each variant and trained recipe."""
  runs: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
  for run in report["runs"]:
    runs.setdefault((run["backbone"], run["recipe"]), []).append(run)
  lines = []
  for (label, recipe), each in runs.items():
    minutes = [run["seconds"] / 60 for run in each if run["seconds"]]
    cost = costs.get(f"{label}/{recipe}", {})
    lines.append(
      [
        titles.get(label, label),
        plan.known[recipe].title,
        f"{each[0]['trained_parameters']:,}",
        f"{sum(minutes) / len(minutes):.1f}" if minutes else "–",
        f"{cost['flops'] / 1e9:,.1f}" if "flops" in cost else "–",
        f"{cost['temporaries'] / 1e6:,.0f}" if "temporaries" in cost else "–",
      ]
    )
  return lines


def _spent(plan: cells.Plan) -> str:
  """How long the finished cells took, of those that one process made from beginning to end."""
  seconds = []
  for cell in plan.cells():
    found = cells.look(plan, cell)
    if found.state == "finished" and cell.recipe != cells.CARD:
      seconds.append(found.result["details"].get("seconds"))
  known = [each for each in seconds if each]
  total = f"{sum(known) / 60:.0f} minutes in {len(known)} cell{'' if len(known) == 1 else 's'}"
  more = f"; {len(seconds) - len(known)} more were interrupted and are not counted" * (
    len(known) < len(seconds)
  )
  is_separate = all(plan.changes.get(recipe, {}).get("cache.path") == "" for recipe in plan.rows)
  how = (
    "Every cell computed its own features."
    if is_separate
    else "Features that cells share were computed once."
  )
  return f"All in all {total}{more}. {how}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [heads, ["---"] * len(heads), *rows]
  return "\n".join(
    f"| {' | '.join(text.replace('|', chr(92) + '|').replace(chr(10), ' ') for text in line)} |"
    for line in lines
  )
