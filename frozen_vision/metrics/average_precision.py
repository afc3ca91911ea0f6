"""Average precision at eleven points of recall, by which PASCAL VOC 2007 ranks classifiers."""

from collections.abc import Mapping

from jaxtyping import Bool, Float
import numpy as np

from frozen_vision.metrics import accuracy, gather


def eleven_point(
  scores: Float[np.ndarray, "n"], truth: Bool[np.ndarray, "n"], *, from_one: bool = False
) -> float:
  """Mean over recall 0, 0.1, ..., 1 of the highest precision at that recall or more.

  Examples of equal scores pass the threshold together, so their order does not matter. Whether recall has
  reached a point is decided in integers.

  Args:
    scores: higher where the class is more likely.
    truth: which examples have the class.
    from_one: adds the point of recall 0 and precision 1, with which scikit-learn's curve begins, as the code
      of "How Well Do Self-Supervised Models Transfer?" does. VOC's own does not: there, precision at recall 0
      is the highest of all.

  Returns:
    The average precision, in 0..1.

  Raises:
    ValueError: no example has the class.
    DivergedError: scores that are NaN.
  """
  positives = int(np.sum(truth))
  if not positives:
    raise ValueError("No example has the class, so there is no recall; expected at least one.")
  if np.isnan(scores).any():
    raise accuracy.DivergedError("The scores hold NaN; the classifier has diverged, or its input is broken.")
  order = np.argsort(-scores, kind="stable")
  hits = np.cumsum(truth[order])
  ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # the last of equal scores
  hits = hits[ends]
  precision = hits / (ends + 1)
  if from_one:
    hits, precision = np.append(hits, 0), np.append(precision, 1.0)
  return float(np.mean([np.max(precision[10 * hits >= point * positives]) for point in range(11)]))


def mean_eleven_point(
  scores: Float[np.ndarray, "n k"], truth: Bool[np.ndarray, "n k"], *, from_one: bool = False
) -> float:
  """Mean of `eleven_point` over classes."""
  return float(np.mean([eleven_point(s, t, from_one=from_one) for s, t in zip(scores.T, truth.T)]))


class ElevenPointEvaluator:
  """Collects the scores of all images and processes for `mean_eleven_point` with `from_one`."""

  def __init__(self):
    self._scores: list[np.ndarray] = []
    self._truth: list[np.ndarray] = []

  def update(self, predictions: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> None:
    """Adds a batch: `predictions["logits"]` [b, k] and `batch["label"]` [b, k], where `example_valid`."""
    valid = np.asarray(batch["example_valid"], bool)
    self._scores.append(np.asarray(predictions["logits"], np.float32)[valid])
    self._truth.append(np.asarray(batch["label"], bool)[valid])

  def result(self) -> dict[str, float]:
    """`{"map11": ...}` in 0..1 over the classes that occur; empty without one. Every process must call it."""
    states = gather.gather_objects([self._scores, self._truth])
    scores, truth = ([array for state in states for array in state[part]] for part in (0, 1))
    if not scores:
      return {}
    scores, truth = np.concatenate(scores), np.concatenate(truth)
    occurs = truth.any(axis=0)
    return (
      {"map11": mean_eleven_point(scores[:, occurs], truth[:, occurs], from_one=True)} if occurs.any() else {}
    )
