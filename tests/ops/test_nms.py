import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.ops import anchors, nms
from frozen_vision.ops import boxes as box_ops
from tests import paths

_nms = jax.jit(nms.nms, static_argnums=2)
_batched = jax.jit(nms.batched_nms, static_argnums=3)
_multiclass = jax.jit(
  nms.multiclass_nms, static_argnames=("iou_threshold", "score_threshold", "max_detections")
)


def _greedy(boxes, scores, threshold, groups=None):
  """NMS as a loop: float32 as torchvision computes it, ties in index order."""
  groups = np.zeros(len(boxes)) if groups is None else groups
  areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
  keep = np.zeros(len(boxes), bool)
  for i in sorted(range(len(boxes)), key=lambda i: (-scores[i], i)):
    if not scores[i] > -np.inf:
      continue
    keep[i] = True
    for j in np.flatnonzero(keep & (groups == groups[i])):
      sides = np.minimum(boxes[i, 2:], boxes[j, 2:]) - np.maximum(boxes[i, :2], boxes[j, :2])
      overlap = np.prod(np.maximum(sides, 0))
      if j != i and overlap > 0 and overlap / (areas[i] + areas[j] - overlap) > threshold:
        keep[i] = False
        break
  return keep


def _random(rng, count, rounded):
  corner = rng.uniform(0, 60, (count, 2))
  boxes = np.concatenate([corner, corner + rng.uniform(5, 40, (count, 2))], 1).astype(np.float32)
  scores = rng.random(count).astype(np.float32)
  if rounded:  # exact IoUs such as 1/2 and tied scores
    return np.round(boxes / 8) * 8, np.round(scores * 10) / 10
  return boxes, scores


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_equals_greedy_loop(threshold):
  rng = np.random.default_rng(int(threshold * 10))
  for case in range(6):
    boxes, scores = _random(rng, 120, rounded=case % 2 == 1)
    scores[rng.random(120) < 0.1 * case] = -np.inf
    groups = rng.integers(0, 3, 120)
    np.testing.assert_array_equal(_nms(boxes, scores, threshold), _greedy(boxes, scores, threshold))
    np.testing.assert_array_equal(
      _batched(boxes, scores, groups, threshold), _greedy(boxes, scores, threshold, groups)
    )


def test_under_vmap():
  rng = np.random.default_rng(5)
  boxes, scores = (np.stack(arrays) for arrays in zip(*[_random(rng, 60, False) for _ in range(3)]))
  scores[1] = -np.inf
  scores[2, 30:] = -np.inf
  found = jax.jit(jax.vmap(lambda b, s: nms.nms(b, s, 0.4)))(boxes, scores)
  for image in range(3):
    np.testing.assert_array_equal(found[image], _greedy(boxes[image], scores[image], 0.4))
  assert not found[1].any()


def test_suppression_is_strict_and_chains_do_not_propagate():
  # IoU of exactly 1/2 survives a threshold of 1/2.
  boxes = jnp.array([[0, 0, 2, 1], [0, 0, 1, 1]], jnp.float32)
  assert _nms(boxes, jnp.array([0.9, 0.8]), 0.5).all()
  # The second falls to the first, so the third, which only the second overlaps, stays.
  boxes = jnp.array([[0, 0, 10, 1], [4, 0, 14, 1], [8, 0, 18, 1]], jnp.float32)
  np.testing.assert_array_equal(_nms(boxes, jnp.array([3.0, 2.0, 1.0]), 0.4), [True, False, True])


def test_ties_zero_areas_and_padding():
  same = jnp.array([[0, 0, 4, 4]] * 3, jnp.float32)
  np.testing.assert_array_equal(_nms(same, jnp.ones(3), 0.5), [True, False, False])
  np.testing.assert_array_equal(_nms(same, jnp.array([-jnp.inf, jnp.nan, -5.0]), 0.5), [False, False, True])
  np.testing.assert_array_equal(_nms(same * 0, jnp.ones(3), 0.5), [True, True, True])
  assert not _nms(same, jnp.full(3, -jnp.inf), 0.5).any()
  assert _nms(same[:0], jnp.ones(0), 0.5).shape == (0,)


