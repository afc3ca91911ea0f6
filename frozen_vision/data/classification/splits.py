"""Which labelled examples are held out for validation."""

from jaxtyping import Int
import numpy as np


def split(
  labels: Int[np.ndarray, "n"], *, fraction: float = 0.2, seed: int = 0
) -> tuple[Int[np.ndarray, "t"], Int[np.ndarray, "v"]]:
  """Positions of training and of validation examples: a random fraction is held out.

  A class of which nothing would be left to train on gets one of its examples back.

  Raises:
    ValueError: nothing would be held out.
  """
  order = np.random.default_rng(seed).permutation(len(labels))
  count = int(fraction * len(labels))
  held, kept = order[:count], order[count:]
  missing = np.setdiff1d(labels, labels[kept])
  back = [int(np.flatnonzero(labels[held] == label)[0]) for label in missing]
  if len(held) == len(back):
    raise ValueError(
      f"{fraction:g} of {len(labels):,} training images leaves none to validate on, once every class has one "
      "to train on; expected more images, a larger fraction, or a part for validation."
    )
  return np.sort(np.append(kept, held[back])), np.sort(np.delete(held, back))
