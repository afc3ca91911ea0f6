import numpy as np
import pytest
from scipy import optimize, special

from frozen_vision.probes import calibration


def _drawn(temperature, count=4000, classes=5, seed=0):
  """(logits, labels) of a classifier that is calibrated when its logits are divided by `temperature`."""
  rng = np.random.default_rng(seed)
  logits = 2 * rng.normal(size=(count, classes))
  labels = [rng.choice(classes, p=row) for row in special.softmax(logits, axis=1)]
  return (logits * temperature).astype(np.float32), np.array(labels)


def _loop(probabilities, labels, bins):
  """The error by its definition, a bin at a time."""
  confidence, total = probabilities.max(1), 0.0
  for index in range(bins):
    inside = (confidence >= index / bins) & ((confidence < (index + 1) / bins) | (index == bins - 1))
    if inside.any():
      gap = abs((probabilities[inside].argmax(1) == labels[inside]).mean() - confidence[inside].mean())
      total += inside.mean() * gap
  return total


def test_error_equals_a_plain_loop():
  logits, labels = _drawn(2.0)
  probabilities = special.softmax(logits.astype(np.float64), axis=1)
  for bins in (1, 10, 15):
    found = calibration.expected_calibration_error(probabilities, labels, bins=bins)
    assert found == pytest.approx(_loop(probabilities, labels, bins), abs=1e-6)


def test_a_known_calibration_gives_its_error():
  confidence = np.repeat([0.62, 0.83, 1.0], [50, 100, 50])
  probabilities = np.stack([confidence, 1 - confidence], axis=1)
  right = np.concatenate([np.arange(50) < 31, np.arange(100) < 60, np.arange(50) < 45])
  # 0.62 is right in 62% of cases, 0.83 in 60% and 1 in 90%.
  found = calibration.expected_calibration_error(probabilities, np.where(right, 0, 1))
  assert found == pytest.approx((0.23 * 100 + 0.1 * 50) / 200, abs=1e-9)


def test_temperature_equals_scipys_minimum():
  for true in (0.5, 1.0, 3.0):
    logits, labels = _drawn(true)

    def loss(log_temperature):
      scaled = logits.astype(np.float64) / np.exp(log_temperature)
      return np.mean(special.logsumexp(scaled, axis=1) - scaled[np.arange(len(labels)), labels])

    wanted = optimize.minimize_scalar(loss, bracket=(-1, 1), options=dict(xtol=1e-10)).x
    found = calibration.fit_temperature(logits, labels)
    # A minimum is known to the root of float64's resolution.
    assert np.log(found) == pytest.approx(wanted, abs=1e-6)
    assert found == pytest.approx(true, rel=0.05)


def test_temperatures_without_a_minimum_are_bounded():
  logits = np.eye(3, dtype=np.float32)
  assert calibration.fit_temperature(logits, np.arange(3)) == 1e-3
  assert calibration.fit_temperature(logits, np.array([1, 2, 0])) == 1e3


def test_scaling_mends_what_validation_data_show():
  held, test = _drawn(3.0, seed=1), _drawn(3.0, seed=2)
  found = calibration.evaluate(*held, *test)
  assert found.temperature == calibration.fit_temperature(*held)
  assert found.ece > 0.1 and found.scaled_ece < 0.03
  folds = calibration.evaluate_on_test_folds(*test)
  assert folds.ece == found.ece and folds.scaled_ece < 0.03 and folds.temperature == pytest.approx(3, rel=0.1)
