"""Image and labels stay together, in fixed shapes, as a pure function of the generator."""

import colorsys

import numpy as np
from PIL import Image
import pytest

from frozen_vision.data.detection import transforms
from frozen_vision.data.segmentation import transforms as seg

_PLAIN = dict(jitter=None, flip_probability=0.0)


# Of classes 0 to 4, and of pixels without one; no mixture of two of them is near a third.
_COLOURS = np.array(
  [[255, 0, 0], [0, 255, 0], [255, 255, 0], [255, 0, 255], [0, 255, 255], [0, 0, 255]], np.uint8
)


def make_record(size=(80, 120), seed=0):
  """Rectangles of classes 1 to 4 on class 0; the last rows have no label."""
  rng = np.random.default_rng(seed)
  label = np.zeros(size, np.uint8)
  for c in range(1, 5):
    y, x = (int(rng.integers(0, side * 2 // 3)) for side in size)
    label[y : y + size[0] // 3, x : x + size[1] // 3] = c
  label[-10:] = 255
  image = _COLOURS[np.minimum(label, 5)]
  return {"image": image, "label": label, "name": "made"}


def nearest_class(image):
  """The class whose colour a pixel has, and how far it is from it."""
  distance = np.abs(image[..., None, :].astype(int) - _COLOURS).sum(-1)
  return np.append(np.arange(5), 255)[distance.argmin(-1)], distance.min(-1)


@pytest.mark.parametrize("seed", range(4))
def test_labels_follow_the_image(seed):
  transform = seg.SegmentationTrain((64, 72), 5, seg.RandomShortSide((40, 80, 120, 160), 400), jitter=None)
  example = transform(make_record(seed=seed), np.random.default_rng(seed))
  height, width = example["image_size"]
  assert example["image"].shape == (64, 72, 3) and example["labels"].shape == (64, 72)
  assert not example["image"][height:].any() and not example["image"][:, width:].any()
  assert (example["labels"][height:] == 255).all() and (example["labels"][:, width:] == 255).all()
  shown, distance = nearest_class(example["image"][:height, :width])
  pure = distance < 8  # not blended by the resizing
  assert pure.mean() > 0.6
  assert (shown == example["labels"][:height, :width])[pure].mean() > 0.99


def test_segments_are_the_classes_of_the_crop():
  transform = seg.SegmentationTrain((64, 72), 6, seg.RandomShortSide((160,), 400), **_PLAIN)
  some_missing = False
  for seed in range(8):
    example = transform(make_record(), np.random.default_rng(seed))
    present = np.unique(example["labels"][example["labels"] != 255])
    count = example["segment_valid"].sum()
    np.testing.assert_array_equal(example["segment_labels"][:count], present)
    assert example["segment_valid"][:count].all() and not example["segment_labels"][count:].any()
    some_missing |= count < 5
  assert some_missing


def test_of_too_many_classes_the_largest_are_kept():
  record = make_record()
  record["label"] = np.repeat([3, 0, 7, 1, 9], [60, 30, 5, 20, 5]).astype(np.uint8)[None].repeat(80, axis=0)
  transform = seg.SegmentationTrain((80, 120), 3, seg.RandomShortSide((80,), 120, 1.0), **_PLAIN)
  example = transform(record, np.random.default_rng(0))
  np.testing.assert_array_equal(example["segment_labels"], [0, 1, 3])
  np.testing.assert_array_equal(example["labels"], record["label"])


def test_scales_are_drawn_from_the_list_within_the_long_side():
  resize = seg.RandomShortSide((40, 80, 400), 240, 1.0)
  label = np.zeros((80, 120), np.uint8)
  found = {resize(label, (1000, 1000), np.random.default_rng(seed)).resized for seed in range(30)}
  assert found == {(40, 60), (80, 120), (160, 240)}


def test_a_crop_of_one_class_is_drawn_again():
  label = np.zeros((64, 640), np.uint8)
  label[:, 600:] = 1
  tries = range(200)
  shares = {}
  for limit in (1.0, 0.75):
    resize = seg.RandomShortSide((64,), 640, limit)
    crops = [resize(label, (64, 64), np.random.default_rng(seed)) for seed in tries]
    shares[limit] = np.mean([crop.left + 64 > 600 + 16 for crop in crops])  # at least a quarter is class 1
  # A crop is varied with probability 1 / 36 per try or so: ten tries do not always find one, and then take
  # the last.
  assert shares[1.0] < 0.15 < shares[0.75] < 1
  unlabelled = np.full((64, 640), 255, np.uint8)
  assert resize(unlabelled, (64, 64), np.random.default_rng(0)).size == (64, 64)


def test_flip_mirrors_both():
  resize = seg.RandomShortSide((80,), 120, 1.0)
  plain, flipped = (
    seg.SegmentationTrain((80, 120), 5, resize, None, probability)(make_record(), np.random.default_rng(0))
    for probability in (0.0, 1.0)
  )
  np.testing.assert_array_equal(plain["image"][:, ::-1], flipped["image"])
  np.testing.assert_array_equal(plain["labels"][:, ::-1], flipped["labels"])


def test_examples_are_a_function_of_the_generator():
  transform = seg.SegmentationTrain((64, 72), 5, seg.RandomShortSide((80, 120, 160), 400))
  one, again, other = (transform(make_record(), np.random.default_rng(seed)) for seed in (5, 5, 6))
  for key in one:
    np.testing.assert_array_equal(one[key], again[key])
  assert (one["image"] != other["image"]).any()


def test_unlabelled_images_cannot_be_trained_on():
  transform = seg.SegmentationTrain((8, 8), 5, seg.RandomShortSide((8,), 16))
  with pytest.raises(ValueError, match="made is unlabelled"):
    transform({**make_record(), "label": None}, np.random.default_rng(0))


class Chosen(np.random.Generator):
  """A generator that gives the numbers it is told to."""

  def __init__(self, switches, values):
    super().__init__(np.random.PCG64(0))
    self._switches, self._values = np.asarray(switches), iter(values)

  def random(self, size=None):
    return 1.0 - self._switches if size else next(self._values)


_PIXELS = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)


def expected_colours(image, brightness=0.0, contrast=1.0, saturation=1.0, turn=0.0, contrast_first=True):
  """SSD's order with the standard library's HSV, in floating point."""
  x = np.clip(image.astype(float) + brightness, 0, 255)
  if contrast_first:
    x = np.clip(x * contrast, 0, 255)
  for pixel in x.reshape(-1, 3):
    h, s, v = colorsys.rgb_to_hsv(*pixel / 255)
    pixel[:] = np.array(colorsys.hsv_to_rgb((h + turn / 360) % 1, min(s * saturation, 1), v)) * 255
  return x if contrast_first else np.clip(x * contrast, 0, 255)


@pytest.mark.parametrize(
  "switches, values, expected",
  [
    ((0, 0, 0, 0, 0), (0.9, 0.9, 0.9, 0.9), {}),
    ((1, 0, 0, 0, 0), (1.0, 0, 0, 0), dict(brightness=32)),
    ((1, 1, 0, 0, 0), (0.0, 0, 0, 0), dict(brightness=-32)),
    ((0, 1, 1, 0, 0), (0, 1.0, 0, 0), dict(contrast=1.5)),
    ((0, 0, 0, 1, 0), (0, 0, 0.0, 0), dict(saturation=0.5)),
    ((0, 1, 0, 0, 1), (0, 0, 0, 1.0), dict(turn=36)),
    ((0, 0, 0, 0, 1), (0, 0, 0, 0.0), dict(turn=-36)),
    (
      (1, 0, 1, 1, 1),
      (0.25, 0.0, 1.0, 0.75),
      dict(brightness=-16, contrast=0.5, saturation=1.5, turn=18, contrast_first=False),
    ),
  ],
)
def test_colour_jitter(switches, values, expected):
  found = seg.ColourJitter()(_PIXELS, Chosen(switches, values))
  assert found.dtype == np.uint8
  # 8 bits per channel in HSV; the hue has 256 steps for six times 255 colours.
  tolerance = 1.01 if not any(switches[3:]) else 8
  np.testing.assert_allclose(found, expected_colours(_PIXELS, **expected), atol=tolerance)
  if not any(switches):
    np.testing.assert_array_equal(found, _PIXELS)


def test_colour_jitter_draws_every_combination():
  rng = np.random.default_rng(0)
  gray = np.full((2, 2, 3), 100, np.uint8)
  changed = [seg.ColourJitter()(gray, rng)[0, 0, 0] != 100 for _ in range(400)]
  assert 0.7 < np.mean(changed) < 0.8  # brightness or contrast: 3/4


def test_evaluation_example():
  record = make_record((80, 120))
  resize = transforms.ResizeToLimits(40, 90)
  example = seg.SegmentationEval((64, 64), resize, (1.0, 0.5, 2.0))({**record, "label": None})
  np.testing.assert_array_equal(example["original_size"], [80, 120])
  for ending, frame, size in (("", 64, (40, 60)), (".1", 32, (20, 30)), (".2", 128, (80, 120))):
    assert example[f"image{ending}"].shape == (frame, frame, 3)
    np.testing.assert_array_equal(example[f"image_size{ending}"], size)
    wanted = np.asarray(Image.fromarray(record["image"]).resize(size[::-1], Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(example[f"image{ending}"][: size[0], : size[1]], wanted)
    assert not example[f"image{ending}"][size[0] :].any()
  odd = seg.SegmentationEval((64, 64), transforms.ResizeToLimits(), (1.0, 0.75))({**record, "label": None})
  assert odd["image.1"].shape == (64, 64, 3)  # 48 rounded up
  np.testing.assert_array_equal(odd["image_size.1"], [32, 48])
