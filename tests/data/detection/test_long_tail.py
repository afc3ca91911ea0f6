"""Repeat factors, passes that repeat, classes that images were searched for, and long-tailed scenes."""

import json
import pickle

import numpy as np
from PIL import Image
import pytest

from frozen_vision.data import pipeline
from frozen_vision.data.detection import coco, long_tail, transforms
from frozen_vision.data.generated import scenes
from frozen_vision.metrics import coco_ap


def _plain_factors(labels_of_images, threshold):
  """LVIS's rule, image by image."""
  images = {}
  for labels in labels_of_images:
    for label in set(labels):
      images[label] = images.get(label, 0) + 1
  factors = []
  for labels in labels_of_images:
    asked = [1.0]
    for label in labels:
      asked.append((threshold / (images[label] / len(labels_of_images))) ** 0.5)
    factors.append(max(asked))
  return factors


def test_repeat_factors_are_those_of_a_plain_loop():
  rng = np.random.default_rng(0)
  rows = [rng.choice(8, rng.integers(0, 5), p=2.0 ** -np.arange(1, 9) / (1 - 2.0**-8)) for _ in range(60)]
  image_of = np.repeat(np.arange(60), [len(row) for row in rows])
  labels = np.concatenate(rows).astype(np.int32)
  found = long_tail.repeat_factors(image_of, labels, 60, 0.3)
  np.testing.assert_allclose(found, _plain_factors(rows, 0.3), rtol=1e-12)
  assert found.max() > 2 and found.min() == 1
  counts = long_tail.count_classes(image_of, labels, 9)
  assert counts.objects.tolist() == [int((labels == label).sum()) for label in range(9)]
  assert counts.images.tolist() == [sum(label in row for row in rows) for label in range(9)]


def test_a_pass_shows_each_record_as_often_as_asked():
  factors = np.array([1.0, 1.0, 1.5, 2.25, 3.0, 1.1])
  repeated = pipeline.RepeatedPass(factors, seed=3)
  assert repeated.length == 10
  counts = np.array([np.bincount(repeated.positions(number), minlength=6) for number in range(400)])
  assert np.all(counts.sum(1) == 10)
  scaled = factors * 10 / factors.sum()
  assert np.all((counts == np.floor(scaled)) | (counts == np.ceil(scaled)))
  np.testing.assert_allclose(counts.mean(0), scaled, atol=0.08)
  again = pickle.loads(pickle.dumps(repeated))
  assert [again(index, 0) for index in (25, 3, 25)] == [repeated(index, 0) for index in (25, 3, 25)]
  assert np.any(repeated.positions(0) != repeated.positions(1))
  with pytest.raises(ValueError, match="expected 1 or more"):
    pipeline.RepeatedPass(np.array([0.5]), seed=0)


class _Numbers:
  def __len__(self):
    return 5

  def __getitem__(self, index):
    return index


def _example(record, rng):
  return {"position": np.int32(record), "noise": np.int32(rng.integers(1 << 30))}


def test_a_run_that_repeats_records_continues_where_it_stopped():
  repeats = np.array([1.0, 2.0, 1.0, 3.5, 1.0])

  def take(start, count):
    with pipeline.train_batches(
      _Numbers(), _example, batch_size=2, seed=1, start_example=start, repeats=repeats
    ) as batches:
      rows = [next(batches) for _ in range(count)]
    return [np.stack([row[name] for row in rows]) for name in ("position", "noise", "index")]

  whole, rest = take(0, 12), take(14, 5)
  for a, b in zip(whole, rest):
    np.testing.assert_array_equal(a[7:], b)
  first = np.bincount(whole[0].ravel()[:8], minlength=5)  # a pass is 8.5 examples, rounded
  assert first[3] in (3, 4) and first.min() >= 0
  with pytest.raises(ValueError, match="--config.cache.views=0"):
    pipeline.train_batches(_Numbers(), _example, batch_size=2, seed=1, repeats=repeats, views=2)


