"""Calibration of classifiers: the expected calibration error, and a temperature that mends it.

After Guo et al., "On Calibration of Modern Neural Networks" (arXiv 1706.04599). All in float64.
"""

import dataclasses

from jaxtyping import Float, Int
import numpy as np

BINS = 15
_LOW, _HIGH = 1e-3, 1e3  # bounds of the temperature


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Expected calibration errors, in 0..1.

  Attributes:
    ece: of the logits as they are.
    scaled_ece: of the logits over the temperature.
    temperature: that was fitted; the mean over folds where there are several.
  """

  ece: float
  scaled_ece: float
  temperature: float


def expected_calibration_error(
  probabilities: Float[np.ndarray, "n k"], labels: Int[np.ndarray, "n"], *, bins: int = BINS
) -> float:
  """Mean distance between confidence and accuracy over bins of confidence, weighted by their examples.

  The confidence is the largest probability. Bins have equal widths and include their lower ends; the last
  one includes 1 too.
  """
  confidence = np.max(probabilities, axis=1).astype(np.float64)
  right = np.argmax(probabilities, axis=1) == labels
  index = np.minimum(np.searchsorted(np.linspace(0, 1, bins + 1), confidence, side="right") - 1, bins - 1)
  gaps = np.bincount(index, confidence - right, minlength=bins)
  return float(np.sum(np.abs(gaps)) / len(labels))


def fit_temperature(logits: Float[np.ndarray, "n k"], labels: Int[np.ndarray, "n"]) -> float:
  """The number that logits are to be divided by for the least log loss.

  The loss is convex in its inverse, whose derivative is brought to zero by Newton's method between bounds.

  Args:
    logits, labels: of data that the classifier was not fitted on.

  Returns:
    The temperature, from 0.001, where every example is classified right, to 1000, where logits say nothing.
  """
  logits = np.asarray(logits, np.float64)
  logits = logits - np.max(logits, axis=1, keepdims=True)
  own = np.take_along_axis(logits, np.asarray(labels)[:, None], axis=1)[:, 0]

  def slope_and_bend(inverse: float) -> tuple[float, float]:
    weights = np.exp(inverse * logits)
    weights /= np.sum(weights, axis=1, keepdims=True)
    mean = np.sum(weights * logits, axis=1)
    return np.mean(mean - own), np.mean(np.sum(weights * (logits - mean[:, None]) ** 2, axis=1))

  low, high = 1 / _HIGH, 1 / _LOW
  if slope_and_bend(low)[0] >= 0:
    return _HIGH
  if slope_and_bend(high)[0] <= 0:
    return _LOW
  inverse = 1.0
  for _ in range(200):
    slope, bend = slope_and_bend(inverse)
    low, high = (inverse, high) if slope < 0 else (low, inverse)
    newton = inverse - slope / bend if bend > 0 else low
    following = newton if low < newton < high else (low * high) ** 0.5
    if abs(following - inverse) <= 1e-12 * inverse:
      break
    inverse = following
  return float(1 / following)


def evaluate(
  held_logits: Float[np.ndarray, "v k"],
  held_labels: Int[np.ndarray, "v"],
  logits: Float[np.ndarray, "n k"],
  labels: Int[np.ndarray, "n"],
) -> Calibration:
  """Calibration on test data before and after scaling by a temperature that is fitted on validation data."""
  temperature = fit_temperature(held_logits, held_labels)
  return Calibration(_ece(logits, labels), _ece(logits / temperature, labels), temperature)


def evaluate_on_test_folds(
  logits: Float[np.ndarray, "n k"], labels: Int[np.ndarray, "n"], *, folds: int = 5, seed: int = 0
) -> Calibration:
  """Calibration by temperatures fitted on TEST data, as the code of arXiv 2011.13377 has it.

  The temperature is fitted on one fold and measured on the other four. The mean over folds is more favourable
  than validation data allow, and is for comparison with table 9 of that paper alone.
  """
  parts = np.array_split(np.random.default_rng(seed).permutation(len(labels)), folds)
  temperatures, errors = [], []
  for part in parts:
    rest = np.setdiff1d(np.arange(len(labels)), part)
    temperatures.append(fit_temperature(logits[part], labels[part]))
    errors.append(_ece(logits[rest] / temperatures[-1], labels[rest]))
  return Calibration(_ece(logits, labels), float(np.mean(errors)), float(np.mean(temperatures)))


def _ece(logits: np.ndarray, labels: np.ndarray) -> float:
  logits = np.asarray(logits, np.float64)
  weights = np.exp(logits - np.max(logits, axis=1, keepdims=True))
  return expected_calibration_error(weights / np.sum(weights, axis=1, keepdims=True), labels)
