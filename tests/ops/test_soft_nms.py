"""Soft-NMS against a greedy loop in plain Python, written from mmcv's rules."""

import math

import jax
import numpy as np
import pytest

from frozen_vision.ops import nms, soft_nms

_soft = jax.jit(
  soft_nms.multiclass_soft_nms,
  static_argnames=(
    "kind",
    "iou_threshold",
    "sigma",
    "min_score",
    "score_threshold",
    "max_detections",
  ),
)


def _iou(a, b):
  width = min(a[2], b[2]) - max(a[0], b[0])
  height = min(a[3], b[3]) - max(a[1], b[1])
  if width <= 0 or height <= 0:
    return 0.0

  def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])

  return width * height / (area(a) + area(b) - width * height)


def _greedy(boxes, scores, kind, threshold, sigma, min_score):
  """One class: [(row, lowered score)] in the order of picking; float64."""
  left = {i: float(s) for i, s in enumerate(scores) if s > -math.inf}
  picked = []
  while left:
    best = max(left, key=left.get)
    picked.append((best, left.pop(best)))
    for i in list(left):
      overlap = _iou(boxes[best], boxes[i])
      if kind == "gaussian":
        left[i] *= math.exp(-(overlap**2) / sigma)
      elif overlap >= threshold:
        left[i] *= 1 - overlap
      if left[i] < min_score:
        del left[i]
  return picked


def _random(rng, count, boxes_per_row, classes):
  corner = rng.uniform(0, 60, (count, boxes_per_row, 2))
  boxes = np.concatenate([corner, corner + rng.uniform(10, 40, corner.shape)], -1)
  scores = rng.uniform(0, 1, (count, classes)) ** 2
  return boxes.astype(np.float32), scores.astype(np.float32)


@pytest.mark.parametrize("kind, sigma", [("linear", 0.5), ("gaussian", 0.5), ("gaussian", 0.1)])
@pytest.mark.parametrize("per_class", [False, True])
def test_equals_greedy_loop(kind, sigma, per_class):
  rng = np.random.default_rng(3)
  boxes, scores = _random(rng, 40, 3 if per_class else 1, 3)
  scores[rng.uniform(size=40) < 0.2] = -np.inf
  found = _soft(
    boxes,
    scores,
    kind=kind,
    iou_threshold=0.4,
    sigma=sigma,
    min_score=0.02,
    score_threshold=0.05,
    max_detections=50,
  )
  expected = []
  for label in range(3):
    own = boxes[:, label if per_class else 0].astype(float)
    passing = np.where(scores[:, label] > 0.05, scores[:, label], -np.inf)
    expected += [(score, label, row) for row, score in _greedy(own, passing, kind, 0.4, sigma, 0.02)]
  total = len(expected)
  expected = sorted(expected, reverse=True)[:50]
  count = len(expected)
  assert total > 50 or kind == "gaussian"
  assert found["valid"][:count].all() and not found["valid"][count:].any()
  np.testing.assert_array_equal(found["labels"][:count], [e[1] for e in expected])
  np.testing.assert_array_equal(found["indices"][:count], [e[2] for e in expected])
  np.testing.assert_allclose(found["scores"][:count], [e[0] for e in expected], rtol=1e-5)
  rows = [boxes[row, label if per_class else 0] for _, label, row in expected]
  np.testing.assert_array_equal(found["boxes"][:count], rows)
  for name in ("boxes", "scores", "labels", "indices"):
    assert not np.any(found[name][count:])


def test_more_rows_than_candidates_and_no_candidates():
  boxes, scores = _random(np.random.default_rng(0), 4, 1, 2)
  options = dict(score_threshold=0.0, max_detections=12)
  found = _soft(boxes, scores, **options)
  assert 1 <= found["valid"].sum() <= 8 and found["boxes"].shape == (12, 4)
  assert not any(np.any(x) for x in _soft(boxes, np.full_like(scores, -np.inf), **options).values())
  scores[:] = np.nan
  assert not _soft(boxes, scores, **options)["valid"].any()


def test_without_overlap_it_is_hard_nms_and_with_equal_boxes_one_remains():
  boxes = np.array([[[0, 0, 4, 4]], [[8, 0, 12, 4]], [[0, 8, 4, 12]]], np.float32)
  scores = np.array([[0.3], [0.9], [0.6]], np.float32)
  soft = _soft(boxes, scores, score_threshold=0.0, max_detections=5)
  hard = nms.multiclass_nms(boxes[:, 0], scores, iou_threshold=0.5, score_threshold=0.0, max_detections=5)
  for name in hard:
    np.testing.assert_array_equal(soft[name], hard[name], err_msg=name)
  # Padding with the same box as the winner: -inf times a weight of zero is no number.
  scores = np.array([[0.9], [-np.inf], [0.5]], np.float32)
  found = _soft(boxes * 0 + boxes[:1], scores, score_threshold=0.0, max_detections=3)
  np.testing.assert_array_equal(found["valid"], [True, False, False])


def test_linear_lowers_from_the_threshold_on():
  boxes = np.array([[[0, 0, 2, 1]], [[0, 0, 1, 1]]], np.float32)  # IoU 1/2
  scores = np.array([[0.8], [0.6]], np.float32)
  for threshold, expected in ((0.5, 0.3), (0.51, 0.6)):
    found = _soft(boxes, scores, iou_threshold=threshold, score_threshold=0.0, max_detections=2)
    np.testing.assert_allclose(found["scores"], [0.8, expected], rtol=1e-6)


def test_under_vmap():
  rng = np.random.default_rng(1)
  boxes, scores = (np.stack(a) for a in zip(*[_random(rng, 10, 1, 2) for _ in range(3)]))

  def run(b, s):
    return soft_nms.multiclass_soft_nms(b, s, score_threshold=0.05, max_detections=6)

  together = jax.jit(jax.vmap(run))(boxes, scores)
  for i in range(3):
    alone = _soft(boxes[i], scores[i], score_threshold=0.05, max_detections=6)
    for name in alone:
      np.testing.assert_allclose(together[name][i], alone[name], rtol=1e-6, err_msg=name)


@pytest.mark.usefixtures("without_type_checks")
def test_errors_name_what_was_found():
  boxes, scores = _random(np.random.default_rng(0), 4, 1, 3)
  with pytest.raises(ValueError, match="'cubic'; known: linear, gaussian"):
    _soft(boxes, scores, kind="cubic", score_threshold=0.0, max_detections=2)
  with pytest.raises(ValueError, match=r"\(4, 2, 4\); .* \(4, 1, 4\) or \(4, 3, 4\)"):
    _soft(boxes.repeat(2, 1), scores, score_threshold=0.0, max_detections=2)
  with pytest.raises(ValueError, match="at least 1"):
    _soft(boxes[:0], scores[:0], score_threshold=0.0, max_detections=2)
