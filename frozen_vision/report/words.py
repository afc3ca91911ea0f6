"""Sentences and numbers that the page and its Markdown have in common."""

from collections.abc import Mapping
from typing import Any

from frozen_vision.report import svg

Report = Mapping[str, Any]


def score(cell: Mapping[str, Any] | None) -> str:
  """`0.412 (0.380 to 0.444)`, or a dash where nothing was run."""
  if cell is None:
    return "–"
  return f"{cell['mean']:.3f}" + interval(cell)


def interval(cell: Mapping[str, Any], digits: int = 3) -> str:
  """The interval in brackets; empty where there is none."""
  if cell["low"] is None or cell["high"] is None:
    return ""
  return f" ({cell['low']:.{digits}f} to {cell['high']:.{digits}f})"


def rank(found: Mapping[str, Any] | None) -> str:
  """A mean rank with its interval."""
  return "–" if found is None else f"{found['mean']:.2f}" + interval(found, 2)


def row_title(row: Mapping[str, Any]) -> str:
  """The task and its metric; says so where less is better."""
  return f"{row['task']}: {row['title']}" + (" (lower is better)" if row["lower_is_better"] else "")


def card(backbone: Mapping[str, Any]) -> list[tuple[str, str]]:
  """(what, value) of a backbone's card."""
  found = backbone["card"]
  lines = [("asked for as", backbone["source"])]
  if found is None:
    return [*lines, ("card", "not made yet"), ("weights", backbone["weights"][:16])]
  mebibytes = found["storage_bytes"] / 2**20
  levels = ", ".join(f"{c} at stride {s}" for s, c in zip(found["strides"], found["channels"]))
  return [
    *lines,
    ("variant", found["variant"]),
    ("parameters, frozen", f"{found['parameters']:,}"),
    ("FLOPs of an image", f"{svg.number(found['flops'])} at {found['side']} px (two per multiply-add)"),
    (
      "images/s",
      f"{svg.number(found['images_per_second'])} in batches of {found['batch']} on {found['machine']}",
    ),
    ("storage", f"{mebibytes:,.1f} MiB, {found['storage']}"),
    ("embedding", f"{found['embed_dim']} numbers"),
    ("maps", levels),
    ("licence of the weights", found["licence"] or "not known"),
    ("weights", found["weights"][:16]),
  ]


def state(report: Report) -> str:
  """How many cells there are, and how many not."""
  counts = report["cells"]
  absent = sum(counts.values()) - counts["finished"]
  text = f"{counts['finished']} of {sum(counts.values())} cells are finished"
  return text + (f"; {absent} are not, and are listed at the end." if absent else ".")


def budget(report: Report) -> str:
  """What was run."""
  seeds = report["seeds"]
  if report["about"]:
    return f"Budget {report['budget']}, {_count(len(seeds), 'seed')}. {report['about']}"
  return (
    f"Budget {report['budget']}, {_count(len(seeds), 'seed')}. Every backbone is "
    "frozen and gets the same data, head, steps and learning rate in every row; nothing but the weight decay "
    "of the linear probe is chosen, on validation data."
  )


def _count(number: int, noun: str) -> str:
  return f"{number} {noun}{'' if number == 1 else 's'}"


def about_data(report: Report) -> str:
  """Whose data."""
  if not report["data"]:
    return "All data are built in: generated scenes, clips and shapes. Backbones are ranked on those only."
  own = "; ".join(f"{name}: {', '.join(paths)}" for name, paths in report["data"].items())
  return f"Data of one's own: {own}. Other rows are on built-in, generated data."


def about_intervals(report: Report) -> str:
  """What the brackets hold."""
  level = 1 - report["level"]
  return (
    f"Brackets hold {level:.0%} intervals of the mean over seeds. Where a score is the mean of test "
    "examples, seeds and examples are both in it; AP and mean IoU of a whole set have the seeds' part alone, "
    "which is wide for few seeds. Without a bracket there is one seed, and nothing tells how far it may be "
    "off."
  )


