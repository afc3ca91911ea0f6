"""The report as `report.md`."""

from collections.abc import Mapping, Sequence
from typing import Any

from frozen_vision.report import words


def render(report: Mapping[str, Any]) -> str:
  """The text of the file, from what `tables.collect` gives."""
  labels = [backbone["label"] for backbone in report["backbones"]]
  parts = [
    f"# {report['title']}",
    f"{words.state(report)} {words.budget(report)}",
    words.about_data(report),
    "## Scores",
    _table(
      ["task", *labels],
      [
        [words.row_title(row), *(words.score(report["scores"].get(row["key"], {}).get(x)) for x in labels)]
        for row in report["rows"]
      ],
    ),
    words.about_intervals(report),
  ]
  if report["mean_ranks"]:
    ranks = report["mean_ranks"]
    parts += ["## Mean ranks", _table(labels, [[words.rank(ranks.get(label)) for label in labels]])]
    parts.append(words.about_ranks(report))
  if report["comparisons"]:
    counts = words.wins(report)
    rows = [
      [
        label,
        *(
          "" if label == other else f"{counts[label][other]} of {words.compared(report, label, other)}"
          for other in labels
        ),
      ]
      for label in labels
    ]
    parts += ["## Wins", _table(["wins of \\ over", *labels], rows), words.about_wins(report)]
    rows = [
      [f"{each['first']} over {each['second']}", *words.comparison(report, each)]
      for each in report["comparisons"]
    ]
    parts.append(_table(words.COMPARISON_HEADS, rows))
  parts.append("## Backbones")
  for backbone in report["backbones"]:
    parts += [f"### {backbone['label']}", _table(["", ""], [list(line) for line in words.card(backbone)])]
  parts.append("## How it was chosen")
  if report["choices"]:
    parts.append(_table(["backbone", "seed", "weight decay of the linear probe", ""], words.choices(report)))
  if report["runs"]:
    parts.append(
      _table(
        ["task", "backbone", "trained parameters", "steps x batch", "optimizer, rate", "minutes a run"],
        words.runs(report),
      )
    )
  parts += ["## What was not run", _table(["what", "why"], words.absent(report))]
  return "\n\n".join(parts) + "\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [heads, ["---"] * len(heads), *rows]
  return "\n".join(f"| {' | '.join(_escape(cell) for cell in line)} |" for line in lines)


def _escape(text: str) -> str:
  return text.replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