def _lvis_file(folder, **changes):
  """Two images, three categories; the first image shows categories 2 and 9 and was searched for 5 in vain."""
  folder.mkdir(exist_ok=True)
  for name in ("a.png", "b.png"):
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(folder / name)
  square = [[2, 2, 12, 2, 12, 12, 2, 12]]
  images = [
    dict(id=7, file_name="a.png", height=20, width=30, neg_category_ids=[5], not_exhaustive_category_ids=[9]),
    dict(id=3, file_name="b.png", height=20, width=30, neg_category_ids=[], not_exhaustive_category_ids=[]),
  ]
  images[0] |= changes
  rows = [(7, 2), (7, 9), (3, 2)]
  annotations = [
    dict(id=i + 1, image_id=image, category_id=c, bbox=[2, 2, 10, 10], area=100, segmentation=square)
    for i, (image, c) in enumerate(rows)
  ]
  categories = [dict(id=i, name=str(i), frequency=f) for i, f in ((2, "f"), (5, "r"), (9, "c"))]
  path = folder / "lvis.json"
  path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
  return path


def test_examples_say_which_classes_their_image_was_searched_for(tmp_path):
  source = coco.load_coco(_lvis_file(tmp_path), tmp_path)
  assert source.record(0)["negative_classes"].tolist() == [1]
  assert source.record(0)["not_exhaustive_classes"].tolist() == [2]
  assert "class lists" in source.identity()
  transform = transforms.DetectionTrain((32, 32), 4, transforms.ResizeToLimits(), class_lists=3)
  example = transform(source[0], np.random.default_rng(0))
  assert example["negative"].tolist() == [False, True, False]
  assert example["not_exhaustive"].tolist() == [False, False, True]
  other = transform(source.take([1])[0], np.random.default_rng(0))
  assert not other["negative"].any() and not other["not_exhaustive"].any()
  # A source that does not know counts none as searched for.
  plain = transform(
    {key: value for key, value in source[0].items() if "classes" not in key}, np.random.default_rng(0)
  )
  assert not plain["negative"].any() and not plain["not_exhaustive"].any()
  image_of, labels = long_tail.labelled_objects(source)
  assert (image_of.tolist(), labels.tolist()) == ([0, 0, 1], [0, 2, 0])


@pytest.mark.parametrize("listed", [None, [4], "5", [5.5]])
def test_lists_of_classes_that_are_none_are_named(tmp_path, listed):
  path = _lvis_file(tmp_path, neg_category_ids=listed)
  with pytest.raises(coco.CocoError, match="image 7 has neg_category_ids = .*expected a list of ids of its"):
    coco.load_coco(path, tmp_path)


def test_imbalanced_scenes_have_a_long_tail_and_say_which_classes_are_rare(tmp_path):
  source = scenes.SceneSource(150, 64, imbalance=50.0, frequencies=True)
  counts = np.bincount(np.concatenate([source.scene(i).labels for i in range(150)]), minlength=6)
  assert counts[0] > 10 * counts[5] and counts[0] > counts[2] > counts[4]
  assert [category["frequency"] for category in source.categories] == list("ffccrr")
  assert source.imbalance == 50 and "imbalance=50.0" in repr(source)
  # As before where no one asks for it.
  plain = scenes.SceneSource(2, 64)
  assert "frequency" not in plain.categories[0] and "imbalance" not in repr(plain)
  with pytest.raises(ValueError, match="imbalance is 0.5; expected 1"):
    scenes.SceneSource(1, 64, imbalance=0.5)
  truth = scenes.SceneSource(4, 64, split="validation", frequencies=True).ground_truth
  positions, labels = long_tail.labelled_objects(scenes.SceneSource(4, 64, split="validation"))
  assert len(positions) == len(truth["annotations"]) and labels.max() < 6
  found = [
    {key: row[key] for key in ("image_id", "category_id", "bbox", "segmentation")} | {"score": 1.0}
    for row in truth["annotations"]
  ]
  for name, content in (("truth", truth), ("found", found)):
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
  metrics = coco_ap.evaluate_files(tmp_path / "truth.json", tmp_path / "found.json", ("bbox",))
  assert metrics["box_AP"] == pytest.approx(1) and metrics["box_AP_rare"] == pytest.approx(1)
