"""Training examples of normals and depth: image and maps move together."""

import numpy as np

from frozen_vision.data.dense import sources
from frozen_vision.data.dense import transforms as dense_transforms
from frozen_vision.data.detection import transforms
from frozen_vision.data.generated import rooms
from frozen_vision.data.segmentation import transforms as segmentation_transforms


def _transform(frame, short_side, flip=0.0, targets=sources.TARGETS, eval_frame=(48, 64)):
  return dense_transforms.DenseTrain(
    frame,
    targets,
    segmentation_transforms.RandomShortSide((short_side,), 1000, 1.0),
    segmentation_transforms.SegmentationEval(eval_frame, transforms.ResizeToLimits()),
    flip_probability=flip,
  )


def test_an_example_at_its_own_size_is_the_record():
  record = rooms.Rooms(1, (48, 64))[0]
  example = _transform((48, 80), 48)(record, np.random.default_rng(0))
  assert example["image_size"].tolist() == [48, 64]
  for name in ("image", "normals", "depth"):
    np.testing.assert_array_equal(example[name][:, :64], record[name])
    assert not example[name][:, 64:].any()


def test_a_mirrored_example_is_that_of_a_mirrored_room():
  record = rooms.Rooms(1, (48, 64))[0]
  example = _transform((48, 64), 48, flip=1.0)(record, np.random.default_rng(0))
  np.testing.assert_array_equal(example["image"], record["image"][:, ::-1])
  np.testing.assert_array_equal(example["depth"], record["depth"][:, ::-1])
  # A surface's normal is that of the points it consists of, mirrored or not.
  points, normals = rooms.points(example["depth"].astype(np.float64)), example["normals"]
  np.testing.assert_array_equal(normals, record["normals"][:, ::-1] * np.float32([-1, 1, 1]))
  steps = points[:, 1:] - points[:, :-1]
  same = np.all(normals[:, 1:] == normals[:, :-1], axis=-1) & (np.abs(steps[..., 2]) < 0.05)
  assert np.median(np.abs((steps * normals[:, 1:]).sum(-1))[same]) < 1e-6


def test_what_is_shown_larger_is_nearer():
  record = rooms.Rooms(1, (48, 64))[0]
  rng = np.random.default_rng
  double = _transform((96, 128), 96)(record, rng(0))
  np.testing.assert_allclose(double["depth"][::2, ::2], record["depth"] / 2, rtol=1e-6)
  np.testing.assert_array_equal(double["normals"][1::2, 1::2], record["normals"])
  # Where evaluation looks at twice the size, too, depth is as measured.
  usual = _transform((96, 128), 96, eval_frame=(96, 128))(record, rng(0))
  np.testing.assert_allclose(usual["depth"][::2, ::2], record["depth"], rtol=1e-6)


def test_an_example_has_the_targets_alone():
  record = rooms.Rooms(1, (48, 64))[0]
  for target in sources.TARGETS:
    example = _transform((48, 64), 48, targets=(target,))(record, np.random.default_rng(0))
    assert set(example) == {"image", "image_size", target}
