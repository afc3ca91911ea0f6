"""Pictures of detections, alone and beside the truth."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import os

from jaxtyping import Bool, Float, Int, Num, UInt8
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from frozen_vision.files import atomic
from frozen_vision.ops import masks as mask_ops

_GOLDEN_RATIO = 0.618033988749895
_TONES = ((0.85, 0.95), (0.6, 0.88), (1.0, 0.8), (0.45, 1.0), (0.95, 0.66), (0.6, 0.74))
INK, GRAY = (32, 33, 36), (110, 113, 119)


@dataclasses.dataclass(frozen=True)
class Instances:
  """The objects that are drawn on one image.

  Attributes:
    boxes: xyxy in pixels of the image.
    labels: class of each box.
    scores: confidence of each box; None for the truth.
    masks: full-image masks, or None for boxes only.
  """

  boxes: Num[np.ndarray, "n 4"]
  labels: Int[np.ndarray, "n"]
  scores: Float[np.ndarray, "n"] | None = None
  masks: Bool[np.ndarray, "n h w"] | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
  """One image with its prediction and its truth, for `draw_comparisons`."""

  image: UInt8[np.ndarray, "h w 3"]
  prediction: Instances
  truth: Instances
  title: str = ""


def predicted_instances(
  predictions: Mapping[str, np.ndarray],
  index: int,
  image_size: Sequence[int],
  *,
  score_threshold: float = 0.3,
) -> Instances:
  """Detections of one example of a batch, masks pasted into the input frame.

  Args:
    predictions: `boxes` [b, k, 4], `scores`, `labels`, `valid` [b, k] and perhaps `masks`
      [b, k, m, m], as a detector's `predict` gives them.
    index: which example.
    image_size: (h, w) of the content in input pixels.
    score_threshold: detections below it are left out.
  """
  scores = np.asarray(predictions["scores"][index])
  kept = np.flatnonzero(np.asarray(predictions["valid"][index]) & (scores >= score_threshold))
  boxes = np.asarray(predictions["boxes"][index])[kept]
  masks = None
  if "masks" in predictions:
    height, width = (int(size) for size in image_size)
    masks = np.zeros((len(kept), height, width), bool)
    for mask, i, box in zip(masks, kept, boxes):
      mask[:] = mask_ops.paste_mask(np.asarray(predictions["masks"][index][i]), box, height, width)
  return Instances(boxes, np.asarray(predictions["labels"][index])[kept], scores[kept], masks)


def true_instances(batch: Mapping[str, np.ndarray], index: int) -> Instances:
  """Targets of one example of a training batch: `boxes`, `labels`, `valid`, packed `masks`."""
  height, width = (int(size) for size in batch["image_size"][index])
  kept = np.flatnonzero(np.asarray(batch["valid"][index]))
  masks = None
  if "masks" in batch:
    packed = np.asarray(batch["masks"][index])[kept]
    frame = np.asarray(batch["image"]).shape[2]
    masks = mask_ops.unpack(packed, frame)[:, :height, :width]
  boxes, labels = np.asarray(batch["boxes"][index])[kept], np.asarray(batch["labels"][index])[kept]
  return Instances(boxes, labels, None, masks)


def class_color(label: int) -> tuple[int, int, int]:
  """A bright colour (RGB, 0..255) that depends on the label alone; neighbours differ strongly."""
  hue = (0.02 + label * _GOLDEN_RATIO) % 1.0
  # Multiples of the golden ratio nearly repeat at Fibonacci numbers: 13 hues, then a new tone.
  saturation, value = _TONES[label // 13 % len(_TONES)]
  channels = (np.clip(np.abs((hue * 6 + shift) % 6 - 3) - 1, 0, 1) for shift in (0, 4, 2))
  return tuple(int(255 * value * (1 - saturation * (1 - channel))) for channel in channels)


@functools.cache
def get_font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
  """The font of all pictures."""
  # matplotlib ships this font, so pictures look the same on every machine.
  name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
  return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def draw_detections(
  image: UInt8[np.ndarray, "h w 3"],
  boxes: Num[np.ndarray, "n 4"],
  labels: Int[np.ndarray, "n"],
  scores: Float[np.ndarray, "n"] | None = None,
  masks: Bool[np.ndarray, "n h w"] | None = None,
  class_names: Sequence[str] | None = None,
  *,
  min_long_side: int = 640,
) -> UInt8[np.ndarray, "h2 w2 3"]:
  """Draws masks with outlines, boxes, and labels with scores.

  Args:
    image: RGB.
    boxes: xyxy in pixels of the image.
    labels: class of each box.
    scores: shown behind the class name.
    masks: full-image masks.
    class_names: without it, labels are shown as numbers.
    min_long_side: images whose long side is smaller are enlarged, by the integer factor that comes
      nearest to it, before drawing, so that text is readable.

  Returns:
    The picture: `image`'s size times that factor.

  Raises:
    ValueError: an image that is not [h, w, 3] uint8, or lengths that disagree.
  """
  instances = Instances(boxes, labels, scores, masks)
  factor = max(1, round(min_long_side / max(image.shape[:2])))
  height, width = image.shape[0] * factor, image.shape[1] * factor
  return np.asarray(_draw(image, instances, class_names, (width, height)))


def _check(image: np.ndarray, instances: Instances) -> None:
  if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
    raise ValueError(f"The image is {image.dtype} {image.shape}; expected uint8 [h, w, 3].")
  n = len(instances.labels)
  expected = {"boxes": (n, 4), "scores": (n,), "masks": (n, *image.shape[:2])}
  for name, shape in expected.items():
    value = getattr(instances, name)
    if value is not None and np.shape(value) != shape:
      raise ValueError(f"{name} is {np.shape(value)}; expected {shape} for {n} labels.")


def _draw(
  image: np.ndarray,
  instances: Instances,
  class_names: Sequence[str] | None,
  size: tuple[int, int],
) -> Image.Image:
  """Draws at the size (width, height) of the result, so that lines and text are sharp."""
  _check(image, instances)
  scale = np.array([size[0] / image.shape[1], size[1] / image.shape[0]] * 2)
  resampling = Image.Resampling.BICUBIC if scale[0] > 1 else Image.Resampling.LANCZOS
  canvas = Image.fromarray(image).resize(size, resampling)
  boxes = np.asarray(instances.boxes, np.float64).reshape(-1, 4) * scale
  line = max(2, round(max(size) / 400))
  # Large ones first, so that small ones on top of them stay visible.
  areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
  order = np.argsort(-areas, kind="stable")
  colors = [class_color(int(label)) for label in instances.labels]
  if instances.masks is not None:
    for i in order:
      _draw_mask(canvas, instances.masks[i], colors[i], line)
  draw = ImageDraw.Draw(canvas)
  for i in order:
    x1, y1, x2, y2 = _pixel_box(boxes[i], size)
    draw.rectangle((x1, y1, x2, y2), outline=colors[i], width=line)
  _draw_labels(draw, boxes, instances, colors, class_names, size)
  return canvas


def _pixel_box(box: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
  """First and last pixel of a box, at least one pixel, inside the image."""
  x1, y1 = (int(np.clip(round(v), 0, s - 1)) for v, s in zip(box[:2], size))
  x2, y2 = (int(np.clip(round(v) - 1, 0, s - 1)) for v, s in zip(box[2:], size))
  return x1, y1, max(x1, x2), max(y1, y2)


def _draw_mask(canvas: Image.Image, mask: np.ndarray, color: tuple[int, int, int], line: int):
  """Fills a mask translucently, with a smooth outline."""
  soft = Image.fromarray(np.asarray(mask, np.uint8) * 255)
  soft = soft.resize(canvas.size, Image.Resampling.BILINEAR)
  region = soft.getbbox()
  if region is None:
    return
  region = (
      max(region[0] - 2 * line, 0), max(region[1] - 2 * line, 0),
      min(region[2] + 2 * line, soft.width), min(region[3] + 2 * line, soft.height),
  )  # fmt: skip
  part = soft.crop(region).point(lambda v: 255 if v >= 128 else 0)
  level = np.asarray(part.filter(ImageFilter.GaussianBlur(line / 2)), np.float32) / 255
  # A blurred step crosses 1/2 on the outline; near it, opacity falls off within the line's width.
  outline = np.clip(1.7 * (1 - np.abs(2 * level - 1)), 0, 1)
  opacity = np.maximum(0.38 * level, 0.95 * outline)[..., None]
  pixels = np.asarray(canvas.crop(region), np.float32)
  pixels = pixels + (np.array(color, np.float32) - pixels) * opacity
  canvas.paste(Image.fromarray(np.round(pixels).astype(np.uint8)), region[:2])


def _draw_labels(draw, boxes, instances, colors, class_names, size) -> None:
  """Puts a tag at each box: above it if there is room, else at the nearest free position.

  A tag that would cover more than a third of itself with others is left out: its box has the colour
  of the class, and two texts on top of each other cannot be read.
  """
  crowded = 0.85 if len(boxes) > 12 else 1.0
  font = get_font(int(np.clip(round(crowded * max(size) / 50), 11, 30)))
  pad = max(2, font.size // 5)
  height = sum(font.getmetrics()) + pad
  scores = instances.scores
  placed = np.zeros((0, 4))
  # The most confident ones (the largest, for the truth) are placed first.
  priority = scores if scores is not None else np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
  for i in np.argsort(-np.asarray(priority), kind="stable"):
    label = int(instances.labels[i])
    text = class_names[label] if class_names is not None else str(label)
    text += f" {scores[i]:.2f}" if scores is not None else ""
    width = font.getlength(text) + 2 * pad
    x1, y1, x2, y2 = boxes[i]
    right = x2 - width
    corners = np.array([
        (x1, y1 - height), (x1, y1), (right, y1 - height), (x1, y2), (x1, y2 - height), (right, y1),
        (right, y2), (right, y2 - height), (x2, y1), (x1 - width, y1), (x2, y2 - height),
        (x1 - width, y2 - height), (x1, y1 - 2 * height), (x1, y2 + height), (x1, y1 - 3 * height),
    ])  # fmt: skip
    corners = np.clip(corners, 0, (max(size[0] - width, 0), max(size[1] - height, 0)))
    tags = np.concatenate([corners, corners + (width, height)], axis=1)
    low = np.maximum(tags[:, None, :2], placed[None, :, :2])
    high = np.minimum(tags[:, None, 2:], placed[None, :, 2:])
    hidden = np.prod(np.clip(high - low, 0, None), axis=2).sum(axis=1)
    if hidden.min() > width * height / 3:
      continue
    tag = tags[np.argmin(hidden)]
    placed = np.concatenate([placed, tag[None]])
    dark = np.dot(colors[i], (0.299, 0.587, 0.114)) < 150
    draw.rounded_rectangle(tuple(tag - (0, 0, 1, 1)), radius=pad, fill=colors[i])
    draw.text((tag[0] + pad, tag[1] + pad / 2), text, font=font, fill="white" if dark else INK)


def draw_comparisons(
  examples: Sequence[Comparison],
  class_names: Sequence[str] | None = None,
  *,
  panel_size: int = 480,
  pairs_per_row: int | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
  """A sheet of images, each twice: prediction on the left, truth on the right.

  Args:
    examples: what to show, in reading order.
    class_names: as for `draw_detections`.
    panel_size: long side of each picture in pixels of the sheet.
    pairs_per_row: default: 1 for up to three examples, else 2.
  """
  if not examples:
    raise ValueError("There is no example to draw.")
  columns = pairs_per_row or (1 if len(examples) <= 3 else 2)
  margin, gap, head = 24, 8, 52
  title_font, font = get_font(17, bold=True), get_font(14)
  pairs = []
  for example in examples:
    factor = panel_size / max(example.image.shape[:2])
    size = tuple(max(1, round(side * factor)) for side in example.image.shape[1::-1])
    sides = (example.prediction, example.truth)
    pairs.append([_draw(example.image, side, class_names, size) for side in sides])
  rows = [pairs[i : i + columns] for i in range(0, len(pairs), columns)]
  heights = [head + max(pair[0].height for pair in row) + margin for row in rows]
  widths = [
    max(pair[0].width + gap + pair[1].width for pair in pairs[column::columns]) + margin
    for column in range(min(columns, len(pairs)))
  ]
  sheet = Image.new("RGB", (sum(widths) + margin, sum(heights) + margin), "white")
  draw = ImageDraw.Draw(sheet)
  for i, (example, pair) in enumerate(zip(examples, pairs)):
    row, column = divmod(i, columns)
    left, top = margin + sum(widths[:column]), margin + sum(heights[:row])
    draw.text((left, top), example.title, font=title_font, fill=INK)
    counts = (
      f"Prediction · {_count(len(example.prediction.labels), 'detection')}",
      f"Ground truth · {_count(len(example.truth.labels), 'object')}",
    )
    for picture, text in zip(pair, counts):
      draw.text((left, top + 27), text, font=font, fill=GRAY)
      sheet.paste(picture, (left, top + head))
      left += picture.width + gap
  return np.asarray(sheet)


def stack_rows(rows: Sequence[Image.Image], *, margin: int) -> UInt8[np.ndarray, "h w 3"]:
  """A white sheet of pictures below each other, `margin` pixels from its left and right edge."""
  size = max(row.width for row in rows) + 2 * margin, sum(row.height for row in rows) + margin
  sheet = Image.new("RGB", size, "white")
  top = margin // 2
  for row in rows:
    sheet.paste(row, (margin, top))
    top += row.height
  return np.asarray(sheet)


def _count(n: int, noun: str) -> str:
  return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def save_png(image: UInt8[np.ndarray, "h w 3"], path: str | os.PathLike[str]) -> None:
  """Writes a picture."""
  with atomic.open_aside(path) as file:
    Image.fromarray(image).save(file, format="PNG", optimize=True)
