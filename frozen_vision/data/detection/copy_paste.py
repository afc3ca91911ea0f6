"""Simple copy-paste (Ghiasi et al. 2021): objects of one training example on top of another."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

from jaxtyping import Bool, Int, UInt8
import numpy as np

from frozen_vision.data import batch_iterator, batches

Example = batches.DetectionTrainBatch


@dataclasses.dataclass(frozen=True)
class CopyPasteTrain:
  """Applies a training transform, then pastes objects of another image onto some of the examples.

  Which examples, which other image and which of its objects come from the example's own generator. So they
  too are a pure function of (seed, global example index): workers and restarts change nothing.

  Attributes:
    transform: makes an example of a record, as `transforms.DetectionTrain` does; it serves both images.
    source: where the other image comes from, every record equally likely.
    probability: of taking another image; how many of its objects are pasted, none included, is a second draw.
    max_pasted: of `copy_paste`.
  """

  transform: Callable[[Any, np.random.Generator], Example]
  source: batch_iterator.Source
  probability: float
  max_pasted: int = 100

  @property
  def padded_keys(self) -> tuple[str, ...]:
    """As the transform's: objects move up where others vanish, and rows behind them are zeros."""
    return getattr(self.transform, "padded_keys", ())

  def __call__(self, record: Any, rng: np.random.Generator) -> Example:
    """The transform's example, perhaps with objects of another one."""
    example = self.transform(record, rng)
    if rng.random() >= self.probability:
      return example
    position = int(rng.integers(len(self.source)))
    try:
      other = self.transform(self.source[position], rng)
    except Exception as error:
      error.add_note(f"While preparing record {position} of the data source, to paste from.")
      raise
    return copy_paste(example, other, rng, max_pasted=self.max_pasted)


def copy_paste(
  target: Example,
  source: Example,
  rng: np.random.Generator,
  *,
  max_pasted: int = 100,
  box_tolerance: float = 10.0,
  min_visible_area: int = 300,
) -> Example:
  """Pastes a random choice of the source's objects, as cut out by their masks, without blending.

  Both examples have masks, their own scale jitter and flip, and one frame. The rules for what is hidden, and
  the defaults, are those of mmdet 3.3's CopyPaste. Different from there: objects are cut at the border of the
  target's content, so that the padding stays padding, and no more are pasted than the target has free rows.

  Args:
    target, source: neither is changed. With `semantic` in both, pasted pixels take the source's labels.
    rng: chooses how many, uniformly from none to all, and which.
    max_pasted: fewer than this many are pasted.
    box_tolerance: an object of the target that is partly hidden stays if no side of its box moves
      by more pixels than this,
    min_visible_area: or if more pixels than this are visible.

  Returns:
    The target with the pasted objects in the rows after its own; other keys as they were. Boxes of
    objects that were partly hidden or cut are those of what is visible.

  Raises:
    ValueError: examples of different frames or numbers of rows.
  """
  for key in ("image", "masks"):
    if target[key].shape != source[key].shape:
      raise ValueError(
        f"copy_paste: {key} is {target[key].shape} in the target and {source[key].shape} in the"
        " source; use one frame and one max_objects for both."
      )
  rows = len(target["valid"])
  free = rows - int(np.count_nonzero(target["valid"]))
  chosen, pasted = _choose(target, source, rng, min(max_pasted - 1, free))
  result = {key: np.array(value) for key, value in target.items()}
  if not len(chosen):
    return result
  covered = np.bitwise_or.reduce(pasted, axis=0)
  _paint(result, source, covered)
  objects = _visible_objects(target, covered, box_tolerance, min_visible_area)
  objects += _pasted_objects(source, chosen, pasted)
  for key, values in zip(("boxes", "labels", "masks"), zip(*objects)):
    result[key][:] = 0
    result[key][: len(values)] = values
  result["valid"] = np.arange(rows) < len(objects)
  return result


# (box, label, packed mask) of an object.
_Object = tuple[np.ndarray, np.integer, UInt8[np.ndarray, "h w_bytes"]]


def _choose(
  target: Example, source: Example, rng: np.random.Generator, most: int
) -> tuple[Int[np.ndarray, "k"], UInt8[np.ndarray, "k h w_bytes"]]:
  """Rows of the source's objects to paste, and their masks inside the target's content."""
  height, width = target["image_size"]
  content = np.zeros(target["image"].shape[:2], bool)
  content[:height, :width] = True
  masks = source["masks"] & np.packbits(content, axis=-1)
  inside = np.flatnonzero(source["valid"] & masks.any(axis=(1, 2)))
  count = rng.integers(0, max(min(most, len(inside)), 0) + 1)
  chosen = np.sort(rng.choice(inside, size=count, replace=False))
  return chosen, masks[chosen]


def _paint(result: Example, source: Example, covered: UInt8[np.ndarray, "h w_bytes"]) -> None:
  """Copies the covered pixels of the source's image and semantic labels, in place."""
  pixels: Bool[np.ndarray, "h w"] = np.unpackbits(covered, axis=-1, count=result["image"].shape[1]).astype(
    bool
  )
  result["image"][pixels] = source["image"][pixels]
  if "semantic" in result:
    # Strides are powers of two, and the map's sides are rounded up.
    stride = 2 ** math.ceil(math.log2(pixels.shape[0] / result["semantic"].shape[0]))
    under = pixels[::stride, ::stride]
    result["semantic"][under] = source["semantic"][under]


def _visible_objects(
  target: Example, covered: UInt8[np.ndarray, "h w_bytes"], box_tolerance: float, min_visible_area: int
) -> list[_Object]:
  """The target's objects that enough is left of, with the boxes and masks of what is visible."""
  objects = []
  for row in np.flatnonzero(target["valid"]):
    box, mask = target["boxes"][row], target["masks"][row]
    visible = mask & ~covered
    if not np.array_equal(visible, mask):
      area = int(np.bitwise_count(visible).sum())
      if area == 0:
        continue
      visible_box = tight_box(visible)
      if np.abs(visible_box - box).max() > box_tolerance and area <= min_visible_area:
        continue
      box = visible_box
    objects.append((box, target["labels"][row], visible))
  return objects


def _pasted_objects(
  source: Example, chosen: Int[np.ndarray, "k"], pasted: UInt8[np.ndarray, "k h w_bytes"]
) -> list[_Object]:
  """The chosen objects of the source; those that were cut have the box of what is left."""
  objects = []
  for row, mask in zip(chosen, pasted, strict=True):
    cut = not np.array_equal(mask, source["masks"][row])
    objects.append((tight_box(mask) if cut else source["boxes"][row], source["labels"][row], mask))
  return objects


def tight_box(mask: np.ndarray) -> np.ndarray:
  """float32 xyxy of the smallest box around the set bits of a packed mask [H, ceil(W/8)]."""
  rows = np.flatnonzero(mask.any(axis=1))
  columns = np.flatnonzero(np.unpackbits(np.bitwise_or.reduce(mask, axis=0)))
  return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)
