"""Copy-paste: what is painted, what is hidden, what is dropped."""

import numpy as np
import pytest

from frozen_vision.data import copy_paste as copy_paste_lib

H, W, ROWS = 40, 45, 6  # a width that does not fill its last byte


class Always:
  """A generator that takes all it may."""

  def integers(self, low, high):
    del low
    return high - 1

  def choice(self, values, size, replace):
    assert not replace
    return values[:size]


def _example(boxes, *, colour, size=(H, W)):
  """Objects that fill their boxes; labels 1, 2, ..."""
  boxes = np.reshape(np.asarray(boxes, np.float32), (-1, 4))
  masks = np.zeros((ROWS, H, W), bool)
  for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int)):
    mask[y1:y2, x1:x2] = True
  image = np.zeros((H, W, 3), np.uint8)
  image[: size[0], : size[1]] = colour
  return {
      "image": image,
      "image_size": np.array(size, np.int32),
      "boxes": np.concatenate([boxes, np.zeros((ROWS - len(boxes), 4), np.float32)]),
      "labels": (np.arange(ROWS) + 1) * (np.arange(ROWS) < len(boxes)).astype(np.int32),
      "masks": np.packbits(masks, axis=-1),
      "valid": np.arange(ROWS) < len(boxes),
      "index": np.int64(7),
  }


def _paste(target, source, rng=Always(), **options):
  before = [{k: np.array(v) for k, v in example.items()} for example in (target, source)]
  found = copy_paste_lib.copy_paste(target, source, rng, **options)
  for example, copy in zip((target, source), before):
    for key in copy:
      np.testing.assert_array_equal(example[key], copy[key], err_msg=key)
  assert set(found) == set(target) and found["index"] == 7
  for key in ("image", "boxes", "labels", "masks", "valid"):
    assert found[key].shape == target[key].shape
    assert found[key].dtype == target[key].dtype
  masks = np.unpackbits(found["masks"], axis=-1)
  assert not masks[:, :, W:].any() and masks[:, :, :W].sum(0).max() <= 1
  for key in ("boxes", "labels", "masks"):
    assert not found[key][~found["valid"]].any()
  return found, masks[:, :, :W].astype(bool)


def test_pasted_objects_lie_on_top():
  target = _example([[2, 2, 12, 12], [20, 20, 40, 36]], colour=10)
  source = _example([[8, 2, 16, 12], [0, 30, 5, 38]], colour=200)
  found, masks = _paste(target, source)
  np.testing.assert_array_equal(found["valid"], [1, 1, 1, 1, 0, 0])
  np.testing.assert_array_equal(found["labels"], [1, 2, 1, 2, 0, 0])
  expected = [[2, 2, 8, 12], [20, 20, 40, 36], [8, 2, 16, 12], [0, 30, 5, 38]]
  np.testing.assert_array_equal(found["boxes"][:4], expected)
  assert (found["image"][masks[2] | masks[3]] == 200).all()
  assert (found["image"][~(masks[2] | masks[3])] == 10).all()
  assert masks[0].sum() == 6 * 10


@pytest.mark.parametrize(
    "cover, options, stays",
    [
        ((0, 0, 15, 20), {}, False),  # a side moves by 13 pixels, 260 are visible
        ((0, 0, 15, 20), dict(min_visible_area=259), True),
        ((0, 0, 15, 20), dict(box_tolerance=13), True),
        ((0, 0, 12, 20), {}, True),  # a side moves by 10 pixels
        ((2, 0, 28, 20), dict(min_visible_area=0), False),  # nothing is visible
    ],
)
def test_hidden_objects(cover, options, stays):
  target = _example([[2, 0, 28, 20]], colour=10)
  found, masks = _paste(target, _example([cover], colour=200), **options)
  assert found["valid"].sum() == 1 + stays
  if stays:
    np.testing.assert_array_equal(found["boxes"][0], [cover[2], 0, 28, 20])
    assert masks[0].sum() == (28 - cover[2]) * 20
  np.testing.assert_array_equal(found["boxes"][int(stays)], cover)


def test_padding_stays_padding():
  target = _example([], colour=10, size=(20, 30))
  source = _example([[10, 10, 40, 15], [31, 0, 40, 9], [0, 25, 9, 30]], colour=200)
  found, masks = _paste(target, source)
  np.testing.assert_array_equal(found["valid"], [1, 0, 0, 0, 0, 0])
  np.testing.assert_array_equal(found["boxes"][0], [10, 10, 30, 15])
  assert not found["image"][20:].any() and not found["image"][:, 30:].any()
  assert masks[0].sum() == 20 * 5


def test_as_many_as_there_are_rows_and_the_limit():
  boxes = [[4 * i, 0, 4 * i + 3, 3] for i in range(5)]
  target = _example([[0, 10 + 5 * i, 9, 14 + 5 * i] for i in range(4)], colour=1)
  found, _ = _paste(target, _example(boxes, colour=2))
  assert found["valid"].all()
  found, _ = _paste(_example([], colour=1), _example(boxes, colour=2), max_pasted=4)
  assert found["valid"].sum() == 3


def test_empty_examples_and_chance():
  target, empty = _example([[2, 2, 12, 12]], colour=10), _example([], colour=200)
  found, _ = _paste(target, empty)
  for key in target:
    np.testing.assert_array_equal(found[key], target[key], err_msg=key)
  source = _example([[20, 0, 23, 3], [25, 0, 28, 3], [30, 0, 33, 3]], colour=200)
  draws = [
      tuple(_paste(target, source, np.random.default_rng(seed))[0]["boxes"][1:, 0])
      for seed in range(60)
  ]
  assert len({draw for draw in draws}) == 8  # every subset of three objects
  again = tuple(_paste(target, source, np.random.default_rng(3))[0]["boxes"][1:, 0])
  assert again == draws[3]


def test_frames_must_agree():
  target = _example([], colour=1)
  with pytest.raises(ValueError, match=r"image is \(40, 45, 3\) in the target and \(20, 45, 3\)"):
    copy_paste_lib.copy_paste(target, target | {"image": target["image"][:20]}, Always())
