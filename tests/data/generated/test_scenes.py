"""Generated scenes: what the docstrings promise, measured."""

import hashlib
import json
import pickle

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
import pytest

from frozen_vision.data.generated import painting, scenes


@pytest.fixture(scope="module")
def source():
  return scenes.SceneSource(200, 128, seed=3, split="validation")


@pytest.fixture(scope="module")
def records(source):
  return [source[i] for i in range(len(source))]


def equal(a, b):
  assert a.keys() == b.keys()
  return all(np.array_equal(a[key], b[key]) for key in a)


def test_record_format(records):
  for record in records[:50]:
    n = len(record["labels"])
    assert record["image"].shape == (128, 128, 3) and record["image"].dtype == np.uint8
    assert record["boxes"].shape == (n, 4) and record["boxes"].dtype == np.float32
    assert record["labels"].dtype == np.int32
    assert record["masks"].shape == (n, 128, 128) and record["masks"].dtype == bool
    assert record["crowd"].shape == (n,) and not record["crowd"].any()
    assert record["area"].dtype == np.float32
    assert (record["height"], record["width"]) == (128, 128)
  assert len({record["image_id"] for record in records}) == len(records)
  assert len({record["file_name"] for record in records}) == len(records)


def test_truth_is_tight_disjoint_and_fair(records):
  for record in records:
    assert 3 <= len(record["labels"]) <= 8
    assert record["labels"].min() >= 0 and record["labels"].max() < len(scenes.CLASS_NAMES)
    assert record["masks"].sum(0).max() == 1  # visible pixels: nobody shares one
    np.testing.assert_array_equal(record["masks"].sum((1, 2)), record["area"])
    for mask, (x1, y1, x2, y2) in zip(record["masks"], record["boxes"]):
      rows, columns = np.nonzero(mask)
      assert (columns.min(), rows.min()) == (x1, y1)
      assert (columns.max() + 1, rows.max() + 1) == (x2, y2)
      assert min(x2 - x1, y2 - y1) >= 12
      assert max(x2 - x1, y2 - y1) <= 64


def test_statistics_over_200_scenes(source, records):
  figures = scenes.statistics(source)
  assert figures["objects"] == sum(len(record["labels"]) for record in records)
  assert figures["per_image_min"] == 3 and figures["per_image_max"] == 8
  assert figures["overlapping"] >= 0.5
  assert figures["visible_min"] >= 0.4
  assert figures["side_min"] == 12 and 56 <= figures["side_max"] <= 64
  assert figures["class_min"] >= 0.12 and figures["class_max"] <= 0.22
  # The same from the records alone: boxes that overlap by a tenth of the smaller one.
  overlapping = []
  for record in records:
    boxes = record["boxes"]
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    intersection = np.clip(high - low, 0, None).prod(-1) * (1 - np.eye(len(boxes)))
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    overlapping += list((intersection > 0.1 * np.minimum(areas, areas[:, None])).any(1))
  assert np.mean(overlapping) >= 0.3


def test_objects_differ_from_what_surrounds_them(records):
  differences = []
  for record in records[:60]:
    image = record["image"].astype(np.float32)
    background = ~record["masks"].any(0)
    for mask in record["masks"]:
      near = mask.copy()
      for _ in range(3):
        grown = near.copy()
        grown[1:] |= near[:-1]
        grown[:-1] |= near[1:]
        grown[:, 1:] |= near[:, :-1]
        grown[:, :-1] |= near[:, 1:]
        near = grown
      around = near & background
      if around.sum() >= 20:
        differences.append(np.abs(image[mask].mean(0) - image[around].mean(0)).sum())
  assert np.percentile(differences, 5) >= 60  # sum over the channels of 0..255
  assert np.median(differences) >= 120


def test_backgrounds_are_textured(records):
  for record in records[:60]:
    image = record["image"].astype(np.float32)
    background = ~record["masks"].any(0)
    steps = np.abs(np.diff(image, axis=1)).mean(-1)[background[:, 1:] & background[:, :-1]]
    assert steps.mean() > 0.5
    assert image[background].std(0).mean() > 4


