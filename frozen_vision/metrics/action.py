"""Top-k and mean class accuracy, and the confusion matrix, counted over all processes."""

from collections.abc import Mapping, Sequence
import logging

from jaxtyping import Int
import numpy as np

from frozen_vision.metrics import accuracy, gather

_logger = logging.getLogger(__name__)


class ActionEvaluator:
  """Counts which class was predicted for which; examples that could not be read are counted apart.

  Attributes:
    classes: their names.
    confusion: [true, predicted] of this process's examples.
  """

  def __init__(self, classes: Sequence[str], top_k: Sequence[int] = (1, 5)):
    self.classes = list(classes)
    self._accuracy = accuracy.AccuracyEvaluator(top_k)
    self.confusion: Int[np.ndarray, "c c"] = np.zeros((len(self.classes),) * 2, np.int64)
    self._unreadable = 0
    self._predictions: list[tuple[int, int, int]] = []

  def update(self, predictions: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> None:
    """Adds one batch.

    Args:
      predictions: `probabilities` [b, c].
      batch: `label` [b]; `index` [b] in the data, and `example_valid` and `readable` [b] bool where present.

    Raises:
      ValueError: as `AccuracyEvaluator.update`.
    """
    probabilities, labels = np.asarray(predictions["probabilities"]), np.asarray(batch["label"])
    valid = np.asarray(batch.get("example_valid", np.ones(len(labels))), bool)
    readable = np.asarray(batch.get("readable", np.ones(len(labels))), bool)
    self._unreadable += int(np.sum(valid & ~readable))
    valid = valid & readable
    self._accuracy.update({"logits": probabilities}, {"label": labels, "example_valid": valid})
    predicted = probabilities[valid].argmax(1)
    np.add.at(self.confusion, (labels[valid], predicted), 1)
    if "index" in batch:
      rows = (np.asarray(batch["index"])[valid], labels[valid], predicted)
      self._predictions += zip(*(row.tolist() for row in rows))

  def predictions(self) -> list[tuple[int, int, int]]:
    """(index, true class, predicted class) of every video that could be read, over all processes, in order.

    Empty where batches have no `index`. Every process must call it.
    """
    parts = gather.gather_objects(self._predictions)
    return sorted(tuple(row) for part in parts for row in part)

  def total(self) -> Int[np.ndarray, "c c"]:
    """The confusion matrix over all processes; every process must call it."""
    return np.sum([np.array(part) for part in gather.gather_objects(self.confusion.tolist())], axis=0)

  def result(self) -> dict[str, float]:
    """`top1`, `top5`, `mean_class_accuracy` in 0..1, and `unreadable` where there are such videos.

    The mean is over classes that have examples. Every process must call it.
    """
    metrics = self._accuracy.result()
    confusion = self.total()
    unreadable = sum(gather.gather_objects(self._unreadable))
    if metrics:
      counts = confusion.sum(axis=1)
      present = counts > 0
      metrics["mean_class_accuracy"] = float(np.mean(np.diag(confusion)[present] / counts[present]))
    if unreadable:
      _logger.warning("%d videos could not be read and are not counted.", unreadable)
      metrics["unreadable"] = float(unreadable)
    return metrics
