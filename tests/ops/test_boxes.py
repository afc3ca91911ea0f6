import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.ops import boxes as box_ops
from tests import paths

_STDS = (0.1, 0.1, 0.2, 0.2)


def _boxes(rng, *shape):
  corner = rng.uniform(0, 100, (*shape, 2))
  return np.concatenate([corner, corner + rng.uniform(1, 80, (*shape, 2))], -1).astype(np.float32)


def test_area_and_iou_equal_loops():
  rng = np.random.default_rng(0)
  a, b = _boxes(rng, 2, 7), _boxes(rng, 2, 5)
  a[0, 0] = b[0, 0]
  a[1, 1] = 0
  b[1, 2] = [50, 50, 40, 40]
  found = box_ops.pairwise_iou(a, b)
  assert found.shape == (2, 7, 5) and found.dtype == jnp.float32
  for image in range(2):
    for i, p in enumerate(a[image].astype(float)):
      for j, q in enumerate(b[image].astype(float)):
        width = max(min(p[2], q[2]) - max(p[0], q[0]), 0)
        height = max(min(p[3], q[3]) - max(p[1], q[1]), 0)
        areas = [max(r[2] - r[0], 0) * max(r[3] - r[1], 0) for r in (p, q)]
        union = sum(areas) - width * height
        expected = width * height / union if union else 0
        assert abs(found[image, i, j] - expected) < 1e-6
  np.testing.assert_allclose(box_ops.area(a)[0], np.prod(a[0, :, 2:] - a[0, :, :2], -1), rtol=1e-6)
  assert box_ops.area(b)[1, 2] == 0


def test_clip_matches_each_image_to_its_size():
  boxes = np.array([[[-5, -6, 30, 40]], [[1, 2, 3, 4]]], np.float32)
  sizes = np.array([[20, 25], [3, 2]], np.int32)  # (height, width)
  expected = [[[0, 0, 25, 20]], [[1, 2, 2, 3]]]
  np.testing.assert_array_equal(box_ops.clip(boxes, sizes), expected)
  np.testing.assert_array_equal(box_ops.clip(boxes[:, None], sizes), np.asarray(expected)[:, None])
  np.testing.assert_array_equal(box_ops.clip(boxes[0, 0], sizes[0]), expected[0][0])


@pytest.mark.usefixtures("without_type_checks")
def test_sizes_that_do_not_fit():
  with pytest.raises(ValueError, match="height, width"):
    box_ops.clip(np.zeros((2, 1, 4), np.float32), np.array([20], np.int32))


def test_encode_is_hand_computed_and_decode_inverts_it():
  roi, target = np.array([10, 20, 30, 60.0]), np.array([14, 20, 54, 40.0])
  expected = np.array([(34 - 20) / 20, (30 - 40) / 40, np.log(2), np.log(0.5)]) / _STDS
  np.testing.assert_allclose(box_ops.encode_deltas(roi, target, _STDS), expected, rtol=1e-6)
  rng = np.random.default_rng(1)
  rois, targets = _boxes(rng, 3, 50), _boxes(rng, 3, 50)
  deltas = box_ops.encode_deltas(rois, targets, _STDS)
  np.testing.assert_allclose(box_ops.decode_deltas(rois, deltas, _STDS), targets, atol=1e-3)


def test_decode_limits_sizes_and_clips():
  roi = jnp.array([[0.0, 0.0, 10.0, 10.0]])
  unbounded = box_ops.decode_deltas(roi, jnp.array([[0, 0, 1e9, -1e9]]), (1, 1, 1, 1))
  np.testing.assert_allclose(unbounded, [[5 - 312.5, 5 - 0.08, 5 + 312.5, 5 + 0.08]], rtol=1e-5)
  clipped = box_ops.decode_deltas(
    roi, jnp.array([[0, 0, 1e9, -1e9]]), (1, 1, 1, 1), image_size=jnp.array([8, 20])
  )
  np.testing.assert_allclose(clipped, [[0, 4.92, 20, 5.08]], rtol=1e-5)


def test_degenerate_boxes_stay_finite_with_gradients():
  rois = jnp.array([[0, 0, 0, 0], [5, 5, 5, 9], [9, 9, 3, 3], [0, 0, 4, 4]], jnp.float32)
  targets = jnp.array([[0, 0, 0, 0], [1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 3, 3]], jnp.float32)
  deltas = box_ops.encode_deltas(rois, targets, _STDS)
  assert np.isfinite(deltas).all()
  gradient = jax.grad(lambda d: jnp.sum(box_ops.decode_deltas(rois, d, _STDS)))(deltas)
  assert np.isfinite(gradient).all()
  assert np.isfinite(box_ops.decode_deltas(rois, deltas, _STDS)).all()
  np.testing.assert_array_equal(box_ops.is_valid_size(rois), [False, False, False, True])


def test_decode_equals_golden_refinement():
  folder = paths.golden_dir() / "htc"
  golden = np.load(folder / "htc.npz")
  spec = json.loads((folder / "htc.json").read_text())
  rois = np.stack([golden["rois.0"], golden["rois.1"]])
  for stage, head in enumerate(spec["config"]["roi_head"]["bbox_head"]):
    found = box_ops.decode_deltas(
      rois,
      golden[f"stage{stage}.reg"].reshape(rois.shape),
      head["bbox_coder"]["target_stds"],
      image_size=np.asarray(spec["image_sizes"]),
    )
    np.testing.assert_allclose(found.reshape(-1, 4), golden[f"stage{stage}.refined"], rtol=1e-5, atol=1e-4)
