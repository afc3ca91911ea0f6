"""Correlations against SciPy, and table 1 of "How Well Do Self-Supervised Models Transfer?" recomputed."""

import json

import numpy as np
import pytest
from scipy import special, stats

from frozen_vision.metrics import correlation
from tests import paths


def test_equals_scipy():
  rng = np.random.default_rng(0)
  a = rng.random(50)
  b = np.round(a + rng.random(50), 1)  # with ties
  np.testing.assert_allclose(correlation.logit(a), special.logit(a), atol=1e-12)
  assert correlation.pearson(a, b) == pytest.approx(stats.pearsonr(a, b).statistic, abs=1e-12)
  assert correlation.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_constant_columns_and_bounds():
  assert np.isnan(correlation.pearson(np.ones(3), np.arange(3.0)))
  with pytest.raises(ValueError, match=r"expected fractions in \(0, 1\)"):
    correlation.logit(np.array([0.5, 93.0]))


def test_table_1_of_the_paper():
  table = json.loads((paths.golden_dir() / "transfer_table1.json").read_text())
  top1 = np.array([row["imagenet"] for row in table["linear"].values()]) / 100
  for kind, printed in (("linear", 0.926), ("finetune", 0.857)):
    rows = list(table[kind].values())
    scores = np.array([row["scores"] for row in rows])
    np.testing.assert_allclose(scores.mean(axis=1), [row["average"] for row in rows], rtol=0, atol=0.01)
    found = correlation.with_reference(scores / 100, top1)
    assert found.pearson == pytest.approx(printed, abs=0.0005)
    mean_logits = special.logit(scores / 100).mean(1)
    assert found.spearman == pytest.approx(stats.spearmanr(mean_logits, top1).statistic, abs=1e-12)
