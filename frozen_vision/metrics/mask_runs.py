"""Predicted masks as COCO's run lengths, without ever filling an image.

All masks of an image are pasted and encoded together. Only the region of each box is computed, column after
column with a zero behind each, so that one comparison of neighbours finds where the runs of all masks begin
and end.
"""

from collections.abc import Iterator, Sequence
import dataclasses
from typing import Any

from jaxtyping import Float, Float32, Int64, Num
import numpy as np

from frozen_vision.data.detection import mask_encoding
from frozen_vision.ops import masks as mask_ops

_MAX_PIXELS = 2**22  # pasted at a time, a byte each
# Multiplications of a matrix product. Larger ones leave the processor's caches, and OpenBLAS starts threads
# for them, which took ten times as long as the product where the cores had other work.
_MAX_PRODUCT = 2**18


def encode_masks(
  probabilities: Float[np.ndarray, "k m m"],
  boxes: Num[np.ndarray, "k 4"],
  height: int,
  width: int,
  threshold: float = 0.5,
) -> list[dict[str, Any]]:
  """Pastes masks that fill boxes into an image (`ops.masks.paste_mask`) and encodes them.

  Args:
    probabilities: each at a regular grid inside its box.
    boxes: xyxy in pixels of the image; they may reach beyond it.
    height: of the image in pixels.
    width: of the image in pixels.
    threshold: lowest probability that counts as object.

  Returns:
    COCO's compressed RLE of each, `{"size": [height, width], "counts": str}`: what pycocotools makes of the
    pasted mask. A box without area, outside of the image or not finite gives an empty mask.
  """
  probabilities = np.asarray(probabilities, np.float32)
  counts: list[str] = []
  for part in _parts(_regions(boxes, height, width)):
    edges, lengths = _edges(probabilities[len(counts) : len(counts) + len(part)], part, threshold)
    counts += mask_encoding.compressed_counts(*_runs(edges, lengths, height * width))
  return [{"size": [height, width], "counts": text} for text in counts]


@dataclasses.dataclass(frozen=True)
class _Regions:
  """Where in an image the masks of k boxes may have pixels.

  Attributes:
    height: of the image.
    low: first column and row of each region.
    size: columns and rows; zeros where a mask has no pixel.
    boxes: xyxy relative to `low`.
  """

  height: int
  low: Int64[np.ndarray, "k 2"]
  size: Int64[np.ndarray, "k 2"]
  boxes: Float32[np.ndarray, "k 4"]

  def __len__(self) -> int:
    return len(self.boxes)

  def __getitem__(self, part: slice) -> "_Regions":
    return _Regions(self.height, self.low[part], self.size[part], self.boxes[part])


def _regions(boxes: Num[np.ndarray, "k 4"], height: int, width: int) -> _Regions:
  boxes = np.asarray(boxes, np.float64)
  usable = np.isfinite(boxes).all(axis=1)
  boxes = np.where(usable[:, None], boxes, 0.0)
  # One pixel more: with a threshold below 1/2 a mask reaches half a cell beyond its box.
  limits = np.array([width, height])
  low = np.clip(np.floor(boxes[:, :2]) - 1, 0, limits)
  high = np.clip(np.ceil(boxes[:, 2:]) + 1, 0, limits)
  relative = (boxes - np.tile(low, 2)).astype(np.float32)
  usable &= (relative[:, 2:] > relative[:, :2]).all(axis=1) & (high > low).all(axis=1)
  size = np.where(usable[:, None], high - low, 0)
  return _Regions(height, low.astype(np.int64), size.astype(np.int64), relative)


def _parts(regions: _Regions) -> Iterator[_Regions]:
  """Consecutive regions that are small enough together, or one that is not."""
  first, pixels = 0, 0
  for i, area in enumerate(np.prod(regions.size + (0, 1), axis=1).tolist()):
    if i > first and pixels + area > _MAX_PIXELS:
      yield regions[first:i]
      first, pixels = i, 0
    pixels += area
  if first < len(regions):
    yield regions[first:]


def _edges(
  probabilities: Float[np.ndarray, "k m m"], regions: _Regions, threshold: float
) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "k"]]:
  """Positions in the image, column by column, at which the runs of mask after mask begin and end in turn.

  Also says how many of them each mask has.
  """
  columns, rows = regions.size.T
  column_weights = _weights(columns, regions.boxes[:, 0], regions.boxes[:, 2], probabilities.shape[2])
  row_weights = _weights(rows, regions.boxes[:, 1], regions.boxes[:, 3], probabilities.shape[1])
  ends = np.cumsum(columns * (rows + 1))
  pasted = np.zeros(1 + (ends[-1] if len(ends) else 0), bool)  # begins with a zero too
  least = np.float32(threshold)
  start = 1
  for i, (w, h, end) in enumerate(zip(columns.tolist(), rows.tolist(), (ends + 1).tolist(), strict=True)):
    if w:
      region = pasted[start:end].reshape(w, h + 1)[:, :h]
      by_row = (row_weights[i] @ probabilities[i]).T
      step = max(1, _MAX_PRODUCT // by_row.size)
      for first in range(0, w, step):
        values = column_weights[i][first : first + step] @ by_row
        np.greater_equal(values, least, out=region[first : first + step])
    start = end
  changes = np.flatnonzero(pasted[1:] != pasted[:-1])
  lengths = np.diff(np.searchsorted(changes, ends), prepend=0)
  mask = np.repeat(np.arange(len(ends)), lengths)
  column, row = np.divmod(changes - (ends - columns * (rows + 1))[mask], rows[mask] + 1)
  edges = (regions.low[mask, 0] + column) * regions.height + regions.low[mask, 1] + row
  # A run over the image's lower border goes on at the top of the next column.
  joined = np.flatnonzero((edges[1:-1:2] == edges[2::2]) & (mask[1:-1:2] == mask[2::2]))
  if len(joined):
    removed = np.concatenate([2 * joined + 1, 2 * joined + 2])
    edges = np.delete(edges, removed)
    lengths = np.bincount(np.delete(mask, removed), minlength=len(ends))
  return edges, lengths


def _weights(
  pixels: Int64[np.ndarray, "k"], low: Float[np.ndarray, "k"], high: Float[np.ndarray, "k"], cells: int
) -> Sequence[Float[np.ndarray, "_pixels cells"]]:
  """The linear weights of each mask's cells at its pixels."""
  ends = np.cumsum(pixels)
  position = np.arange(pixels.sum()) - np.repeat(ends - pixels, pixels)
  weights = mask_ops.paste_weights(position, np.repeat(low, pixels), np.repeat(high, pixels), cells)
  return np.split(weights, ends[:-1])


def _runs(
  edges: Int64[np.ndarray, "n"], lengths: Int64[np.ndarray, "k"], pixels: int
) -> tuple[Int64[np.ndarray, "n2"], Int64[np.ndarray, "k"]]:
  """Run lengths of mask after mask, from the positions at which runs begin and end, and how many each has."""
  ends = np.cumsum(lengths)
  # Around the edges of each mask: the first and the last position of the image.
  marks = np.insert(edges, np.stack([ends - lengths, ends], axis=1).ravel(), np.tile([0, pixels], len(ends)))
  first = ends - lengths + 2 * np.arange(len(ends))
  runs = np.delete(np.diff(marks), first[1:] - 1)
  counts = lengths + 1
  # A mask that ends in the last pixel: no run follows it.
  last = np.cumsum(counts) - 1
  nothing = (runs[last] == 0) & (counts > 1)
  return np.delete(runs, last[nothing]), counts - nothing
