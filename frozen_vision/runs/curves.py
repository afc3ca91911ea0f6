"""Curves of a run, drawn from its `metrics.jsonl`."""

import collections
import itertools
import json
import logging
import math
import os
import pathlib
import re
from typing import Any
import zlib

import matplotlib
from matplotlib import figure as mpl_figure
from matplotlib.backends import backend_agg
import numpy as np

from frozen_vision.files import atomic

_logger = logging.getLogger(__name__)

Points = list[tuple[int, float]]

# Names of numbers that are no terms of the loss, in files of older runs, where terms had no prefix `loss/`.
_OLD_METRICS = re.compile(
  r"/|rate|norm|time|second|per_s|wait|eta|mfu|epoch|memory|examples|images|flops|scale|accuracy"
)


def read_metrics(path: str | os.PathLike[str]) -> dict[str, Points]:
  """Series of a `metrics.jsonl`: key -> (step, value) in the order of steps.

  Values that are no finite numbers are left out, and so is a line that a killed run did not finish.
  A step that was run twice, because the run was resumed, counts as it was the last time.
  """
  series: dict[str, dict[int, float]] = collections.defaultdict(dict)
  broken = 0
  with open(path, encoding="utf-8") as file:
    for line in file:
      try:
        row: dict[str, Any] = json.loads(line)
        step = int(row["step"])
      except (ValueError, KeyError, TypeError):
        broken += bool(line.strip())
        continue
      for key, value in row.items():
        if key != "step" and isinstance(value, (int, float)) and math.isfinite(value):
          series[key][step] = float(value)
  if broken:
    _logger.warning("%s: %d lines without a step or unfinished were left out.", path, broken)
  return {key: sorted(points.items()) for key, points in series.items()}


def evaluation_at(path: str | os.PathLike[str], step: int) -> dict[str, float]:
  """What the evaluation after a step found, of a `metrics.jsonl`; empty where there was none."""
  series = read_metrics(path) if os.path.exists(path) else {}  # not there if a run was told to stop at once
  return {
    key.removeprefix("eval/"): points[-1][1]
    for key, points in series.items()
    if key.startswith("eval/") and points[-1][0] == step
  }


def plot_curves(metrics_path: str | os.PathLike[str], out_png: str | os.PathLike[str]) -> list[pathlib.Path]:
  """Draws what a run wrote to `metrics.jsonl`: one figure for training, one for evaluation.

  Args:
    metrics_path: lines of JSON with `step` and keys such as `train/loss` and `eval/box_AP`; which
      keys there are does not matter, and one point per key is enough. COCO's -1 (no object) is left
      out.
    out_png: `curves.png` makes `curves_train.png` and `curves_eval.png`.

  Returns:
    The files written; a figure without any data is not made.
  """
  series = read_metrics(metrics_path)
  out = pathlib.Path(out_png)
  written = []
  for name, title in (("train", "Training"), ("eval", "Evaluation")):
    own = {
      key.removeprefix(f"{name}/"): points
      for key, points in series.items()
      if key.startswith(f"{name}/") and key != "train/eta"
    }
    for key in [key for key in own if key.startswith(("box_A", "mask_A"))]:
      own[key] = [point for point in own[key] if point[1] >= 0]
      if not own[key]:
        del own[key]
    if own:
      path = out.with_name(f"{out.stem}_{name}.png")
      _plot(_panels(own, name == "train"), f"{title} · {out.resolve().parent.name}", path)
      written.append(path)
  return written


def are_whole(out_png: str | os.PathLike[str]) -> bool:
  """Whether the figures that `plot_curves` draws of a finished run are there, to their last byte."""
  out = pathlib.Path(out_png)
  figures = [out.with_name(f"{out.stem}_{name}.png") for name in ("train", "eval")]
  return all(path.is_file() and _is_whole_png(path) for path in figures)


