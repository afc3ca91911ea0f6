"""Pictures of action recognition: strips of frames with predictions, and the confusion matrix."""

from collections.abc import Sequence
import dataclasses

from jaxtyping import Float, Int, UInt8
from matplotlib import figure as mpl_figure
from matplotlib.backends import backend_agg
import numpy as np
from PIL import Image, ImageDraw

from frozen_vision.visualization import instances

_RIGHT, _WRONG = (24, 128, 56), (197, 34, 31)
_MARGIN, _GAP, _HEAD, _PANEL = 16, 3, 26, 112
# More classes than that and names and numbers of a confusion matrix cannot be read; the colours stay.
_MAX_NAMED = 40


@dataclasses.dataclass(frozen=True)
class ClipPrediction:
  """A clip with its prediction.

  Attributes:
    clip: frames, RGB.
    probabilities: of every class.
    label: the true class; None where it is not known.
  """

  clip: UInt8[np.ndarray, "t h w 3"]
  probabilities: Float[np.ndarray, "classes"]
  label: int | None


def draw_strips(
  examples: Sequence[ClipPrediction], class_names: Sequence[str], *, num_frames: int = 8
) -> UInt8[np.ndarray, "h w 3"]:
  """A row of frames per clip; above it the predicted class with its probability, and the truth if it differs.

  Args:
    num_frames: frames shown of each clip, spread evenly over it.

  Raises:
    ValueError: no example.
  """
  if not examples:
    raise ValueError("There is no clip to draw.")
  rows = []
  for example in examples:
    chosen = np.unique(np.round(np.linspace(0, len(example.clip) - 1, num_frames)).astype(int))
    rows.append([_panel(example.clip[i]) for i in chosen])
  width = max(sum(panel.width + _GAP for panel in row) for row in rows) + 2 * _MARGIN
  height = sum(_HEAD + row[0].height + _MARGIN for row in rows) + _MARGIN
  sheet = Image.new("RGB", (max(width, 420), height), "white")
  draw, font = ImageDraw.Draw(sheet), instances.get_font(14, bold=True)
  top = _MARGIN
  for example, row in zip(examples, rows):
    predicted = int(np.argmax(example.probabilities))
    text = f"{class_names[predicted]} {example.probabilities[predicted]:.2f}"
    known, right = example.label is not None, predicted == example.label
    colour = (_RIGHT if right else _WRONG) if known else instances.INK
    draw.text((_MARGIN, top), text, font=font, fill=colour)
    if known and not right:
      truth = f"truth: {class_names[example.label]} {example.probabilities[example.label]:.2f}"
      draw.text((_MARGIN + font.getlength(text) + 16, top), truth, font=font, fill=instances.GRAY)
    left = _MARGIN
    for panel in row:
      sheet.paste(panel, (left, top + _HEAD))
      left += panel.width + _GAP
    top += _HEAD + row[0].height + _MARGIN
  return np.asarray(sheet)


def _panel(frame: UInt8[np.ndarray, "h w 3"]) -> Image.Image:
  height, width = frame.shape[:2]
  resample = Image.Resampling.NEAREST if height < _PANEL else Image.Resampling.LANCZOS
  return Image.fromarray(frame).resize((max(1, round(width * _PANEL / height)), _PANEL), resample)


def draw_confusion(
  confusion: Int[np.ndarray, "c c"], class_names: Sequence[str]
) -> UInt8[np.ndarray, "h w 3"]:
  """The confusion matrix: true classes downwards, predicted to the right; colours are fractions of a row."""
  count = len(class_names)
  fractions = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
  named = count <= _MAX_NAMED
  side = 2.6 + (0.42 * count if named else 9.0)
  figure = mpl_figure.Figure(figsize=(side, side), dpi=110, layout="constrained")
  canvas = backend_agg.FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
  axes.set_xlabel("predicted")
  axes.set_ylabel("true")
  correct = np.trace(confusion) / max(confusion.sum(), 1)
  axes.set_title(f"{int(confusion.sum())} videos, top-1 {correct:.1%}", fontsize=10)
  if named:
    axes.set_xticks(range(count), class_names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(count), class_names, fontsize=8)
    for row, column in zip(*np.nonzero(confusion)):
      axes.text(
        column,
        row,
        str(confusion[row, column]),
        ha="center",
        va="center",
        fontsize=7,
        color="white" if fractions[row, column] > 0.5 else "black",
      )
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()
