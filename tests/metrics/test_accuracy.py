import numpy as np
import pytest

from frozen_vision.metrics import accuracy


def test_equals_a_plain_count():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(1003, 10)).astype(np.float32)
  labels = rng.integers(0, 10, 1003).astype(np.int32)
  order = np.argsort(-logits, axis=1)
  evaluator = accuracy.AccuracyEvaluator(top_k=(1, 3, 5))
  for start in range(0, 1003, 100):
    part = slice(start, start + 100)
    evaluator.update({"logits": logits[part]}, {"label": labels[part]})
  expected = {f"top{k}": np.mean((order[:, :k] == labels[:, None]).any(1)) for k in (1, 3, 5)}
  assert evaluator.result() == expected
  evaluator.reset()
  assert evaluator.result() == {}


def test_padding_does_not_count():
  evaluator = accuracy.AccuracyEvaluator()
  logits = np.array([[0.0, 1.0, 2.0]] * 3)
  logits[2] = np.nan
  batch = {"label": np.array([2, 0, -1]), "example_valid": np.array([True, True, False])}
  evaluator.update({"logits": logits}, batch)
  assert evaluator.result() == {"top1": 0.5, "top5": 1.0}


def test_equal_logits_are_not_all_right():
  evaluator = accuracy.AccuracyEvaluator(top_k=(1, 2))
  evaluator.update({"logits": np.zeros((4, 4))}, {"label": np.arange(4)})
  assert evaluator.result() == {"top1": 0.25, "top2": 0.5}


def test_wrong_input_is_named():
  evaluator = accuracy.AccuracyEvaluator()
  with pytest.raises(ValueError, match=r"label holds 0\.\.3, but logits have 3 classes"):
    evaluator.update({"logits": np.zeros((2, 3))}, {"label": np.array([0, 3])})
  with pytest.raises(ValueError, match="NaN"):
    evaluator.update({"logits": np.full((1, 3), np.nan)}, {"label": np.array([0])})
  with pytest.raises(ValueError, match="disagree"):
    evaluator.update({"logits": np.zeros((2, 3))}, {"label": np.zeros(3, np.int32)})
  with pytest.raises(ValueError, match="positive"):
    accuracy.AccuracyEvaluator(top_k=(0,))


def test_mean_per_class_weighs_classes_alike():
  logits = np.eye(3)[[0, 0, 0, 1, 1, 0]]
  labels = np.array([0, 0, 0, 0, 1, 1])
  assert accuracy.top1(logits, labels) == 4 / 6
  assert accuracy.mean_per_class(logits, labels) == (3 / 4 + 1 / 2) / 2


def test_mean_over_classes_equals_the_function():
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(90, 5)).astype(np.float32)
  labels = rng.choice([0, 1, 3], 90, p=[0.7, 0.2, 0.1]).astype(np.int32)
  evaluator = accuracy.AccuracyEvaluator(top_k=(1,), per_class=True)
  for part in (slice(0, 50), slice(50, 90)):
    evaluator.update({"logits": logits[part]}, {"label": labels[part]})
  found = evaluator.result()
  assert found["mean_per_class"] == pytest.approx(accuracy.mean_per_class(logits, labels), abs=1e-12)
  assert found["mean_per_class"] != found["top1"]
