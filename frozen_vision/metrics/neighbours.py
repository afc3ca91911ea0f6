"""Accuracy of nearest neighbours within one set: do images of one class lie together?"""

import base64
from collections.abc import Mapping

from jaxtyping import Float, Int
import numpy as np

from frozen_vision.metrics import gather

_CHUNK = 512  # queries that are compared at once


def leave_one_out(
  embeddings: Float[np.ndarray, "n d"],
  labels: Int[np.ndarray, "n"],
  *,
  k: int = 20,
  temperature: float = 0.07,
) -> float:
  """Fraction of examples whose class wins the vote of their k nearest neighbours, themselves left out.

  Votes are weighted as DINO weights them (arXiv 2104.14294): exp(cosine similarity / temperature). Of equal
  votes the class of the smaller label wins.

  Args:
    k: neighbours; fewer where there are fewer examples.

  Raises:
    ValueError: fewer than two examples.
  """
  if len(labels) < 2:
    raise ValueError(f"There are {len(labels)} examples; expected two or more.")
  k = min(k, len(labels) - 1)
  unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
  correct = 0
  for start in range(0, len(unit), _CHUNK):
    similarity = unit[start : start + _CHUNK] @ unit.T
    rows = np.arange(len(similarity))
    similarity[rows, start + rows] = -np.inf
    nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    weights = np.exp((np.take_along_axis(similarity, nearest, axis=1) - 1) / temperature)
    votes = np.zeros((len(rows), labels.max() + 1))
    np.add.at(votes, (rows[:, None], labels[nearest]), weights)
    correct += int(np.sum(votes.argmax(axis=1) == labels[start + rows]))
  return correct / len(labels)


class NeighbourEvaluator:
  """Collects embeddings and labels of all images and processes."""

  def __init__(self):
    self._embeddings: list[np.ndarray] = []
    self._labels: list[np.ndarray] = []

  def update(self, predictions: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> None:
    """Adds a batch: `predictions["embedding"]` [b, d] and `batch["label"]` [b], where `example_valid`."""
    valid = np.asarray(batch["example_valid"], bool)
    self._embeddings.append(np.asarray(predictions["embedding"], np.float32)[valid])
    self._labels.append(np.asarray(batch["label"], np.int32)[valid])

  def result(self) -> dict[str, float]:
    """`knn`, the accuracy of `leave_one_out` in 0..1; empty for fewer than two examples.

    Every process must call it.
    """
    embeddings = np.concatenate(self._embeddings) if self._embeddings else np.zeros((0, 1), np.float32)
    own = {
      "width": embeddings.shape[1],
      "embeddings": base64.b64encode(embeddings.tobytes()).decode(),
      "labels": np.concatenate(self._labels).tolist() if self._labels else [],
    }
    states = [state for state in gather.gather_objects(own) if state["labels"]]
    labels = np.array([label for state in states for label in state["labels"]], np.int64)
    if len(labels) < 2:
      return {}
    parts = [
      np.frombuffer(base64.b64decode(state["embeddings"]), np.float32).reshape(-1, state["width"])
      for state in states
    ]
    return {"knn": leave_one_out(np.concatenate(parts), labels)}
