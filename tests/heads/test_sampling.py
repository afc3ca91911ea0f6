"""Assignment and sampling rules, against plain loops written from the rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.heads import sampling
from frozen_vision.ops import boxes as box_ops


def random_boxes(rng, count, size=100.0):
  corner = rng.uniform(0, 0.7 * size, (count, 2))
  return np.concatenate([corner, corner + rng.uniform(5, 0.4 * size, (count, 2))], 1).astype(np.float32)


def assign_by_loops(overlaps, positive_iou, negative_iou, min_positive_iou, low_quality):
  """The rules of MaxIoUAssigner one after the other, from overlaps [n, g] without padding."""
  assigned = []
  for row in overlaps:
    best = row.max() if row.size else 0.0
    assigned.append(row.argmax() if row.size and best >= positive_iou else -1 if best < negative_iou else -2)
  for j in range(overlaps.shape[1] if low_quality else 0):
    best = overlaps[:, j].max()
    if best >= min_positive_iou:
      for i in np.flatnonzero(overlaps[:, j] == best):
        assigned[i] = j
  return np.array(assigned)


@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize("objects", [0, 1, 5])
def test_assignment_follows_the_rules_and_ignores_padding(objects, low_quality):
  assign = jax.jit(
    lambda *args: sampling.assign_max_iou(
      *args,
      positive_iou=0.6,
      negative_iou=0.3,
      min_positive_iou=0.2,
      match_low_quality=low_quality,
    )
  )
  for seed in range(5):
    rng = np.random.default_rng(seed)
    boxes, gt = random_boxes(rng, 60), random_boxes(rng, 8)
    boxes[1] = boxes[0]  # a tie: both are an object's best
    gt[0] = boxes[0] + [0, 0, 5, 5]
    valid, gt_valid = rng.uniform(size=60) < 0.8, np.arange(8) < objects
    valid[:2] = True
    found = np.asarray(assign(boxes, valid, gt, gt_valid))
    overlaps = np.asarray(box_ops.pairwise_iou(boxes, gt))[valid][:, gt_valid]
    expected = assign_by_loops(overlaps, 0.6, 0.3, 0.2, low_quality)
    np.testing.assert_array_equal(found[valid], expected)
    assert (found[~valid] == sampling.IGNORED).all()


@pytest.mark.parametrize(
  "positives, negatives, expected",
  [
    (0, 50, (0, 16)),  # negatives fill up
    (10, 50, (4, 12)),  # positives are limited to a quarter
    (2, 50, (2, 14)),
    (10, 3, (4, 3)),  # positives never fill up
    (0, 0, (0, 0)),
  ],
)
def test_sample_counts(positives, negatives, expected):
  assigned = np.full(70, sampling.IGNORED, np.int32)
  assigned[:positives] = 3
  assigned[20 : 20 + negatives] = sampling.NEGATIVE
  positive, negative = sampling.sample(
    jax.random.key(0), jnp.asarray(assigned), num=16, positive_fraction=0.25
  )
  assert (int(positive.sum()), int(negative.sum())) == expected
  assert not (positive & (assigned < 0)).any()
  assert not (negative & (assigned != sampling.NEGATIVE)).any()


def test_sampling_is_random_uniform_and_repeatable():
  mask = jnp.arange(20) < 10
  draw = jax.vmap(lambda key: sampling.random_subset(key, mask, 3))
  chosen = draw(jax.random.split(jax.random.key(1), 2000))
  assert (chosen.sum(1) == 3).all()
  np.testing.assert_allclose(chosen.mean(0), np.where(mask, 0.3, 0.0), atol=0.05)
  np.testing.assert_array_equal(chosen, draw(jax.random.split(jax.random.key(1), 2000)))


def test_rois_hold_the_ground_truth_and_positives_come_first():
  gt = jnp.asarray([[0, 0, 10, 10], [20, 20, 40, 40], [0, 0, 0, 0]], jnp.float32)
  gt_valid = jnp.asarray([True, True, False])
  boxes = jnp.asarray([[50, 50, 60, 60], [21, 20, 40, 40], [0, 0, 10, 9], [0, 0, 0, 0]], jnp.float32)
  valid = jnp.asarray([True, True, True, False])
  rois = sampling.sample_rois(
    jax.random.key(0),
    boxes,
    valid,
    gt,
    gt_valid,
    iou=0.5,
    match_low_quality=True,
    num=32,
    positive_fraction=0.25,
  )
  assert rois.boxes.shape == (7, 4)
  np.testing.assert_array_equal(rois.valid, [True] * 5 + [False] * 2)
  np.testing.assert_array_equal(rois.positive, [True] * 4 + [False] * 3)
  np.testing.assert_array_equal(rois.is_gt, [True] * 2 + [False] * 5)
  np.testing.assert_array_equal(rois.gt_index[:4], [0, 1, 1, 0])
  np.testing.assert_array_equal(rois.boxes[4], boxes[0])
  np.testing.assert_array_equal(rois.boxes[5:], 0)