def test_colour_and_size_say_little_about_the_class(records):
  colours, sides, labels = [], [], []
  for record in records:
    for mask, box, label in zip(record["masks"], record["boxes"], record["labels"]):
      colours.append(record["image"][mask].mean(0))
      sides.append(np.log(box[2:] - box[:2]).mean())
      labels.append(label)
  features = np.column_stack([np.array(colours) / 255, sides])
  labels = np.array(labels)
  centres = np.stack([features[labels == c].mean(0) for c in range(len(scenes.CLASS_NAMES))])
  spread = features.std(0)
  assert (np.abs(centres - features.mean(0)) < 0.4 * spread).all()


def test_random_access_is_a_pure_function(source, records):
  again = scenes.SceneSource(5, (128, 128), seed=3, split="validation")
  for i in (4, 0, 2):
    assert equal(again[i], records[i])
    assert equal(again[np.int64(i)], records[i])
  copy = pickle.loads(pickle.dumps(source))
  assert equal(copy[7], records[7])


def test_pickle_leaves_the_ground_truth_behind():
  source = scenes.SceneSource(3, 64)
  size = len(pickle.dumps(source))
  assert len(source.ground_truth["images"]) == 3
  assert len(pickle.dumps(source)) == size
  assert "ground_truth" not in pickle.loads(pickle.dumps(source)).__dict__


def test_seeds_and_splits_never_share_a_scene():
  seen = set()
  for split in ("train", "validation"):
    for seed in range(4):
      source = scenes.SceneSource(20, 64, seed=seed, split=split)
      seen |= {hashlib.sha256(source[i]["image"].tobytes()).hexdigest() for i in range(20)}
  assert len(seen) == 2 * 4 * 20


def test_scenes_stay_the_same_on_every_platform_and_numpy():
  """A change here changes the data that published figures on built-in data were measured on."""
  digest = hashlib.sha256()
  source = scenes.SceneSource(20, 128, seed=0, split="validation")
  for i in range(20):
    record = source[i]
    digest.update(np.packbits(record["masks"]).tobytes())
    digest.update(record["labels"].astype("<i4").tobytes())
    digest.update(record["image"].tobytes())
  assert digest.hexdigest() == "5471a97bdf56dfee4e8bf3c0df2c8882e802fca587e0a631e7f74161a3d8663b"


@pytest.mark.parametrize("image_size", [64, (64, 150), (200, 96), 192])
def test_other_sizes(image_size):
  source = scenes.SceneSource(25, image_size, seed=1)
  figures = scenes.statistics(source)
  height, width = source.image_size
  assert source[0]["image"].shape == (height, width, 3)
  assert figures["per_image_min"] >= 3
  assert figures["side_min"] >= 12 and figures["side_max"] <= min(height, width) / 2
  assert figures["overlapping"] >= 0.3


def test_edges_are_smooth_and_agree_with_the_mask():
  shape = painting.Shape(0, 30.3, 31.8, 12.0, (1.0, 0.0), 0.5)
  patch = painting.make_patch(shape, 64, 64)
  canvas = np.zeros((64, 64, 3), np.float32)
  painting.paint_shape(painting.Random(0), shape, patch, canvas)
  mask = np.zeros((64, 64), bool)
  mask[patch.rows, patch.columns] = patch.distance < 0
  assert abs(mask.sum() - np.pi * 12**2) < 6
  brightness = canvas.max(-1)
  assert (brightness[mask] > 0).all()
  outside = (brightness > 0) & ~mask
  assert 0 < outside.sum() < 100  # the anti-aliased rim, at most one pixel wide
  y, x = np.nonzero(outside)
  assert (np.hypot(x + 0.5 - 30.3, y + 0.5 - 31.8) < 12.5).all()


