"""Logistic regression against scikit-learn's Newton solver in float64 (`tests/references/probes.py`)."""

import numpy as np
import pytest

from frozen_vision.probes import basis, logistic
from tests import paths, reference_scripts
from tests.probes import problems


def _truth(problem, loss):
  return problem.truth if loss == "sigmoid" else problem.labels[:, None] == np.arange(problems.CLASSES)


def _compare(golden):
  """Scores agree at every weight decay, and so does the class of every query that is not a tie."""
  for shape in problems.SHAPES:
    problem = problems.make(shape)
    axes = basis.principal(problem.features)
    coordinates = axes.coordinates(problem.features)
    for loss in ("softmax", "sigmoid"):
      wanted = golden[f"{loss}_{shape}.logits"]
      fits = list(logistic.path(coordinates, _truth(problem, loss), golden["decays"], loss=loss))
      assert [fit.weight_decay for fit in fits] == sorted(golden["decays"], reverse=True)
      for fit, reference in zip(fits, wanted[::-1]):
        # Separable or flat problems at small weight decays are known to a few digits; see `Fit.error`.
        tolerance = 1e-4 if fit.weight_decay > 1 else 3e-4 if shape == "wide" else 4e-2
        scores = axes.classifier(fit.weights).logits(problem.queries)
        if loss == "softmax":  # up to a number added to all classes
          scores, reference = (x - x.mean(axis=1, keepdims=True) for x in (scores, reference))
        np.testing.assert_allclose(scores, reference, rtol=0, atol=tolerance * np.abs(reference).max())


def test_equals_scikit_learn():
  _compare(np.load(paths.golden_dir() / "probes.npz"))


def test_equals_the_scikit_learn_that_is_installed(tmp_path):
  folder = reference_scripts.run("probes.py", tmp_path, packages=("sklearn",))
  _compare(np.load(folder / "probes.npz"))


def test_the_gradient_of_the_objective_is_zero_at_the_solution():
  problem = problems.make("tall")
  axes = basis.principal(problem.features)
  truth = _truth(problem, "softmax")
  [fit] = logistic.path(axes.coordinates(problem.features), truth, [2.0])
  classifier = axes.classifier(fit.weights)
  features, weights = problem.features.astype(np.float64), classifier.weights.astype(np.float64)
  scores = features @ weights + classifier.bias
  probabilities = np.exp(scores - scores.max(1, keepdims=True))
  residual = probabilities / probabilities.sum(1, keepdims=True) - truth
  penalty = 2.0 * weights
  assert np.abs(features.T @ residual + penalty).max() < 1e-3 * np.abs(penalty).max()
  assert np.abs(residual.sum(0)).max() < 1e-4 * np.abs(residual).sum(0).max()


def test_a_solution_does_not_depend_on_the_grid():
  problem = problems.make("wide")
  coordinates = basis.principal(problem.features).coordinates(problem.features)
  truth = _truth(problem, "softmax")
  [alone] = logistic.path(coordinates, truth, [0.1])
  among = list(logistic.path(coordinates, truth, [0.1, 100.0, 10.0, 1.0, 0.1]))
  assert [fit.weight_decay for fit in among] == [100.0, 10.0, 1.0, 0.1]
  np.testing.assert_allclose(among[-1].weights, alone.weights, atol=1e-3 * np.abs(alone.weights).max())


def test_axes_are_orthonormal_and_span_the_features():
  for shape, (count, size) in problems.SHAPES.items():
    problem = problems.make(shape)
    axes = basis.principal(problem.features)
    assert axes.axes.shape == (size, min(count - 1, size))
    np.testing.assert_allclose(axes.axes.T @ axes.axes, np.eye(axes.axes.shape[1]), atol=1e-5)
    coordinates = np.asarray(axes.coordinates(problem.features))
    np.testing.assert_allclose(
      axes.mean + coordinates[:, :-1] @ axes.axes.T,
      problem.features,
      atol=1e-5 * np.abs(problem.features).max(),
    )


@pytest.mark.usefixtures("without_type_checks")
def test_what_has_no_solution_is_named():
  coordinates = np.ones((4, 2), np.float32)
  truth = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0], [1, 0, 0]], bool)
  with pytest.raises(ValueError, match="No training example has class 2"):
    next(logistic.path(coordinates, truth, [1.0]))
  with pytest.raises(ValueError, match="All training examples have class 0"):
    next(logistic.path(coordinates, np.ones((4, 1), bool), [1.0], loss="sigmoid"))
  with pytest.raises(ValueError, match="no class or several"):
    next(logistic.path(coordinates, np.ones((4, 2), bool), [1.0]))
  with pytest.raises(ValueError, match="expected one or more positive"):
    next(logistic.path(coordinates, truth[:, :2], [0.0]))
  with pytest.raises(ValueError, match="hold NaN"):
    basis.principal(np.full((4, 2), np.nan, np.float32))
  with pytest.raises(ValueError, match="at least two"):
    basis.principal(np.ones((1, 2), np.float32))
