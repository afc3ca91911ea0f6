"""Top-k accuracy, counted exactly and over all processes."""

import collections
from collections.abc import Mapping, Sequence
import logging

from jaxtyping import Bool, Float, Int
import numpy as np

from frozen_vision.metrics import gather

_logger = logging.getLogger(__name__)


class DivergedError(ValueError, FloatingPointError):
  """Predictions that are no numbers: the model has diverged, or its input is broken."""


def label_ranks(logits: Float[np.ndarray, "b c"], labels: Int[np.ndarray, "b"]) -> Int[np.ndarray, "b"]:
  """How many classes stand before the true one when logits are sorted in descending order.

  Equal logits keep the order of the classes (as `argmax` does), so a network that gives the same
  number to every class is right for class 0 only, and not for all.
  """
  own = np.take_along_axis(logits, labels[:, None], axis=1)
  lower_index = np.arange(logits.shape[1]) < labels[:, None]
  return np.sum((logits > own) | ((logits == own) & lower_index), axis=1)


def top1(logits: Float[np.ndarray, "b c"], labels: Int[np.ndarray, "b"]) -> float:
  """Fraction of examples whose label has the largest logit, in 0..1."""
  return float(np.mean(label_ranks(logits, labels) < 1))


def mean_per_class(logits: Float[np.ndarray, "b c"], labels: Int[np.ndarray, "b"]) -> float:
  """`top1` of the examples of each class that occurs, averaged over these classes."""
  return float(
    np.mean([top1(logits[labels == label], labels[labels == label]) for label in np.unique(labels)])
  )


class AccuracyEvaluator:
  """Counts examples whose label is among the k largest logits.

  Attributes:
    top_k: the values of k. Where k is the number of classes or more, the accuracy is 1.
    per_class: whether top-1 averaged over the classes that occur is in the result, too.
  """

  def __init__(self, top_k: Sequence[int] = (1, 5), *, per_class: bool = False):
    if not top_k or min(top_k) < 1:
      raise ValueError(f"top_k holds {tuple(top_k)}; expected one or more positive integers.")
    self.top_k, self.per_class = tuple(top_k), per_class
    self.reset()

  def reset(self) -> None:
    """Forgets all examples."""
    self._correct = [0] * len(self.top_k)
    self._count = 0
    self._of_class: collections.Counter[tuple[int, bool]] = collections.Counter()

  def update(self, predictions: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> None:
    """Adds one batch.

    Args:
      predictions: `logits` [b, c] floats.
      batch: `label` [b] in 0..c-1 and, if padding is possible, `example_valid` [b] bool; rows where
        it is False are not looked at.

    Raises:
      ValueError: shapes that disagree, a label out of range.
      DivergedError: logits that are NaN.
    """
    logits: Float[np.ndarray, "b c"] = np.asarray(predictions["logits"])
    labels: Int[np.ndarray, "b"] = np.asarray(batch["label"])
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
      raise ValueError(f"logits {logits.shape} and label {labels.shape} disagree; expected [b, c] and [b].")
    valid: Bool[np.ndarray, "b"] = np.asarray(batch.get("example_valid", np.ones(len(labels))), bool)
    if valid.shape != labels.shape:
      raise ValueError(f"example_valid is {valid.shape}, label is {labels.shape}; expected [b].")
    logits, labels = logits[valid], labels[valid].astype(np.int64)
    if not labels.size:
      return
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
      raise ValueError(
        f"label holds {labels.min()}..{labels.max()}, but logits have {logits.shape[1]} classes; "
        "the head was built for another data set."
      )
    if np.isnan(logits).any():
      raise DivergedError("logits hold NaN; the model has diverged, or its input is broken.")
    ranks = label_ranks(logits, labels)
    self._correct = [n + int(np.sum(ranks < k)) for n, k in zip(self._correct, self.top_k)]
    self._count += len(labels)
    if self.per_class:
      self._of_class.update(zip(labels.tolist(), (ranks < 1).tolist()))

  def result(self) -> dict[str, float]:
    """Accuracy over all examples of all processes, `{"top1": ..., "top5": ...}`, in 0..1.

    With `mean_per_class` where that was asked for.

    Every process must call it. Without a single example the answer is `{}`, with a warning.
    """
    own = {"correct": self._correct, "count": self._count, "of_class": self._of_class}
    states = gather.gather_objects(own)
    count = sum(state["count"] for state in states)
    if not count:
      _logger.warning("No example was evaluated, so there is no accuracy.")
      return {}
    found = {
      f"top{k}": sum(state["correct"][i] for state in states) / count for i, k in enumerate(self.top_k)
    }
    if self.per_class:
      of_class = sum((state["of_class"] for state in states), collections.Counter())
      labels = {label for label, _ in of_class}
      rates = [of_class[label, True] / (of_class[label, True] + of_class[label, False]) for label in labels]
      found["mean_per_class"] = sum(rates) / len(rates)
    return found
