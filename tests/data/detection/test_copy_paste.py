"""Copy-paste: what is painted, what is hidden, what is dropped."""

import numpy as np
import pytest

from frozen_vision.data import pipeline
from frozen_vision.data.detection import copy_paste as copy_paste_lib
from frozen_vision.data.detection import transforms

H, W, ROWS = 40, 45, 6  # a width that does not fill its last byte


class Always(np.random.Generator):
  """A generator that takes all it may."""

  def __init__(self):
    super().__init__(np.random.PCG64(0))

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
    tuple(_paste(target, source, np.random.default_rng(seed))[0]["boxes"][1:, 0]) for seed in range(60)
  ]
  assert len({draw for draw in draws}) == 8  # every subset of three objects
  again = tuple(_paste(target, source, np.random.default_rng(3))[0]["boxes"][1:, 0])
  assert again == draws[3]


def test_frames_must_agree():
  target = _example([], colour=1)
  with pytest.raises(ValueError, match=r"image is \(40, 45, 3\) in the target and \(20, 45, 3\)"):
    copy_paste_lib.copy_paste(target, target | {"image": target["image"][:20]}, Always())


class Coloured:
  """Record i is an image of colour i + 1 with one square at a place of its own."""

  def __len__(self):
    return 7

  def __getitem__(self, index):
    if index == self.broken:
      raise OSError("the disk is gone")
    image = np.full((32, 32, 3), index + 1, np.uint8)
    mask = np.zeros((1, 32, 32), bool)
    mask[0, 4 * index : 4 * index + 4, 4 * index : 4 * index + 4] = True
    box = np.array([[4 * index, 4 * index, 4 * index + 4, 4 * index + 4]], np.float32)
    return {"image": image, "image_id": index, "boxes": box, "labels": np.array([index]), "masks": mask}

  broken = None


_PLACE = transforms.DetectionTrain((32, 32), 4, transforms.ResizeToLimits(), flip_probability=0.5)


def _batches(count, *, source=None, probability=0.5, **options):
  source = source or Coloured()
  transform = copy_paste_lib.CopyPasteTrain(_PLACE, source, probability)
  with pipeline.train_batches(source, transform, batch_size=4, seed=3, **options) as batches:
    return [next(batches) for _ in range(count)]


def _same(one, other):
  assert len(one) == len(other)
  for a, b in zip(one, other):
    assert set(a) == set(b)
    for key in a:
      np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_pasted_examples_are_a_function_of_seed_and_index():
  whole = _batches(12)
  _same(_batches(4, start_example=32), whole[8:])
  _same(_batches(12, num_threads=4), whole)
  shares = [_batches(12, process_index=i, process_count=2) for i in range(2)]
  _same([{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*shares)], whole)
  # Who shows two colours was pasted on: half of the examples take another image, half of these an object.
  colours = np.array([len(np.unique(image)) for batch in whole for image in batch["image"]])
  assert set(colours) == {1, 2} and 5 < (colours == 2).sum() < 20
  for batch in whole:
    for i, valid in enumerate(batch["valid"]):
      assert len(np.unique(batch["image"][i])) in (1, valid.sum())


@pytest.mark.slow
def test_workers_paste_the_same():
  _same(_batches(6, num_workers=2, start_example=8), _batches(8)[2:])


@pytest.mark.parametrize("probability, pasted", [(0.0, 0.0), (1.0, 0.5)])
def test_probability(probability, pasted):
  batches = _batches(30, probability=probability)
  share = np.mean([len(np.unique(image)) == 2 for batch in batches for image in batch["image"]])
  # Another image is the same one in 1 of 7 cases, and then shows no second colour.
  assert abs(share - pasted * 6 / 7) < 0.15 * (probability > 0) + 1e-9


def test_an_unreadable_second_image_is_named():
  source = Coloured()
  source.broken = 2
  transform = copy_paste_lib.CopyPasteTrain(_PLACE, source, 1.0)
  with pytest.raises(OSError, match="the disk is gone") as caught:
    for seed in range(40):
      transform(source[0], np.random.default_rng(seed))
  assert any("record 2 of the data source, to paste from" in note for note in caught.value.__notes__)
