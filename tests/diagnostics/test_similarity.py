"""CKA against its definition, and on features with known answers."""

import numpy as np
import pytest

from frozen_vision.diagnostics import similarity

_RNG = np.random.default_rng(0)


def _features(n, d):
  return _RNG.standard_normal((n, d)).astype(np.float32)


def test_rotated_and_scaled_features_are_the_same_and_independent_ones_are_not():
  features = _features(200, 8)
  rotation, _ = np.linalg.qr(_features(8, 8))
  found = similarity.cka([([features], [features, 3 * features @ rotation, _features(200, 8)])])
  assert found.shape == (1, 3)
  np.testing.assert_allclose(found[0, :2], 1, atol=1e-4)
  assert abs(found[0, 2]) < 0.1


def test_batches_add_up_and_large_ones_give_the_biased_form():
  first, second = _features(400, 6), _features(400, 5)
  second[:, :3] += first[:, :3]
  # The biased form, from centred features, which the unbiased one approaches.
  a, b = first - first.mean(0), second - second.mean(0)
  wanted = np.sum((a.T @ b) ** 2) / np.linalg.norm(a.T @ a) / np.linalg.norm(b.T @ b)
  whole = similarity.cka([([first], [second])])[0, 0]
  parts = similarity.cka([([x], [y]) for x, y in zip(np.split(first, 8), np.split(second, 8))])[0, 0]
  assert whole == pytest.approx(wanted, abs=0.02) and parts == pytest.approx(whole, abs=0.05)


def test_the_estimate_is_unbiased():
  """Independent features: the mean over many small batches is zero, where the biased form is far above."""
  values = [
    float(similarity.unbiased_hsic(x @ x.T, y @ y.T))
    for x, y in ((_features(8, 3), _features(8, 3)) for _ in range(300))
  ]
  assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))


def test_what_is_refused():
  with pytest.raises(ValueError, match="at least 4 examples, found 3"):
    similarity.cka([([_features(3, 2)], [_features(3, 2)])])
  with pytest.raises(ValueError, match="no batches"):
    similarity.cka([])
