"""The report as `report.html`: one file without scripts, that asks no server for anything.

Tables scroll by themselves where a screen is narrow, and take the focus so that a keyboard scrolls them.
Colours follow `prefers-color-scheme`. Backbones differ in marker, dash and name; a win is a word.
"""

import base64
from collections.abc import Mapping, Sequence
import html
import io
import pathlib
from typing import Any

from PIL import Image

from frozen_vision.report import svg, words

Report = Mapping[str, Any]
_PICTURE_WIDTH = 720
_STYLE = pathlib.Path(__file__).with_name("style.css")


def render(report: Report, workdir: pathlib.Path | None = None) -> str:
  """The text of the page, from what `tables.collect` gives.

  Args:
    workdir: where the pictures lie that the report names; None leaves them out.
  """
  labels = [backbone["label"] for backbone in report["backbones"]]
  sections = [
    ("scores", "Scores", _scores(report, labels)),
    ("ranks", "Mean ranks", _ranks(report, labels)),
    ("wins", "Wins and losses", _wins(report, labels)),
    ("size", "Score against size and speed", _against_size(report, labels)),
    ("backbones", "Backbones", _cards(report, labels)),
    ("curves", "Curves", _curves(report, labels)),
    ("pictures", "Predictions on the same inputs", _pictures(report, workdir)),
    ("choices", "How it was chosen", _choices(report)),
    (
      "absent",
      "What was not run",
      _table(["what", "why"], words.absent(report), "What was not run, and why"),
    ),
  ]
  shown = [(name, title, body) for name, title, body in sections if body]
  links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in shown)
  bodies = "".join(
    f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>{body}</section>'
    for name, title, body in shown
  )
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(report["title"])}: {html.escape(", ".join(labels))}</title>
<style>{_STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<a class="skip" href="#scores">To the scores</a>
<header>
<h1>{html.escape(report["title"])}</h1>
<p class="names">{_legend(labels)}</p>
<p><strong>{html.escape(words.state(report))}</strong> {html.escape(words.budget(report))}</p>
<p>{html.escape(words.about_data(report))}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>{bodies}</main>
</body>
</html>
"""


def _legend(labels: Sequence[str]) -> str:
  """Every backbone beside its marker."""
  return " ".join(
    f'<span class="name">{_key(place)}{html.escape(label)}</span>' for place, label in enumerate(labels)
  )


def _key(place: int) -> str:
  return f'<svg class="key" viewBox="0 0 16 16" aria-hidden="true">{svg.marker(place, 8, 8)}</svg>'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str, *, raw: bool = False) -> str:
  """A table in a box of its own that scrolls; the first cell of a row is its head.

  Args:
    raw: cells behind the first one are HTML already.
  """
  if not rows:
    return ""
  head = "".join(f'<th scope="col">{html.escape(each)}</th>' for each in heads)
  lines = "".join(
    f'<tr><th scope="row">{html.escape(first)}</th>'
    + "".join(f"<td>{each if raw else html.escape(each)}</td>" for each in rest)
    + "</tr>"
    for first, *rest in rows
  )
  label = html.escape(caption, quote=True)
  return (
    f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">'
    f"<table><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
  )


def _note(text: str) -> str:
  return f'<p class="note">{html.escape(text)}</p>'


def _scores(report: Report, labels: Sequence[str]) -> str:
  rows = []
  for row in report["rows"]:
    cells = report["scores"].get(row["key"], {})
    drawn = [_score(cells.get(label), cells.values()) for label in labels]
    rows.append([words.row_title(row), *drawn])
  table = _table(["task", *labels], rows, "Scores with intervals", raw=True)
  return table + _note(words.about_intervals(report))


def _score(cell: Mapping[str, Any] | None, row: Any) -> str:
  """A number, its interval, and where it lies within the row."""
  if cell is None:
    return '<span class="absent">no score</span>'
  text = f"<strong>{cell['mean']:.3f}</strong>"
  interval = words.interval(cell)
  if not interval:
    return text
  ends = [end for each in row for end in (each["low"], each["high"]) if end is not None]
  low, high = min(ends), max(ends)
  span = (high - low) or 1.0
  places = [100 * (value - low) / span for value in (cell["low"], cell["high"], cell["mean"])]
  bar = (
    '<svg class="bar" viewBox="0 0 104 10" aria-hidden="true">'
    f'<path class="interval" d="M{places[0] + 2:.1f} 5H{places[1] + 2:.1f}"/>'
    f'<circle cx="{places[2] + 2:.1f}" cy="5" r="3"/></svg>'
  )
  return f'{text}<span class="interval">{interval}</span>{bar}'


def _ranks(report: Report, labels: Sequence[str]) -> str:
  ranks = report["mean_ranks"]
  if not ranks:
    return ""
  order = sorted((label for label in labels if label in ranks), key=lambda label: ranks[label]["mean"])
  rows = [[label, words.rank(ranks[label])] for label in order]
  return _table(["backbone", "mean rank"], rows, "Mean ranks, the best first") + _note(
    words.about_ranks(report)
  )


def _wins(report: Report, labels: Sequence[str]) -> str:
  if not report["comparisons"]:
    return ""
  counts = words.wins(report)

  def cell(label: str, other: str) -> str:
    if label == other:
      return ""
    rows = words.compared(report, label, other)
    won, lost = counts[label][other], counts[other][label]
    return f"{won} won, {lost} lost, {rows - won - lost} open" if rows else "not compared"

  rows = [[label, *(cell(label, other) for other in labels)] for label in labels]
  details = [
    [f"{each['first']} over {each['second']}", *words.comparison(report, each)]
    for each in report["comparisons"]
  ]
  return (
    _table(["backbone against", *labels], rows, "Rows won, lost and open")
    + _note(words.about_wins(report))
    + "<details><summary>All comparisons</summary>"
    + _table(words.COMPARISON_HEADS, details, "All comparisons")
    + "</details>"
  )


def _against_size(report: Report, labels: Sequence[str]) -> str:
  """Mean ranks against what a backbone costs, and every row against its parameters."""
  cards = {each["label"]: each["card"] for each in report["backbones"] if each["card"]}
  costs = (
    ("parameters", "parameters"),
    ("flops", "FLOPs of an image"),
    ("images_per_second", "images per second"),
  )
  charts = []
  if report["mean_ranks"]:
    for key, title in costs:
      series = {
        label: [svg.Point(card[key], rank["mean"], rank["low"], rank["high"])]
        for label, card in cards.items()
        if (rank := report["mean_ranks"].get(label))
      }
      axes = svg.Axis(title, log=True), svg.Axis("mean rank", reverse=True)
      charts.append(
        (
          f"Mean rank against {title}",
          svg.chart(series, *axes, description=f"Mean rank against {title}", order=labels),
        )
      )
  for row in report["rows"]:
    cells = report["scores"].get(row["key"], {})
    series = {
      label: [svg.Point(cards[label]["parameters"], cell["mean"], cell["low"], cell["high"])]
      for label, cell in cells.items()
      if label in cards
    }
    axes = svg.Axis("parameters", log=True), svg.Axis(row["title"], reverse=row["lower_is_better"])
    title = words.row_title(row)
    charts.append((title, svg.chart(series, *axes, description=f"{title}, against parameters", order=labels)))
  return _figures(charts)


def _figures(charts: Sequence[tuple[str, str]]) -> str:
  drawn = "".join(
    f"<figure>{chart}<figcaption>{html.escape(title)}</figcaption></figure>"
    for title, chart in charts
    if chart
  )
  return f'<div class="figures">{drawn}</div>' if drawn else ""


def _cards(report: Report, labels: Sequence[str]) -> str:
  cards = []
  for place, backbone in enumerate(report["backbones"]):
    lines = "".join(
      f"<dt>{html.escape(what)}</dt><dd>{html.escape(value)}</dd>" for what, value in words.card(backbone)
    )
    cards.append(f"<article><h3>{_key(place)}{html.escape(labels[place])}</h3><dl>{lines}</dl></article>")
  return f'<div class="cards">{"".join(cards)}</div>'


def _curves(report: Report, labels: Sequence[str]) -> str:
  """Training losses of the first seed, and the grids of the linear probes."""
  charts, first = [], report["seeds"][0]
  for task in dict.fromkeys(each["task"] for each in report["runs"]):
    series = {
      each["backbone"]: [svg.Point(step, loss) for step, loss in each["loss"]]
      for each in report["runs"]
      if each["task"] == task and each["seed"] == first
    }
    axes = svg.Axis("step"), svg.Axis("training loss", log=True)
    title = f"{task}: training loss, seed {first}"
    charts.append((title, svg.chart(series, *axes, description=title, lines=True, order=labels)))
  grids = {each["backbone"]: each for each in report["choices"] if each["seed"] == first}
  if grids:
    series = {label: [svg.Point(*point) for point in each["grid"]] for label, each in grids.items()}
    axes = svg.Axis("weight decay", log=True), svg.Axis("validation accuracy")
    title = f"Linear probe: accuracy on validation data over the grid, the chosen one marked, seed {first}"
    marks = {label: each["selected"] for label, each in grids.items()}
    charts.append((title, svg.chart(series, *axes, description=title, lines=True, order=labels, marks=marks)))
  return _figures(charts)


def _pictures(report: Report, workdir: pathlib.Path | None) -> str:
  if workdir is None:
    return ""
  drawn = []
  for each in report["pictures"]:
    data = _jpeg(workdir / each["file"])
    if data:
      text = f"{each['task']}, {each['backbone']}"
      drawn.append(
        f'<figure class="picture"><img alt="{html.escape("Predictions: " + text, quote=True)}" '
        f'src="data:image/jpeg;base64,{data}"><figcaption>{html.escape(text)}</figcaption></figure>'
      )
  note = _note("The first test examples of the first seed after the last step, as the runs drew them.")
  return f'{note}<div class="figures pictures">{"".join(drawn)}</div>' if drawn else ""


def _jpeg(path: pathlib.Path) -> str:
  """A picture, at most `_PICTURE_WIDTH` wide, as base64; empty where it cannot be read."""
  try:
    with Image.open(path) as image:
      picture = image.convert("RGB")
  except OSError:
    return ""
  if picture.width > _PICTURE_WIDTH:
    picture = picture.resize((_PICTURE_WIDTH, max(1, picture.height * _PICTURE_WIDTH // picture.width)))
  buffer = io.BytesIO()
  picture.save(buffer, "JPEG", quality=82)
  return base64.b64encode(buffer.getvalue()).decode()


def _choices(report: Report) -> str:
  probes = _table(
    ["backbone", "seed", "weight decay", "where"],
    words.choices(report),
    "Weight decay of the linear probe, chosen on validation data",
  )
  heads = ["task", "backbone", "trained parameters", "steps x batch", "optimizer, rate", "minutes a run"]
  heads_table = _table(
    heads, words.runs(report), "Trained heads: one recipe for all backbones, nothing tuned"
  )
  return probes + heads_table