def _is_whole_png(path: pathlib.Path) -> bool:
  """Whether every chunk of a PNG adds up to its checksum, and the last one is its end."""
  data = path.read_bytes()
  if not data.startswith(b"\x89PNG\r\n\x1a\n"):
    return False
  position = 8
  while position + 12 <= len(data):
    length = int.from_bytes(data[position : position + 4], "big")
    end = position + 12 + length
    if end > len(data):
      return False
    if zlib.crc32(data[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
      return False
    if data[position + 4 : position + 8] == b"IEND":
      return True
    position = end
  return False


def _panels(series: dict[str, Points], training: bool) -> dict[str, dict[str, Points]]:
  """Sorts series into panels: title -> {legend: points}.

  Terms of the loss, `loss/NAME`, share a panel. A metric has one of its own, or shares it with those that
  have the same part before a slash.
  """
  panels: dict[str, dict[str, Points]] = {}
  titles = {"box": "Box", "mask": "Mask"}
  terms = {key for key in series if training and key.startswith("loss/")}
  if training and not terms:
    terms = {key for key in series if key != "loss" and not _OLD_METRICS.search(key)}
  for key, points in series.items():
    kind, _, metric = key.partition("_")
    if kind in titles and metric.startswith("AP"):
      by_size = metric.endswith(("small", "medium", "large"))
      panel = f"{titles[kind]} AP by object size" if by_size else f"{titles[kind]} AP"
      legend = metric.removeprefix("AP_")
    elif kind in titles and metric.startswith("AR"):
      panel, legend = f"{titles[kind]} AR", metric.removeprefix("AR_")
      legend = f"AR@{legend}" if legend.isdigit() else legend
    elif key.startswith("top") and key[3:].isdigit():
      panel, legend = "Accuracy", f"top-{key[3:]}"
    elif key == "loss":
      panel, legend = "Loss", ""
    elif key in terms:
      panel, legend = "Loss terms", key.removeprefix("loss/")
    else:
      panel, _, legend = key.partition("/")
      panel = panel.replace("_", " ").capitalize()
    panels.setdefault(panel, {})[legend] = points
  first = ["Loss", "Loss terms", "Box AP", "Mask AP", "Box AP by object size",
           "Mask AP by object size", "Box AR", "Mask AR"]  # fmt: skip
  return dict(sorted(panels.items(), key=lambda item: first.index(item[0])
                     if item[0] in first else len(first)))  # fmt: skip


def _plot(panels: dict[str, dict[str, Points]], title: str, path: pathlib.Path) -> None:
  columns = min(len(panels), 2 if len(panels) <= 6 else 3)
  rows = math.ceil(len(panels) / columns)
  width, height = 5.4 * columns, 3.6 * rows + 0.5
  figure = mpl_figure.Figure((width, height), dpi=130)
  backend_agg.FigureCanvasAgg(figure)
  # Fixed margins in inches: a layout that looks for its own draws everything twice.
  figure.subplots_adjust(
    left=0.65 / width,
    right=1 - 0.15 / width,
    bottom=0.5 / height,
    top=1 - 0.8 / height,
    wspace=0.65 / (5.4 - 0.65),
    hspace=0.8 / (3.6 - 0.8),
  )
  figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, y=1 - 0.12 / height, ha="left", va="top")
  for i, (name, series) in enumerate(panels.items()):
    _plot_panel(figure.add_subplot(rows, columns, i + 1), name, series)
  with atomic.open_aside(path) as file:
    figure.savefig(file, format="png")


def _plot_panel(axes, name: str, series: dict[str, Points]) -> None:
  """Lines of one panel; long ones as a moving average over a pale original."""
  colors = matplotlib.color_sequences["tab10"] + matplotlib.color_sequences["Dark2"]
  for color, (legend, points) in zip(itertools.cycle(colors), series.items()):
    steps, values = np.array(points).T
    if len(steps) > 60 and name != "Learning rate":  # A schedule has no noise to smooth away.
      axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
      axes.plot(steps, _smooth(values), color=color, linewidth=1.7, label=legend)
    else:
      marker = "o" if len(steps) <= 25 else None
      axes.plot(steps, values, color=color, marker=marker, markersize=3.5, label=legend)
  all_steps = {step for points in series.values() for step, _ in points}
  values = [value for points in series.values() for _, value in points]
  if name.startswith("Loss") and min(values) > 0 and max(values) > 30 * min(values):
    axes.set_yscale("log")
  elif min(values) >= 0:
    axes.set_ylim(0, max(values) * 1.12 or 1)
  if len(all_steps) == 1:
    axes.set_xticks(list(all_steps))
  else:
    axes.xaxis.get_major_locator().set_params(integer=True)
  axes.set_title(name, fontsize=11, loc="left")
  axes.set_xlabel("step", fontsize=9)
  axes.tick_params(labelsize=9)
  axes.grid(alpha=0.25, linewidth=0.6)
  axes.spines[["top", "right"]].set_visible(False)
  if any(series):  # Else it is a single number, and its name is the title.
    axes.legend(fontsize=8, frameon=False, ncols=1 + len(series) // 6)


def _smooth(values: np.ndarray) -> np.ndarray:
  """Moving average over a fortieth of the curve on each side, fewer values at its ends."""
  half = max(1, len(values) // 40)
  total = np.concatenate([[0.0], np.cumsum(values)])
  index = np.arange(len(values))
  low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
  return (total[high] - total[low]) / (high - low)
