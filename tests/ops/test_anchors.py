import numpy as np

from frozen_vision.ops import anchors


def test_anchors_are_hand_computed_in_order():
  found = anchors.grid_anchors(2, 3, 4)
  assert found.shape == (18, 4) and found.dtype == np.float32
  root = np.sqrt(2)
  sides = [(32 * root, 32 / root), (32, 32), (32 / root, 32 * root)]  # ratio .5 is wide
  index = 0
  for y in range(2):
    for x in range(3):
      for width, height in sides:
        expected = [4 * x - width / 2, 4 * y - height / 2, 4 * x + width / 2, 4 * y + height / 2]
        np.testing.assert_allclose(found[index], expected, rtol=1e-6)
        index += 1


def test_scales_vary_faster_than_ratios():
  found = anchors.grid_anchors(1, 1, 8, scales=(2, 4), ratios=(1, 4))
  np.testing.assert_allclose(found[:, 2] - found[:, 0], [16, 32, 8, 16])
  np.testing.assert_allclose(found[:, 3] - found[:, 1], [16, 32, 32, 64])


def test_inside_flags_are_strict_on_the_far_side():
  boxes = np.array([[0, 0, 9, 9], [-1, 0, 5, 5], [0, 0, 10, 5], [0, 0, 5, 20], [0, 0, 5, 19]])
  size = np.array([[20, 10], [21, 11]])  # (height, width)
  np.testing.assert_array_equal(
    anchors.inside_flags(boxes, size, 0),
    [[True, False, False, False, True], [True, False, True, True, True]],
  )
  np.testing.assert_array_equal(anchors.inside_flags(boxes, size[0], 1), [True] * 5)
  np.testing.assert_array_equal(anchors.inside_flags(boxes - 100, size[0], -1), [True] * 5)
