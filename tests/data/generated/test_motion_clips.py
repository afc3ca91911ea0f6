"""Generated clips: pure functions of their index, and classes that single frames do not tell."""

import pickle

import numpy as np
import pytest

from frozen_vision.data.generated import motion_clips


def test_clips_are_pure_functions_of_their_index():
  source = motion_clips.MotionClipSource(12, 4, 32)
  record = source[7]
  assert record["frames"].shape == (4, 32, 32, 3) and record["frames"].dtype == np.uint8
  assert record["label"] == 1 and record["label"].dtype == np.int32
  again = pickle.loads(pickle.dumps(motion_clips.MotionClipSource(100, 4, 32)))[7]
  np.testing.assert_array_equal(again["frames"], record["frames"])
  others = [
    motion_clips.MotionClipSource(12, 4, 32, **changes)[7]["frames"].tobytes()
    for changes in (dict(seed=1), dict(split="validation"))
  ]
  assert len({record["frames"].tobytes(), *others}) == 3
  assert [int(source[i]["label"]) for i in range(12)] == list(range(6)) * 2


def test_first_frames_are_the_same_in_every_class():
  source = motion_clips.MotionClipSource(3, 5, 32)
  for index in range(3):
    rendered = [source.render(index, label) for label in range(6)]
    for clip in rendered[1:]:
      np.testing.assert_array_equal(clip[0], rendered[0][0])
    assert len({clip.tobytes() for clip in rendered}) == 6


@pytest.mark.parametrize("forwards, backwards", [("left", "right"), ("up", "down"), ("growing", "shrinking")])
def test_opposite_classes_differ_in_nothing_but_order(forwards, backwards):
  """At any moment, frames of a class and of its opposite are drawn from one distribution: means agree."""
  names, count = motion_clips.CLASS_NAMES, 250
  source = motion_clips.MotionClipSource(2 * count, 2, 32)
  # Clips of their own for each class, so that differences are those of independent samples.
  first, second = (
    np.stack([source.render(start + i, names.index(name))[1] for i in range(count)]).astype(np.float64)
    for start, name in ((0, forwards), (count, backwards))
  )
  z = (first.mean(0) - second.mean(0)) / np.sqrt((first.var(0) + second.var(0)) / count)
  assert np.abs(z).max() < 5 and z.std() < 1.7


def _linear_accuracy(train, validation):
  """Top-1 on held-out clips of ridge regression onto the classes."""
  (x, labels), (x_test, labels_test) = train, validation
  mean, scale = x.mean(0), x.std(0) + 1e-6
  x, x_test = (x - mean) / scale, (x_test - mean) / scale
  x, x_test = (np.concatenate([part, np.ones((len(part), 1))], 1) for part in (x, x_test))
  weights = np.linalg.solve(x.T @ x + 30 * np.eye(x.shape[1]), x.T @ np.eye(6)[labels])
  return float(np.mean((x_test @ weights).argmax(1) == labels_test))


def test_a_linear_head_on_a_single_frame_stays_at_chance_and_on_motion_does_not():
  """Chance is 1/6; 450 held-out clips put three standard deviations at 0.053."""
  features = {"frame": [], "motion": []}
  for split, count in (("train", 900), ("validation", 450)):
    source = motion_clips.MotionClipSource(count, 4, 32, split=split)
    frames, motion, labels = [], [], []
    for index in range(count):
      record = source[index]
      small = record["frames"].reshape(4, 8, 4, 8, 4, 3).mean((2, 4, 5))
      frames.append(small[2].reshape(-1))
      # Correlations of neighbouring frames, shifted by a cell each way, and the change of what stands out.
      a, b = (part - small.mean(0) for part in (small[:-1], small[1:]))
      energy = (small - np.median(small, axis=0)) ** 2
      motion.append(
        [
          *((a * np.roll(b, shift, axis=axis)).mean() for axis in (1, 2) for shift in (-1, 1)),
          energy[2:].mean() - energy[:2].mean(),
        ]
      )
      labels.append(record["label"])
    features["frame"].append((np.array(frames), np.array(labels)))
    features["motion"].append((np.array(motion), np.array(labels)))
  assert abs(_linear_accuracy(*features["frame"]) - 1 / 6) < 0.053
  assert _linear_accuracy(*features["motion"]) > 0.3


@pytest.mark.parametrize(
  "options", [dict(split="test"), dict(num_frames=0), dict(image_size=16), dict(seed=-1)]
)
def test_values_out_of_range(options):
  with pytest.raises(ValueError, match="expected"):
    motion_clips.MotionClipSource(3, **options)
  with pytest.raises(IndexError):
    motion_clips.MotionClipSource(3)[3]
