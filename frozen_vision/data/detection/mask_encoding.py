"""Masks as COCO writes them: lists of polygons and run lengths (RLE)."""

from typing import Any

from jaxtyping import Int64
import numpy as np
from pycocotools import mask as mask_utils


def rle_counts(counts: Any) -> Int64[np.ndarray, "n"] | None:
  """Run lengths of the `counts` of an RLE, a list or a compressed text; None where malformed.

  The compressed form is decoded here and not by pycocotools, whose decoder is C that trusts its
  input. Form (maskApi.c, rleToString): base 32 digits, low first, in bits 0-4 of (char - 48);
  bit 5 says that more follow; bit 4 of the last is the sign; from the fourth on, each run is
  stored as the difference to the one before the last.
  """
  if isinstance(counts, list):
    if not all(isinstance(count, int) and 0 <= count < 2**32 for count in counts):
      return None
    return np.asarray(counts, np.int64)
  if not isinstance(counts, str) or not counts or not counts.isascii():
    return None
  digits = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
  if digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
    return None
  last = np.flatnonzero((digits & 32) == 0)
  first = np.concatenate([[0], last[:-1] + 1])
  length = last - first + 1
  if length.max() > 7:  # 35 bits: more than any image has pixels
    return None
  place = np.arange(len(digits)) - np.repeat(first, length)
  runs = np.add.reduceat((digits & 31) << (5 * place), first)
  runs -= np.where(digits[last] & 16, 1 << (5 * length), 0)
  runs[1::2] = np.cumsum(runs[1::2])
  runs[2::2] = np.cumsum(runs[2::2])
  return runs if runs.min() >= 0 else None


def to_rle(segmentation: list[list[float]] | dict[str, Any], height: int, width: int) -> dict[str, Any]:
  """Compressed RLE of a list of polygons, which are united, or of an RLE as it is."""
  if isinstance(segmentation, dict):
    return segmentation
  return mask_utils.merge(mask_utils.frPyObjects(segmentation, height, width))
