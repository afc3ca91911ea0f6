import numpy as np
import pytest

from frozen_vision.probes import few_shot
from tests.probes import problems

_OPTIONS = dict(shots=3, ways=3, queries=4, episodes=20, seed=5)


def test_equals_a_plain_loop():
  problem = problems.make("tall")
  found = few_shot.evaluate(problem.features, problem.labels, **_OPTIONS)
  accuracies = []
  for episode in few_shot.draw(problem.labels, **_OPTIONS):
    means = [problem.features[images[:3]].astype(np.float64).mean(0) for images in episode]
    right = [
      np.argmin([np.sum((problem.features[image] - mean) ** 2) for mean in means]) == own
      for own, images in enumerate(episode)
      for image in images[3:]
    ]
    accuracies.append(np.mean(right))
  np.testing.assert_allclose(found.accuracies, accuracies, atol=1e-6)
  assert found.mean == pytest.approx(np.mean(accuracies), abs=1e-6)
  assert found.half_width == pytest.approx(1.96 * np.std(accuracies) / 20**0.5, abs=1e-6)
  assert found.num_classes == 4 and found.shots == 3


def test_episodes_are_fair_and_follow_from_the_seed():
  labels = np.repeat(np.arange(6), [30, 30, 30, 30, 30, 6])
  drawn = few_shot.draw(labels, **_OPTIONS)
  assert drawn.shape == (20, 3, 7)
  for episode in drawn:
    assert len(np.unique(episode)) == 21
    of_way = labels[episode]
    assert (of_way == of_way[:, :1]).all() and len(set(of_way[:, 0])) == 3
  assert set(np.unique(labels[drawn])) == {0, 1, 2, 3, 4}  # class 5 has 6 images, and 7 are needed
  np.testing.assert_array_equal(drawn[:8], few_shot.draw(labels, **_OPTIONS | dict(episodes=8)))
  assert not np.array_equal(drawn, few_shot.draw(labels, **_OPTIONS | dict(seed=6)))


def test_what_cannot_be_drawn_is_named():
  labels = np.repeat(np.arange(6), 30)
  assert few_shot.possible_shots(labels) == (5,)
  with pytest.raises(ValueError, match="0 classes have the 35 images that 20 shots and 15 queries take"):
    few_shot.draw(labels, shots=20)