def test_groups_far_from_the_origin_do_not_meet():
  boxes = jnp.array([[5000, 5000, 5010, 5010]] * 4, jnp.float32)
  keep = _batched(boxes, jnp.array([4.0, 3, 2, 1]), jnp.array([0, 1, 0, 70000]), 0.5)
  np.testing.assert_array_equal(keep, [True, True, False, True])


@pytest.mark.parametrize("rounded", [False, True])
def test_multiclass_equals_greedy_per_class(rounded):
  rng = np.random.default_rng(7 + rounded)
  boxes, _ = _random(rng, 40, rounded)
  scores = rng.random((40, 5)).astype(np.float32) ** 3
  if rounded:
    scores = np.round(scores, 1)
  scores[3] = -np.inf
  found = _multiclass(boxes, scores, iou_threshold=0.5, score_threshold=0.05, max_detections=60)
  passing = np.where(scores > 0.05, scores, -np.inf)
  keep = np.stack([_greedy(boxes, passing[:, c], 0.5) for c in range(5)], axis=1)
  row, label = np.nonzero(keep)
  order = np.argsort(-scores[row, label], kind="stable")[:60]
  count = len(order)
  assert found["valid"].sum() == count and found["valid"][:count].all()
  np.testing.assert_array_equal(found["indices"][:count], row[order])
  np.testing.assert_array_equal(found["labels"][:count], label[order])
  np.testing.assert_array_equal(found["scores"][:count], scores[row, label][order])
  np.testing.assert_array_equal(found["boxes"][:count], boxes[row[order]])


def test_multiclass_pads_and_may_be_empty():
  boxes = jnp.array([[0, 0, 4, 4], [0, 0, 4, 5]], jnp.float32)
  found = _multiclass(
    boxes, jnp.array([[0.9], [0.8]]), iou_threshold=0.5, score_threshold=0.1, max_detections=5
  )
  np.testing.assert_array_equal(found["valid"], [True, False, False, False, False])
  np.testing.assert_array_equal(found["boxes"][1:], 0)
  empty = _multiclass(boxes, jnp.zeros((2, 1)), iou_threshold=0.5, score_threshold=0.1, max_detections=5)
  assert not empty["valid"].any() and not empty["scores"].any()
  with pytest.raises(ValueError, match="at least 1"):
    nms.multiclass_nms(boxes, jnp.zeros((2, 0)), iou_threshold=0.5, score_threshold=0.1, max_detections=5)


def test_golden_proposals():
  """Anchors, decoding and NMS per level give the reference's proposals from its raw RPN outputs."""
  folder = paths.golden_dir() / "htc"
  golden = np.load(folder / "htc.npz")
  spec = json.loads((folder / "htc.json").read_text())
  settings = spec["config"]["test_cfg"]["rpn"]
  for image, size in enumerate(spec["image_sizes"]):
    boxes, scores, levels = [], [], []
    for level, stride in enumerate((4, 8, 16, 32, 64)):
      logits, deltas = golden[f"rpn.cls.{level}"][image], golden[f"rpn.reg.{level}"][image]
      height, width = logits.shape[1:]
      logits = logits.transpose(1, 2, 0).reshape(-1)
      deltas = deltas.reshape(3, 4, height, width).transpose(2, 3, 0, 1).reshape(-1, 4)
      best = np.argsort(-logits, kind="stable")[: settings["nms_pre"]]
      rois = anchors.grid_anchors(height, width, stride)[best]
      boxes.append(box_ops.decode_deltas(rois, deltas[best], (1, 1, 1, 1), np.asarray(size)))
      scores.append(jax.nn.sigmoid(logits[best]))
      levels.append(np.full(len(best), level))
    boxes, scores, levels = (np.concatenate(a) for a in (boxes, scores, levels))
    scores = np.where(box_ops.is_valid_size(boxes), scores, -np.inf)
    keep = np.asarray(_batched(boxes, scores, levels, settings["nms"]["iou_threshold"]))
    order = np.argsort(-scores[keep], kind="stable")[: settings["max_per_img"]]
    expected = golden[f"proposals.{image}.scores"]
    assert len(order) == len(expected)
    np.testing.assert_allclose(scores[keep][order], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(boxes[keep][order], golden[f"proposals.{image}.boxes"], rtol=1e-4, atol=1e-3)
