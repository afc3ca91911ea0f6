"""Errors of predicted pixels against NumPy."""

import numpy as np
import pytest

from frozen_vision.metrics import reconstruction


def _sums(predicted, target):
  error = predicted - target
  axis = 1
  return {
    "count": np.full(len(target), target.shape[1]),
    "absolute_error": np.abs(error).sum(axis),
    "squared_error": (error**2).sum(axis),
    "target": target.sum(axis),
    "squared_target": (target**2).sum(axis),
  }


def test_equals_plain_statistics_of_all_valid_images():
  rng = np.random.default_rng(0)
  target, predicted = rng.standard_normal((2, 5, 12)) + 0.5
  evaluator = reconstruction.ReconstructionEvaluator()
  assert evaluator.result() == {}
  evaluator.update(_sums(predicted[:3], target[:3]), {"example_valid": np.array([True, True, False])})
  evaluator.update(_sums(predicted[3:], target[3:]), {"example_valid": np.array([True, True])})
  kept = [0, 1, 3, 4]
  error = predicted[kept] - target[kept]
  wanted = {"l1": np.abs(error).mean(), "r2": 1 - (error**2).mean() / target[kept].var()}
  assert evaluator.result() == pytest.approx(wanted)


def test_constant_targets_have_no_explained_variance():
  evaluator = reconstruction.ReconstructionEvaluator()
  evaluator.update(_sums(np.ones((1, 4)), np.zeros((1, 4))), {"example_valid": np.array([True])})
  assert evaluator.result() == {"l1": 1.0}
