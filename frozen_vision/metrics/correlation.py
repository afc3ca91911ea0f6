"""Correlation of scores on many tasks with one score of each model, such as ImageNet accuracy.

As section A.7 of "How Well Do Self-Supervised Models Transfer?" (arXiv 2011.13377): bounded scores on the
scale of their logits, errors with their sign turned.
"""

from typing import NamedTuple

from jaxtyping import Float
import numpy as np


class Correlation(NamedTuple):
  """Linear correlation, and that of ranks."""

  pearson: float
  spearman: float


def with_reference(
  scores: Float[np.ndarray, "models tasks"], reference: Float[np.ndarray, "models"]
) -> Correlation:
  """Correlation over models of the mean logit of their scores with the logit of a reference score.

  Args:
    scores: of each model on each task, fractions in (0, 1).
    reference: of each model, such as its ImageNet accuracy; likewise.

  Raises:
    ValueError: a score that is not between 0 and 1.
  """
  means, references = np.mean(logit(scores), axis=1), logit(reference)
  return Correlation(pearson(means, references), spearman(means, references))


def logit(fraction: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
  """log(p / (1 - p)), which spreads out differences near 0 and 1.

  Raises:
    ValueError: a value that is not between 0 and 1.
  """
  fraction = np.asarray(fraction, np.float64)
  if not np.all((fraction > 0) & (fraction < 1)):
    raise ValueError(
      f"The scores reach from {fraction.min()} to {fraction.max()}; expected fractions in (0, 1)."
    )
  return np.log(fraction) - np.log1p(-fraction)


def pearson(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> float:
  """The linear correlation of two columns; NaN if one is constant."""
  a, b = (np.asarray(column, np.float64) - np.mean(column) for column in (a, b))
  scale = np.sqrt(np.sum(a**2) * np.sum(b**2))
  return float(np.sum(a * b) / scale) if scale > 0 else float("nan")


def spearman(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> float:
  """The correlation of ranks; equal values share the mean of their ranks."""
  return pearson(_ranks(a), _ranks(b))


def _ranks(values: np.ndarray) -> np.ndarray:
  _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
  last = np.cumsum(counts)
  return (last - (counts - 1) / 2)[group]
