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


def compressed_counts(runs: Int64[np.ndarray, "n"], lengths: Int64[np.ndarray, "k"]) -> list[str]:
  """The compressed `counts` of k masks at once; the inverse of `rle_counts`, and what pycocotools writes.

  Args:
    runs: run lengths of mask after mask.
    lengths: how many runs each mask has, at least one.
  """
  ends = np.cumsum(lengths)
  place = np.arange(len(runs)) - np.repeat(ends - lengths, lengths)
  rest = runs.copy()
  differing = np.flatnonzero(place > 2)
  rest[differing] -= runs[differing - 2]
  digits, used = [], []
  more = np.ones(len(runs), bool)
  while more.any():
    digit = rest & 31
    rest >>= 5
    used.append(more)
    more = more & (rest != np.where(digit & 16, -1, 0))
    digits.append(digit + 48 + 32 * more)
  if not digits:
    return []
  used = np.stack(used, axis=1)
  text = np.stack(digits, axis=1)[used].astype(np.uint8).tobytes().decode("ascii")
  last = np.cumsum(used.sum(axis=1))[ends - 1].tolist()
  return [text[first:end] for first, end in zip([0, *last], last)]


def to_rle(segmentation: list[list[float]] | dict[str, Any], height: int, width: int) -> dict[str, Any]:
  """Compressed RLE of a list of polygons, which are united, or of an RLE as it is."""
  if isinstance(segmentation, dict):
    return segmentation
  return mask_utils.merge(mask_utils.frPyObjects(segmentation, height, width))
