import math

import numpy as np
import pytest

from frozen_vision.probes import knn
from tests.probes import problems


def _plain(problem, k, temperature):
  """Votes of one query after the other, in float64."""
  found = []
  for query in problem.queries.astype(np.float64):
    similarities = []
    for feature, label in zip(problem.features.astype(np.float64), problem.labels):
      cosine = query @ feature / (np.linalg.norm(query) * np.linalg.norm(feature))
      similarities.append((cosine, label))
    nearest = sorted(similarities, reverse=True)[:k]
    votes = np.zeros(problems.CLASSES)
    for cosine, label in nearest:
      votes[label] += math.exp(cosine / temperature)
    found.append(votes / votes.sum())
  return np.array(found)


def test_equals_a_plain_loop(monkeypatch):
  problem = problems.make("tall")
  monkeypatch.setattr(knn, "_SIMILARITIES", 150 * 16)  # chunks of 16: the last of 40 queries is filled up
  found = knn.votes(problem.queries, problem.features, problem.labels, num_classes=4, ks=(1, 7, 150))
  tops = knn.top1(problem.queries, problem.answers, problem.features, problem.labels, ks=(1, 7, 150))
  for k in (1, 7, 150):
    wanted = _plain(problem, k, 0.07)
    np.testing.assert_allclose(found[k], wanted, atol=1e-6)
    assert tops[k] == np.mean(wanted.argmax(1) == problem.answers)


def test_small_temperatures_do_not_overflow():
  problem = problems.make("tall")
  found = knn.votes(
    problem.queries, problem.features, problem.labels, num_classes=4, ks=(5,), temperature=1e-3
  )
  np.testing.assert_allclose(found[5].sum(1), 1, atol=1e-6)


@pytest.mark.parametrize("ks", [(), (0,), (10, 151)])
def test_impossible_numbers_of_neighbours_are_named(ks):
  problem = problems.make("tall")
  with pytest.raises(ValueError, match="expected numbers from 1 to 150"):
    knn.votes(problem.queries, problem.features, problem.labels, num_classes=4, ks=ks)
