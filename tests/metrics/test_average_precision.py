import numpy as np
import pytest

from frozen_vision.metrics import average_precision
from tests import paths
from tests.probes import problems


def test_equals_scikit_learns_curve():
  golden = np.load(paths.golden_dir() / "probes.npz")["eleven_point"]
  for (scores, truth), (with_first, without) in zip(problems.rankings(), golden, strict=True):
    assert average_precision.eleven_point(scores, truth, from_one=True) == pytest.approx(with_first, abs=1e-9)
    assert average_precision.eleven_point(scores, truth) == pytest.approx(without, abs=1e-9)


def test_equals_a_plain_loop_over_thresholds():
  scores, truth = problems.rankings()[2]
  total = 0.0
  for point in range(11):
    best = 0.0
    for threshold in scores:
      chosen = scores >= threshold
      if truth[chosen].sum() / truth.sum() >= point / 10 - 1e-12:
        best = max(best, truth[chosen].mean())
    total += best / 11
  assert average_precision.eleven_point(scores, truth) == pytest.approx(total, abs=1e-9)
  both = average_precision.mean_eleven_point(np.stack([scores, -scores], 1), np.stack([truth, truth], 1))
  assert both == pytest.approx((total + average_precision.eleven_point(-scores, truth)) / 2)


def test_bounds_and_errors():
  truth = np.array([True, False, True])
  assert average_precision.eleven_point(np.array([3.0, 1.0, 2.0]), truth) == 1.0
  assert average_precision.eleven_point(np.zeros(3), truth) == pytest.approx(2 / 3)
  with pytest.raises(ValueError, match="No example has the class"):
    average_precision.eleven_point(np.zeros(3), np.zeros(3, bool))
  with pytest.raises(ValueError, match="NaN"):
    average_precision.eleven_point(np.full(3, np.nan), truth)


def test_batches_of_several_labels():
  rng = np.random.default_rng(0)
  scores, truth = rng.normal(size=(40, 4)).astype(np.float32), rng.random((40, 4)) < 0.3
  truth[:, 2] = False  # a class that no image has
  evaluator = average_precision.ElevenPointEvaluator()
  assert evaluator.result() == {}
  for start in (0, 20):
    part = slice(start, start + 20)
    valid = np.arange(21) < 20  # padded, as the last batch is
    logits, label = (np.concatenate([array[part], array[:1]]) for array in (scores, truth))
    evaluator.update({"logits": logits}, {"label": label.astype(np.int32), "example_valid": valid})
  kept = [0, 1, 3]
  expected = average_precision.mean_eleven_point(scores[:, kept], truth[:, kept], from_one=True)
  assert evaluator.result() == {"map11": pytest.approx(expected, abs=1e-12)}
