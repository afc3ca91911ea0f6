import json

import numpy as np
import pytest

from frozen_vision.probes import calibration, few_shot, knn, linear, suite
from tests.probes import problems


@pytest.fixture(scope="module")
def parts():
  problem = problems.make("tall")
  return (
    suite.Examples(problem.features[:110], problem.labels[:110]),
    suite.Examples(problem.features[110:], problem.labels[110:]),
    suite.Examples(problem.queries, problem.answers),
  )


def test_every_probe_gets_the_parts_that_it_may_see(parts, monkeypatch):
  monkeypatch.setattr(few_shot, "WAYS", 3)
  assert len(linear.GRID) == 45
  monkeypatch.setattr(linear, "GRID", (1.0, 10.0))
  train, validation, test = parts
  found = suite.run(train, validation, test, ks=(5, 150, 151), shots=(5, 500), episodes=10, seed=3)
  assert found.counts == {"train": 110, "validation": 40, "test": 40}
  together = [np.concatenate(part) for part in zip(train, validation)]
  assert found.knn == knn.top1(test.features, test.labels, *together, ks=(5, 150))
  everything = [np.concatenate(part) for part in zip(*parts)]
  # Four classes are too few for five ways.
  assert found.few_shot == () and few_shot.possible_shots(everything[1]) == ()
  scaled = calibration.evaluate(
    found.linear.validation_logits, validation.labels, found.linear.logits, test.labels
  )
  assert found.calibration == scaled
  # Selection scores are those of the classifier that saw no validation data.
  selected = found.linear.weight_decays.index(found.linear.weight_decay)
  assert np.mean(found.linear.validation_logits.argmax(1) == validation.labels) == pytest.approx(
    found.linear.validation[selected]
  )
  content = json.loads(json.dumps(found.to_dict()))
  assert content["linear"]["test"] == found.linear.test and len(content["linear"]["grid"]) == 2
  text = found.to_text()
  assert f"| linear, top-1 | {found.linear.test:.4f} |" in text and "fitted on validation data" in text