@pytest.mark.parametrize("label", range(len(scenes.CLASS_NAMES)))
@pytest.mark.parametrize("angle", [0.0, 0.4, 2.0])
def test_shapes_stay_in_their_circle_and_rotate(label, angle):
  def render(angle, radius=24.0):
    direction = (np.cos(angle), np.sin(angle))
    shape = painting.Shape(label, 40.0, 40.0, radius, direction, 0.5)
    patch = painting.make_patch(shape, 80, 80)
    mask = np.zeros((80, 80), bool)
    mask[patch.rows, patch.columns] = patch.distance < 0
    assert patch.full_area == mask.sum()
    return mask

  mask = render(angle)
  y, x = np.nonzero(mask)
  reach = np.hypot(x + 0.5 - 40, y + 0.5 - 40)
  assert reach.max() < 24.0 and reach.max() > 22.0
  assert abs(int(mask.sum()) - int(render(0.0).sum())) < 0.06 * mask.sum()
  np.testing.assert_array_equal(render(angle + np.pi), mask[::-1, ::-1])


def test_shapes_have_their_areas_and_symmetries():
  areas = {}
  for label, name in enumerate(scenes.CLASS_NAMES):
    shape = painting.Shape(label, 60.0, 60.0, 50.0, (1.0, 0.0), 0.5)
    areas[name] = painting.make_patch(shape, 120, 120).full_area / (np.pi * 50**2)
  ring = 1 - (1 - 2 * 0.21) ** 2
  cross = (8 * 0.36 - 4 * 0.36**2) / (1 + 0.36**2) / np.pi
  rectangle = 4 * 1.4 / (1 + 1.4**2) / np.pi
  star = 10 * 0.5 * 0.46 * np.sin(np.pi / 5) / np.pi
  triangle = (1 + 0.48) * np.sqrt(1 - 0.48**2) / np.pi
  expected = dict(disc=1.0, rectangle=rectangle, triangle=triangle, star=star, ring=ring, cross=cross)
  for name, area in expected.items():
    assert areas[name] == pytest.approx(area, rel=0.02), name
  # A fifth of a turn leaves a star as it is.
  first, second = (
    painting.make_patch(
      painting.Shape(scenes.CLASS_NAMES.index("star"), 60.0, 60.0, 50.0, (np.cos(a), np.sin(a)), 0.5),
      120,
      120,
    ).distance
    for a in (0.3, 0.3 + 2 * np.pi / 5)
  )
  np.testing.assert_allclose(first, second, atol=1e-3)


def test_ground_truth_loads_in_pycocotools(source, records, tmp_path):
  truth = source.ground_truth
  path = tmp_path / "ground_truth.json"
  path.write_text(json.dumps(truth))
  coco = COCO(str(path))
  assert [c["id"] for c in coco.loadCats(coco.getCatIds())] == [1, 2, 3, 4, 5, 6]
  assert len({a["id"] for a in truth["annotations"]}) == len(truth["annotations"])
  for record in records[:20]:
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[record["image_id"]]))
    assert len(annotations) == len(record["labels"])
    for i, annotation in enumerate(annotations):
      mask = coco_mask.decode(annotation["segmentation"]).astype(bool)
      np.testing.assert_array_equal(mask, record["masks"][i])
      assert annotation["category_id"] == record["labels"][i] + 1
      assert annotation["area"] == record["area"][i] and annotation["iscrowd"] == 0
      x, y, w, h = annotation["bbox"]
      np.testing.assert_array_equal([x, y, x + w, y + h], record["boxes"][i])


def test_bad_arguments_are_named():
  with pytest.raises(ValueError, match="split is 'test'"):
    scenes.SceneSource(1, split="test")
  with pytest.raises(ValueError, match="both sides must be >= 64"):
    scenes.SceneSource(1, (128, 32))
  with pytest.raises(ValueError, match="seed=-1"):
    scenes.SceneSource(1, seed=-1)
  with pytest.raises(IndexError, match="scene 3 of 3"):
    scenes.SceneSource(3)[3]
  with pytest.raises(ValueError, match="no scene"):
    scenes.statistics(scenes.SceneSource(0))
