"""Pictures of label maps: image, prediction and truth side by side, and a legend of the classes there."""

from collections.abc import Sequence
import dataclasses

from jaxtyping import UInt8
import numpy as np
from PIL import Image, ImageDraw

from frozen_vision.data.segmentation.label_maps import IGNORE
from frozen_vision.visualization import instances

_OPACITY = 0.62
_UNLABELLED = (46, 47, 51)
_MARGIN, _GAP, _HEAD, _SWATCH, _LINE = 24, 8, 52, 14, 24


@dataclasses.dataclass(frozen=True)
class LabelComparison:
  """One image with its predicted and its true label map.

  Attributes:
    image: RGB.
    prediction: class of every pixel.
    truth: the same, or `IGNORE`; None where it is not known.
  """

  image: UInt8[np.ndarray, "h w 3"]
  prediction: UInt8[np.ndarray, "h w"]
  truth: UInt8[np.ndarray, "h w"] | None
  title: str = ""


def draw_label_map(
  image: UInt8[np.ndarray, "h w 3"], labels: UInt8[np.ndarray, "h w"], size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "h2 w2 3"]:
  """Lays the classes' colours over an image, with a line along borders; pixels without a class are dark.

  Args:
    size: (width, height) of the result; the image's own by default.

  Raises:
    ValueError: an image that is not [h, w, 3] uint8, or a label map of another size.
  """
  if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or labels.shape != image.shape[:2]:
    raise ValueError(
      f"The image is {image.dtype} {image.shape} and the label map {labels.shape}; expected uint8 [h, w, "
      "3] and [h, w]."
    )
  palette = np.array([instances.class_color(i) for i in range(256)], np.float32)
  palette[IGNORE] = _UNLABELLED
  size = size or (image.shape[1], image.shape[0])
  resampling = Image.Resampling.BICUBIC if size[0] > image.shape[1] else Image.Resampling.LANCZOS
  pixels = np.asarray(Image.fromarray(image).resize(size, resampling), np.float32)
  labels = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
  drawn = pixels + (palette[labels] - pixels) * _OPACITY
  border = np.zeros(labels.shape, bool)
  border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
  border[1:] |= labels[1:] != labels[:-1]
  drawn[border] = 0.35 * drawn[border]
  return np.round(drawn).astype(np.uint8)


def draw_label_comparisons(
  examples: Sequence[LabelComparison], class_names: Sequence[str], *, panel_size: int = 420
) -> UInt8[np.ndarray, "h w 3"]:
  """A sheet with a row for every image: the image, its prediction, its truth, and below them a legend.

  The legend lists the classes that occur in prediction or truth, in the order of their area there, each with
  its IoU in this image where the truth is known.

  Args:
    examples: what to show, from top to bottom.
    class_names: by class index.
    panel_size: long side of each picture in pixels of the sheet.
  """
  if not examples:
    raise ValueError("There is no example to draw.")
  font, title_font = instances.get_font(14), instances.get_font(17, bold=True)
  rows = [_row(example, class_names, panel_size, font, title_font) for example in examples]
  return instances.stack_rows(rows, margin=_MARGIN)


def _row(
  example: LabelComparison, class_names: Sequence[str], panel_size: int, font, title_font
) -> Image.Image:
  factor = panel_size / max(example.image.shape[:2])
  width, height = (max(1, round(side * factor)) for side in example.image.shape[1::-1])
  resized = Image.fromarray(example.image).resize((width, height), Image.Resampling.BICUBIC)
  panels = [
    ("Image", np.asarray(resized)),
    ("Prediction", draw_label_map(example.image, example.prediction, (width, height))),
  ]
  if example.truth is not None:
    panels.append(("Ground truth", draw_label_map(example.image, example.truth, (width, height))))
  total = len(panels) * width + (len(panels) - 1) * _GAP
  entries = _legend(example, class_names, font, total)
  lines = 1 + max((line for line, _, _, _ in entries), default=0)
  row = Image.new("RGB", (total, _HEAD + height + 10 + lines * _LINE + _MARGIN), "white")
  draw = ImageDraw.Draw(row)
  draw.text((0, 0), example.title, font=title_font, fill=instances.INK)
  for i, (name, pixels) in enumerate(panels):
    left = i * (width + _GAP)
    draw.text((left, 27), name, font=font, fill=instances.GRAY)
    row.paste(Image.fromarray(pixels), (left, _HEAD))
  for line, left, colour, text in entries:
    top = _HEAD + height + 10 + line * _LINE
    draw.rounded_rectangle((left, top + 2, left + _SWATCH, top + 2 + _SWATCH), radius=3, fill=colour)
    draw.text((left + _SWATCH + 6, top), text, font=font, fill=instances.INK)
  return row


def _legend(
  example: LabelComparison, class_names: Sequence[str], font, width: int
) -> list[tuple[int, int, tuple[int, int, int], str]]:
  """(line, left, colour, text) of every class that is there."""
  truth = predicted = example.prediction
  if example.truth is not None:
    truth = example.truth
    predicted = np.where(truth == IGNORE, IGNORE, example.prediction)  # what is scored

  def count(labels):
    return np.bincount(labels.ravel(), minlength=256)

  area = count(truth) + count(predicted)
  shown = count(truth) + count(example.prediction) > 0
  present = [i for i in np.argsort(-area, kind="stable").tolist() if i != IGNORE and shown[i]]
  texts = []
  for i in present:
    text = class_names[i] if i < len(class_names) else f"class {i}"
    union = np.count_nonzero((truth == i) | (predicted == i))
    if example.truth is not None and union:
      text += f" {np.count_nonzero((truth == i) & (predicted == i)) / union:.2f}"
    texts.append((instances.class_color(i), text))
  if example.truth is not None and (truth == IGNORE).any():
    texts.append((_UNLABELLED, "no label"))
  entries, line, left = [], 0, 0
  for colour, text in texts:
    needed = _SWATCH + 6 + int(font.getlength(text)) + 18
    if left and left + needed > width:
      line, left = line + 1, 0
    entries.append((line, left, colour, text))
    left += needed
  return entries