def about_ranks(report: Report) -> str:
  """What a mean rank is."""
  return (
    f"The mean over {_count(report['ranked_rows'], 'row')} in which all backbones that have a score have a "
    "seed in common; 1 is the best. The interval is a bootstrap over rows and seeds: it says how far the "
    "order hangs on the choice of rows. Rows share data and are few."
  )


def about_wins(report: Report) -> str:
  """What a win is."""
  tested = sum(each["adjusted"] is not None for each in report["comparisons"])
  return (
    f"{_count(tested, 'comparison')} of two backbones in one row, paired over the same test examples and "
    "seeds (bootstrap over the examples, Student's t over the seeds), with Holm's correction over all of "
    "them: where no two backbones differ, a report names any winner with a probability of at most "
    f"{report['level']:.0%}. Three seeds show large differences only; no win does not mean equal."
  )


def wins(report: Report) -> dict[str, dict[str, int]]:
  """{backbone: {other: rows in which it wins}}."""
  labels = [backbone["label"] for backbone in report["backbones"]]
  found = {label: dict.fromkeys((other for other in labels if other != label), 0) for label in labels}
  for each in report["comparisons"]:
    if each["winner"]:
      loser = each["second"] if each["winner"] == each["first"] else each["first"]
      found[each["winner"]][loser] += 1
  return found


def compared(report: Report, first: str, second: str) -> int:
  """In how many rows two backbones were compared."""
  return sum(
    {each["first"], each["second"]} == {first, second} and each["adjusted"] is not None
    for each in report["comparisons"]
  )


# Of a table of comparisons: the names of the two, and then what `comparison` gives.
COMPARISON_HEADS = (
  "first over second",
  "row and what was compared",
  "advantage of the first over the second (interval)",
  "corrected p",
  "winner",
)


def comparison(report: Report, found: Mapping[str, Any]) -> tuple[str, str, str, str]:
  """(row, advantage of the first over the second, corrected p, who wins) of a comparison.

  The advantage is positive where the first is better, of errors too.
  """
  row = next(row for row in report["rows"] if row["key"] == found["row"])
  of = f", {row['compared']}" if found["by_examples"] else ", seeds alone"
  advantage = f"{found['difference']['mean']:+.3f}" + interval(found["difference"])
  adjusted = "not tested" if found["adjusted"] is None else f"{found['adjusted']:.2g}"
  return row_title(row) + of, advantage, adjusted, found["winner"] or "neither"


def choices(report: Report) -> list[tuple[str, str, str, str]]:
  """(backbone, seed, weight decay, remark) of every linear probe."""
  rows = []
  for each in report["choices"]:
    edge = (
      "an end of the grid: a wider one may hold a better" if each["at_edge_of_grid"] else "inside the grid"
    )
    rows.append((each["backbone"], str(each["seed"]), f"{each['selected']:.3g}", edge))
  return rows


def runs(report: Report) -> list[tuple[str, ...]]:
  """(task, backbone, trained parameters, steps x batch, optimizer and rate, minutes) of the trained heads.

  Minutes are the mean over the runs that one process made from start to end.
  """
  found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
  for each in report["runs"]:
    found.setdefault((each["task"], each["backbone"]), []).append(each)
  rows = []
  for (task, backbone), each in found.items():
    first = each[0]
    minutes = [one["seconds"] / 60 for one in each if one["seconds"]]
    stride = f" (at stride {first['stride']})" if first["stride"] else ""
    rows.append(
      (
        task,
        backbone + stride,
        f"{first['trained_parameters']:,}",
        f"{first['steps']} x {first['batch_size']}",
        f"{first['optimizer']}, {first['learning_rate']:g}",
        f"{sum(minutes) / len(minutes):.1f}" if minutes else "–",
      )
    )
  return rows


def absent(report: Report) -> list[tuple[str, str]]:
  """(what, why) of everything that was not run."""
  rows = [(each["cell"], f"{each['state']}: {each['reason']}") for each in report["absent"]]
  rows += [(name, "not among --tasks") for name in report["not_asked_for"]]
  return rows + list(report["not_offered"].items())
