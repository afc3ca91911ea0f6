import numpy as np
import pytest

from frozen_vision.data.classification import splits
from frozen_vision.metrics import accuracy, average_precision
from frozen_vision.probes import basis, linear, logistic
from tests.probes import problems

_DECAYS = (0.3, 3.0, 1e2, 1e4)


def _sets(problem, targets, answers):
  """Training, validation and test parts of a problem."""
  first = slice(0, 110)
  return (
    (problem.features[first], targets[first]),
    (problem.features[110:], targets[110:]),
    (problem.queries, answers),
  )


def test_selects_on_validation_data_and_fits_again_on_both():
  problem = problems.make("tall")
  train, validation, test = _sets(problem, problem.labels, problem.answers)
  found = linear.evaluate(train, validation, test, weight_decays=_DECAYS)
  scores = {}
  axes = basis.principal(train[0])
  for fit in logistic.path(axes.coordinates(train[0]), train[1][:, None] == np.arange(4), _DECAYS):
    scores[fit.weight_decay] = np.mean(
      np.argmax(axes.classifier(fit.weights).logits(validation[0]), 1) == validation[1]
    )
  assert dict(zip(found.weight_decays, found.validation)) == scores and len(found.iterations) == 5
  best = min(decay for decay in _DECAYS if scores[decay] == max(scores.values()))
  assert found.weight_decay == best and found.at_edge == (best in (0.3, 1e4))
  axes = basis.principal(problem.features)
  [fit] = logistic.path(axes.coordinates(problem.features), problem.labels[:, None] == np.arange(4), [best])
  logits = axes.classifier(fit.weights).logits(problem.queries)
  np.testing.assert_allclose(found.logits, logits, atol=1e-3 * np.abs(logits).max())
  assert found.test == accuracy.top1(logits, problem.answers) > 0.5


def test_test_labels_change_no_selection():
  problem = problems.make("tall")
  sets = _sets(problem, problem.labels, problem.answers)
  other = (*sets[:2], (problem.queries, (problem.answers + 1) % 4))
  one, two = (
    linear.evaluate(*parts, weight_decays=_DECAYS, metric="mean_per_class") for parts in (sets, other)
  )
  assert one.weight_decay == two.weight_decay and one.validation == two.validation and one.test != two.test


def test_several_labels_an_image():
  problem = problems.make("tall")
  answers = problem.queries[:, :4] > 3
  train, validation, test = _sets(problem, problem.truth, answers)
  found = linear.evaluate(train, validation, test, weight_decays=_DECAYS, metric="map11")
  assert found.test == average_precision.mean_eleven_point(found.logits, answers, from_one=True) > 0.5
  assert found.classifier.weights.shape == (12, 4)


def test_split_holds_out_a_fraction_and_leaves_every_class():
  labels = np.array([0] * 50 + [1] * 49 + [2])
  for seed in range(8):
    train, validation = splits.split(labels, seed=seed)
    assert sorted([*train, *validation]) == list(range(100)) and len(validation) in (19, 20)
    assert set(labels[train]) == {0, 1, 2}
  assert not np.array_equal(splits.split(labels, seed=0)[1], splits.split(labels, seed=1)[1])
  with pytest.raises(ValueError, match="0.5 of 2 training images leaves none to validate on"):
    splits.split(np.arange(2), fraction=0.5)


def test_the_grid_is_the_papers():
  assert len(linear.GRID) == 45 and linear.GRID[0] == 1e-6 and linear.GRID[-1] == pytest.approx(1e5)
