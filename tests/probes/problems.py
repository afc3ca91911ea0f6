"""Small classification problems, generated alike in tests and in `tests/references/probes.py`."""

from typing import NamedTuple

import numpy as np

from tests import golden_values

SHAPES = {"wide": (60, 90), "tall": (150, 12)}  # examples, dimensions
CLASSES = 4


class Problem(NamedTuple):
  """Features that some directions of tell the classes apart, on top of a mean and of very unequal scales.

  Attributes:
    features, labels, truth: to fit; `truth` has several classes for an example, or none.
    queries, answers: to test.
  """

  features: np.ndarray
  labels: np.ndarray
  truth: np.ndarray
  queries: np.ndarray
  answers: np.ndarray


def make(shape: str) -> Problem:
  """The problem of a name in `SHAPES`."""
  count, size = SHAPES[shape]
  total = count + 40
  labels = np.arange(total) * 7 % CLASSES
  centres = golden_values.values(1, f"{shape}.centres", (CLASSES, size))
  noise = golden_values.values(1, f"{shape}.noise", (total, size), scale=1.5)
  scales = np.logspace(1, -2, size).astype(np.float32)
  features = (centres[labels] + noise) * scales + np.float32(3)
  truth = (features[:, :CLASSES] - 3) / scales[:CLASSES] + golden_values.values(
    1, shape, (total, CLASSES)
  ) > 0.5
  return Problem(features[:count], labels[:count], truth[:count], features[count:], labels[count:])


def rankings() -> list[tuple[np.ndarray, np.ndarray]]:
  """(scores, truth) of some classes; scores of few values are often equal."""
  found = []
  for index in range(6):
    scores = golden_values.values(2, f"scores.{index}", 80)
    noise = golden_values.values(2, f"noise.{index}", 80)
    found.append((np.round(scores, index % 3), scores + 2 * noise > 1))
  return found
