"""How well pixels are predicted: mean absolute error and the variance that predictions explain."""

from collections.abc import Mapping

import numpy as np

from frozen_vision.metrics import gather

# Sums over the predicted values of each image; what `ReconstructionEvaluator.update` takes.
SUMS = ("count", "absolute_error", "squared_error", "target", "squared_target")


class ReconstructionEvaluator:
  """Adds up errors over all images and processes."""

  def __init__(self):
    self._sums = dict.fromkeys(SUMS, 0.0)

  def update(self, predictions: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> None:
    """Adds a batch.

    Args:
      predictions: each of `SUMS` [b]: the number of predicted values of an image, and the sums of absolute
        and squared errors, of targets and of their squares.
      batch: `example_valid` [b]; other rows are left out.
    """
    valid = np.asarray(batch["example_valid"], bool)
    for name in SUMS:
      self._sums[name] += float(np.asarray(predictions[name], np.float64)[valid].sum())

  def result(self) -> dict[str, float]:
    """`l1`, and `r2`: 1 - squared error / variance of the targets; empty without a predicted value.

    Every process must call it.
    """
    states = gather.gather_objects(self._sums)
    total = {name: sum(state[name] for state in states) for name in SUMS}
    if not total["count"]:
      return {}
    variance = total["squared_target"] - total["target"] ** 2 / total["count"]
    result = {"l1": total["absolute_error"] / total["count"]}
    if variance > 0:
      result["r2"] = 1 - total["squared_error"] / variance
    return result
