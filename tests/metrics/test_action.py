"""Accuracies and the confusion matrix against plain counts."""

import numpy as np
import pytest

from frozen_vision.metrics import action


def test_equals_a_plain_count():
  rng = np.random.default_rng(0)
  labels = rng.choice(4, 203, p=[0.6, 0.2, 0.2, 0.0]).astype(np.int32)
  probabilities = rng.dirichlet(np.ones(4), 203)
  evaluator = action.ActionEvaluator("abcd", top_k=(1, 2))
  for start in range(0, 203, 50):
    part = slice(start, start + 50)
    evaluator.update({"probabilities": probabilities[part]}, {"label": labels[part]})
  predicted = probabilities.argmax(1)
  order = np.argsort(-probabilities, axis=1)
  wanted = {f"top{k}": float((order[:, :k] == labels[:, None]).any(1).mean()) for k in (1, 2)}
  wanted["mean_class_accuracy"] = float(np.mean([(predicted[labels == c] == c).mean() for c in range(3)]))
  assert evaluator.result() == pytest.approx(wanted)
  for true in range(4):
    for guess in range(4):
      assert evaluator.total()[true, guess] == ((labels == true) & (predicted == guess)).sum()


def test_padding_and_unreadable_videos_do_not_count():
  evaluator = action.ActionEvaluator("ab", top_k=(1,))
  probabilities = np.array([[0.2, 0.8], [0.9, 0.1], [0.3, 0.7], [np.nan, np.nan]])
  evaluator.update(
    {"probabilities": probabilities},
    {
      "label": np.array([1, 1, 0, 0]),
      "example_valid": np.array([True, True, True, False]),
      "readable": np.array([True, True, False, False]),
    },
  )
  assert evaluator.result() == {"top1": 0.5, "mean_class_accuracy": 0.5, "unreadable": 1.0}
  assert evaluator.total().tolist() == [[0, 0], [1, 1]]


def test_without_a_readable_video_there_is_no_accuracy():
  evaluator = action.ActionEvaluator("ab")
  evaluator.update(
    {"probabilities": np.ones((2, 2))}, {"label": np.zeros(2, int), "readable": np.zeros(2, bool)}
  )
  assert evaluator.result() == {"unreadable": 2.0}
