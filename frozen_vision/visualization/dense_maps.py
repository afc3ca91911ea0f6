"""Pictures of surface normals and depth: the image, and each map as predicted beside the truth."""

from collections.abc import Mapping, Sequence
import dataclasses

from jaxtyping import Float, UInt8
import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from frozen_vision.visualization import instances

_UNKNOWN = (46, 47, 51)
_MARGIN, _GAP, _HEAD = 24, 8, 52


@dataclasses.dataclass(frozen=True)
class DenseComparison:
  """One image with its predicted and its true maps.

  Attributes:
    image: RGB.
    predicted: `normals` [h, w, 3], `depth` [h, w] in metres; None or absent where not predicted.
    true: the same, zeros where unknown; empty where the truth is not known.
  """

  image: UInt8[np.ndarray, "h w 3"]
  predicted: Mapping[str, np.ndarray | None]
  true: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  title: str = ""


def normal_colours(normals: Float[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
  """x, y, z from -1..1 as red, green, blue from 0..255; a wall seen straight on is light blue."""
  return np.clip((normals + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)


def depth_colours(
  depth: Float[np.ndarray, "h w"], nearest: float, farthest: float
) -> UInt8[np.ndarray, "h w 3"]:
  """Depth on a logarithmic scale from light (`nearest`) to dark (`farthest`); dark gray where it is 0."""
  low, high = np.log(max(nearest, 1e-3)), np.log(max(farthest, nearest + 1e-3, 2e-3))
  place = (np.log(np.maximum(depth, 1e-3)) - low) / (high - low)
  colours = matplotlib.colormaps["magma_r"](np.clip(place, 0, 1))[..., :3]
  drawn = (colours * 255 + 0.5).astype(np.uint8)
  drawn[depth <= 0] = _UNKNOWN
  return drawn


def draw_dense_comparisons(
  examples: Sequence[DenseComparison], *, panel_size: int = 320
) -> UInt8[np.ndarray, "h w 3"]:
  """A sheet with a row for every image: the image, then every map as predicted and as it is.

  Args:
    examples: what to show, from top to bottom.
    panel_size: long side of each picture in pixels of the sheet.
  """
  if not examples:
    raise ValueError("There is no example to draw.")
  return instances.stack_rows([_row(example, panel_size) for example in examples], margin=_MARGIN)


def _row(example: DenseComparison, panel_size: int) -> Image.Image:
  factor = panel_size / max(example.image.shape[:2])
  width, height = (max(1, round(side * factor)) for side in example.image.shape[1::-1])
  panels = [("Image", example.image), *_panels(example)]
  row = Image.new("RGB", (len(panels) * (width + _GAP) - _GAP, _HEAD + height + 10), "white")
  draw = ImageDraw.Draw(row)
  font, title_font = instances.get_font(14), instances.get_font(17, bold=True)
  draw.text((0, 0), example.title, font=title_font, fill=instances.INK)
  for i, (name, pixels) in enumerate(panels):
    left = i * (width + _GAP)
    draw.text((left, 27), name, font=font, fill=instances.GRAY)
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    row.paste(resized, (left, _HEAD))
  return row


def _panels(example: DenseComparison) -> list[tuple[str, UInt8[np.ndarray, "h w 3"]]]:
  """(title, picture) of every map."""
  panels = []
  normals, depth = example.predicted.get("normals"), example.predicted.get("depth")
  if normals is not None:
    panels.append(("Normals, predicted", normal_colours(normals)))
    if "normals" in example.true:
      true = example.true["normals"]
      drawn = normal_colours(true)
      drawn[~np.any(true != 0, axis=-1)] = _UNKNOWN
      panels.append(("Normals, true", drawn))
  if depth is not None:
    true = example.true.get("depth")
    known = depth if true is None or not np.any(true > 0) else true[true > 0]
    limits = float(known.min()), float(known.max())
    scale = f"{limits[0]:.1f} to {limits[1]:.1f} m"
    panels.append((f"Depth, predicted ({scale})", depth_colours(depth, *limits)))
    if true is not None:
      panels.append((f"Depth, true ({scale})", depth_colours(true, *limits)))
  return panels
