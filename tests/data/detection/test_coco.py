"""COCO sources: the subset against pycocotools, and one hand-made file per defect."""

import contextlib
import copy
import io
import json
import pickle

import numpy as np
from PIL import Image
from pycocotools import coco as reference_coco
from pycocotools import mask as mask_utils
import pytest

from frozen_vision.data import images as image_io
from frozen_vision.data.detection import coco, coco_annotations, mask_encoding
from frozen_vision.metrics import coco_ap
from tests import paths, samples

SQUARE = [[10.0, 5.0, 30.0, 5.0, 30.0, 25.0, 10.0, 25.0]]


def _annotation(identity, **changes):
  annotation = {
    "id": identity,
    "image_id": 7,
    "category_id": 90,
    "bbox": [10.0, 5.0, 20.0, 20.0],
    "area": 400.0,
    "iscrowd": 0,
    "segmentation": copy.deepcopy(SQUARE),
  }
  annotation.update(changes)
  return {key: value for key, value in annotation.items() if value is not ...}


def _file(annotations=None, **changes):
  raw = {
    "images": [
      {"id": 7, "file_name": "a.jpg", "height": 40, "width": 60},
      {"id": 3, "file_name": "b.jpg", "height": 40, "width": 60},
    ],
    "categories": [{"id": 90, "name": "toothbrush"}, {"id": 5, "name": "airplane"}],
    "annotations": [_annotation(11)] if annotations is None else annotations,
  }
  raw.update(changes)
  return {key: value for key, value in raw.items() if value is not ...}


@pytest.fixture(name="load")
def _load(tmp_path):
  (tmp_path / "images").mkdir()
  for name in ("a.jpg", "b.jpg"):
    Image.new("RGB", (60, 40), "red").save(tmp_path / "images" / name)

  def load(raw, **options):
    path = tmp_path / "file.json"
    path.write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return coco.load_coco(path, tmp_path / "images", **options)

  load.folder = tmp_path / "images"
  return load


@pytest.mark.parametrize("split", ["train", "val"])
def test_subset_agrees_with_pycocotools(split):
  root = paths.data_dir("coco_subset")
  source = coco.coco_root(root, split, check_sizes=True)
  with contextlib.redirect_stdout(io.StringIO()):
    reference = reference_coco.COCO(str(root / "annotations" / f"instances_{split}2017.json"))
  assert not source.findings and str(source.findings) == ""
  assert len(source) == len(reference.imgs) and source.num_classes == 80 and source.labelled
  np.testing.assert_array_equal(source.category_ids, sorted(reference.cats))
  assert source.class_names[79] == "toothbrush" and source.category_ids[79] == 90
  crowds = 0
  for index in range(len(source)):
    record = source[index]
    image_id = record["image_id"]
    expected = reference.loadAnns(reference.getAnnIds(imgIds=[image_id]))
    assert image_id == source.image_ids[index]
    assert record["image"].shape == (record["height"], record["width"], 3)
    assert record["file_name"] == reference.imgs[image_id]["file_name"]
    np.testing.assert_array_equal(record["annotation_ids"], [a["id"] for a in expected])
    np.testing.assert_array_equal(source.category_ids[record["labels"]], [a["category_id"] for a in expected])
    np.testing.assert_array_equal(record["crowd"], [a["iscrowd"] for a in expected])
    np.testing.assert_array_equal(record["area"], np.float32([a["area"] for a in expected]))
    xywh = np.asarray([a["bbox"] for a in expected]).reshape(-1, 4)
    xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    np.testing.assert_allclose(record["boxes"], xyxy, atol=0.05)
    masks = coco.masks(record)
    assert masks.dtype == bool and masks.shape == (len(expected), *record["image"].shape[:2])
    for mask, annotation in zip(masks, expected):
      np.testing.assert_array_equal(mask, reference.annToMask(annotation))
    crowds += int(record["crowd"].sum())
    dtypes = {key: record[key].dtype for key in ("boxes", "labels", "crowd", "annotation_ids")}
    assert dtypes == {"boxes": np.float32, "labels": np.int32, "crowd": np.bool_, "annotation_ids": np.int64}
  assert crowds > 0


def test_ground_truth_is_what_the_official_code_reads(tmp_path):
  root = samples.coco_root(tmp_path)
  chosen = [214753, 475678]
  source = coco.coco_root(root, "val", image_ids=chosen)
  raw = json.loads((root / "annotations" / "instances_val2017.json").read_text())
  truth = source.ground_truth
  assert truth is source.ground_truth
  assert truth["images"] == [image for image in raw["images"] if image["id"] in chosen]
  expected = [a for a in raw["annotations"] if a["image_id"] in chosen]
  assert len(truth["annotations"]) == len(expected) > 0
  for ours, theirs in zip(truth["annotations"], expected):
    assert {k: v for k, v in ours.items() if k != "segmentation"} == {
      k: v for k, v in theirs.items() if k != "segmentation"
    }
    size = next((i["height"], i["width"]) for i in raw["images"] if i["id"] == ours["image_id"])
    theirs = theirs["segmentation"]
    if isinstance(theirs, dict):
      theirs = mask_utils.frPyObjects(theirs, *size)
    np.testing.assert_array_equal(
      mask_utils.decode(mask_encoding.to_rle(ours["segmentation"], *size)),
      mask_utils.decode(mask_encoding.to_rle(theirs, *size)),
    )
  json.dumps(truth)


def test_pickle_is_small_and_complete(tmp_path):
  root = samples.coco_root(tmp_path)
  source = coco.coco_root(root, "train")
  size = len(pickle.dumps(source))
  _ = source.ground_truth, source[0]
  data = pickle.dumps(source)
  assert len(data) == size < 100_000
  other = pickle.loads(data)
  _assert_same_records(source[5], other[5])
  assert other.ground_truth == source.ground_truth
  eight = coco.coco_root(root, "train", image_ids=source.image_ids[:8])
  assert len(eight) == 8 and len(pickle.dumps(eight)) < 50_000


def _assert_same_records(one, other):
  assert one.keys() == other.keys()
  for key, value in one.items():
    np.testing.assert_equal(other[key], value, err_msg=key)


def test_labels_follow_the_order_of_ids(load):
  source = load(_file())
  assert source.class_names == ("airplane", "toothbrush")
  assert source.category_ids.tolist() == [5, 90]
  assert source[0]["labels"].tolist() == [1]
  assert source.image_ids.tolist() == [7, 3]
  assert len(source[1]["boxes"]) == 0 and coco.masks(source[1]).shape == (0, 40, 60)
  assert source[1]["boxes"].shape == (0, 4)
  with pytest.raises(IndexError):
    source[2]


def test_label_space_of_the_training(load):
  given = [{"id": 90, "name": "toothbrush"}, {"id": 5, "name": "airplane"}, {"id": 1, "name": "x"}]
  source = load(_file(), categories=given)
  assert source.class_names == ("x", "airplane", "toothbrush")
  assert source[0]["labels"].tolist() == [2]
  with pytest.raises(coco.CocoError, match="90 'toothbrush'"):
    load(_file(), categories=[{"id": 90, "name": "bus"}, {"id": 5, "name": "airplane"}])


def test_filters(load):
  crowd = _annotation(12, image_id=3, iscrowd=1)
  assert load(_file([_annotation(11), crowd]), drop_empty=True).image_ids.tolist() == [7]
  assert load(_file(), image_ids=[3]).image_ids.tolist() == [3]
  with pytest.raises(coco.CocoError, match="no images with the 1 ids asked: 99"):
    load(_file(), image_ids=[3, 99])
  with pytest.raises(coco.CocoError, match="no image has an object"):
    load(_file([crowd]), drop_empty=True)


def test_all_forms_of_masks(load):
  mask = np.zeros((40, 60), np.uint8)
  mask[5:25, 10:30] = 1
  compressed = mask_utils.encode(np.asfortranarray(mask))["counts"].decode()
  flat = mask.T.ravel()  # COCO counts along columns
  edges = np.flatnonzero(np.diff(flat)) + 1
  counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
  size = [40, 60]
  two = [SQUARE[0], [40, 5, 50, 5, 50, 15, 40, 15]]
  source = load(
    _file(
      [
        _annotation(1),
        _annotation(2, segmentation={"size": size, "counts": counts}),
        _annotation(3, segmentation={"size": size, "counts": compressed}, iscrowd=...),
        _annotation(4, segmentation=two),
        _annotation(5, iscrowd=1),
      ]
    )
  )
  assert not source.findings
  record = source[0]
  masks = coco.masks(record)
  for i in range(3):
    np.testing.assert_array_equal(masks[i], mask)
  assert masks[3].sum() == 500
  assert record["crowd"].tolist() == [False, False, False, False, True]


def test_run_lengths_are_decoded_as_pycocotools_does():
  rng = np.random.default_rng(0)
  for density in (0.01, 0.3, 0.5, 0.9):
    for shape in ((1, 1), (37, 53), (300, 400)):
      mask = np.asfortranarray(rng.random(shape) < density).astype(np.uint8)
      rle = mask_utils.encode(mask)
      flat = mask.T.ravel()
      edges = np.flatnonzero(np.diff(flat)) + 1
      expected = np.diff(np.concatenate([[0], edges, [flat.size]]))
      if flat[0]:
        expected = np.concatenate([[0], expected])
      np.testing.assert_array_equal(mask_encoding.rle_counts(rle["counts"].decode()), expected)
  for malformed in ("", "é", "\x7f" * 4, "oooooooo", "a b", None, 5, [1, -2], ["1"]):
    assert mask_encoding.rle_counts(malformed) is None


def test_unlabelled_images(load):
  source = load(_file(annotations=...))
  assert not source.labelled and source.num_classes == 2
  assert source.ground_truth["annotations"] == [] and len(source[0]["boxes"]) == 0
  assert load(_file(annotations=..., categories=...)).num_classes == 0


def test_boxes_without_masks(load):
  boxes = [_annotation(1, segmentation=..., area=...)]
  with pytest.raises(coco.CocoError, match="without any usable segmentation"):
    load(_file(boxes))
  source = load(_file(boxes), require_masks=False)
  assert source[0]["segmentations"] == [None] and source[0]["area"].tolist() == [400.0]
  assert "segmentation" not in source.ground_truth["annotations"][0]
  with pytest.raises(ValueError, match="a.jpg: has annotations without masks"):
    coco.masks(source[0])


# Each: the annotations beside a good one, the kind that must be counted, and how often.
RECOVERED = {
  "no image_id": ([_annotation(1, image_id=...)], "annotation_invalid", 1),
  "no category_id": ([_annotation(1, category_id=...)], "annotation_invalid", 1),
  "no mask": ([_annotation(1, segmentation=...)], "mask_missing", 1),
  "not a record": (["text", None], "annotation_invalid", 2),
  "unknown image": ([_annotation(1, image_id=8)], "unknown_image", 1),
  "unknown category": ([_annotation(1, category_id=1)], "unknown_category", 1),
  "box outside": ([_annotation(1, bbox=[100, 5, 20, 20])], "box_outside", 1),
  "zero width": ([_annotation(1, bbox=[10, 5, 0, 20])], "box_empty", 1),
  "negative height": ([_annotation(1, bbox=[10, 5, 20, -3])], "box_empty", 1),
  "three numbers": ([_annotation(1, bbox=[10, 5, 20])], "annotation_invalid", 1),
  "box not finite": ([_annotation(1, bbox=[10, 5, 20, float("nan")])], "annotation_invalid", 1),
  "empty list": ([_annotation(1, segmentation=[])], "mask_missing", 1),
  "empty polygon": ([_annotation(1, segmentation=[[]])], "polygon_invalid", 1),
  "two points": ([_annotation(1, segmentation=[[1, 2, 3, 4]])], "polygon_invalid", 1),
  "odd numbers": ([_annotation(1, segmentation=[[1, 2, 3, 4, 5, 6, 7]])], "polygon_invalid", 1),
  "text polygon": ([_annotation(1, segmentation=[["a"] * 6])], "polygon_invalid", 1),
  "endless polygon": ([_annotation(1, segmentation=[[0, 0, 1e9, 0, 0, 5]])], "polygon_invalid", 1),
  "mask of other size": (
    [_annotation(1, segmentation={"size": [60, 40], "counts": [2400]})],
    "rle_invalid",
    1,
  ),
  "runs too short": ([_annotation(1, segmentation={"size": [40, 60], "counts": [5, 5]})], "rle_invalid", 1),
  "runs malformed": ([_annotation(1, segmentation={"size": [40, 60], "counts": "oooo"})], "rle_invalid", 1),
  "no counts": ([_annotation(1, segmentation={"size": [40, 60]})], "rle_invalid", 1),
  "repeated": ([_annotation(11)], "annotation_duplicate", 1),
}


@pytest.mark.parametrize("name", RECOVERED)
def test_defects_are_dropped_and_counted(load, name):
  bad, kind, count = RECOVERED[name]
  source = load(_file([_annotation(11), *bad]))
  assert source.findings.counts[kind] == count
  assert coco_annotations.PROBLEMS[kind].text in str(source.findings)
  record = source[0]
  assert record["annotation_ids"].tolist() == [11] and coco.masks(record).shape[0] == 1
  json.dumps(source.ground_truth)
  if bad[0] == _annotation(11):
    return
  if kind in ("box_outside", "box_empty"):  # the official evaluation counts them
    assert len(source.ground_truth["annotations"]) == 2
    return
  assert len(source.ground_truth["annotations"]) == 1
  with pytest.raises(coco.CocoError, match="annotations is usable"):
    load(_file(bad))  # nothing else in the file


# Each: an annotation that can be repaired, the kind counted, and a key of the record after it.
REPAIRED = {
  "clipped": (_annotation(1, bbox=[-5, 5, 20, 50]), "box_clipped", "boxes", [[0, 5, 15, 40]]),
  "no bbox": (_annotation(1, bbox=...), "box_from_mask", "boxes", [[10, 5, 30, 25]]),
  "no area": (_annotation(1, area=...), "area_missing", "area", [400]),
  "no id": (_annotation(1, id=...), "annotation_id", "annotation_ids", [1]),
  "id 0": (_annotation(0), "annotation_id", "annotation_ids", [1]),
  "one bad polygon": (
    _annotation(1, segmentation=[*SQUARE, [1, 2]]),
    "polygon_invalid",
    "segmentations",
    [SQUARE],
  ),
}


@pytest.mark.parametrize("name", REPAIRED)
def test_defects_are_repaired_and_counted(load, name):
  annotation, kind, key, expected = REPAIRED[name]
  source = load(_file([annotation]))
  assert source.findings.counts == {kind: 1}
  np.testing.assert_array_equal(source[0][key], expected)
  truth = source.ground_truth["annotations"][0]
  assert truth["id"] > 0 and {"bbox", "area", "iscrowd", "segmentation"} <= truth.keys()


def test_repeated_ids_of_annotations_are_replaced(load):
  source = load(_file([_annotation(11), _annotation(11, image_id=3), _annotation(4)]))
  assert source.findings.counts == {"annotation_id": 1}
  assert [source[i]["annotation_ids"].tolist() for i in range(2)] == [[11, 4], [12]]
  assert [a["id"] for a in source.ground_truth["annotations"]] == [11, 12, 4]
  only = load(_file([_annotation(11), _annotation(11, image_id=3)]), image_ids=[3])
  assert only[0]["annotation_ids"].tolist() == [12]  # the same id as in the whole file


IMAGES = _file()["images"]
UNUSABLE = {
  "not JSON": ("{", "not valid JSON"),
  "a list": ([], "expected an object"),
  "no images": (_file(images=...), "lacks images"),
  "empty images": (_file(images=[]), "lists no images"),
  "no categories": (_file(categories=...), "lacks categories"),
  "images not a list": (_file(images={"a": 1}), "images is a dict"),
  "category twice": (
    _file(categories=[{"id": 90, "name": "a"}, {"id": 90, "name": "b"}]),
    "id 90 is used by",
  ),
  "category without id": (_file(categories=[{"name": "a"}]), "has no integer id"),
  "image id twice": (_file(images=[IMAGES[0], {**IMAGES[1], "id": 7}]), "id 7 is a.jpg and b.jpg"),
  "no image file": (_file(images=[{**IMAGES[0], "file_name": "x.jpg"}]), "no usable image.*\n.*x.jpg"),
  "image without id": (_file(images=[{"file_name": "a.jpg", "height": 40, "width": 60}]), "no usable image"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_files_give_one_clear_error(load, name):
  raw, message = UNUSABLE[name]
  with pytest.raises(coco.CocoError, match=message) as caught:
    load(raw)
  assert "file.json" in str(caught.value)


def test_image_records(load):
  broken = [
    IMAGES[0],
    IMAGES[0],
    {**IMAGES[1], "file_name": "absent.jpg"},
    {"id": 4, "file_name": "b.jpg"},
    {"id": 5},
    {**IMAGES[0], "id": 6, "height": "tall"},
    {"id": 8, "file_name": "absent.png"},
  ]
  source = load(_file(images=broken))
  assert source.findings.counts == {
    "image_duplicate": 1,
    "image_missing": 1,
    "image_invalid": 2,
    "image_unreadable": 1,
  }
  assert source.image_ids.tolist() == [7, 4]
  assert (source[1]["height"], source[1]["width"]) == (40, 60)  # read from the file


def test_size_of_the_file_must_fit(load):
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.new("RGB", (60, 40)).save(load.folder / "b.jpg", exif=exif)
  source = load(_file())
  with pytest.raises(image_io.ImageError, match="40 x 60 pixels.*60 x 40.*EXIF tag"):
    source[1]
  source = load(_file(), check_sizes=True)
  assert source.image_ids.tolist() == [7] and source.findings.counts == {"image_size": 1}
  assert "b.jpg" in str(source.findings)
  turned = {**IMAGES[1], "height": 60, "width": 40}
  assert load(_file(images=[IMAGES[0], turned]), check_sizes=True)[1]["image"].shape == (60, 40, 3)


def test_absent_paths_and_splits(load, tmp_path):
  with pytest.raises(FileNotFoundError, match="no such annotation file"):
    coco.load_coco(tmp_path / "absent.json", load.folder)
  with pytest.raises(FileNotFoundError, match="no such folder"):
    coco.load_coco(tmp_path / "absent.json", tmp_path / "absent")
  with pytest.raises(ValueError, match="expected train, val"):
    coco.coco_root(tmp_path, "validation")


def test_report_names_the_first_and_counts_the_rest(load):
  source = load(_file([_annotation(11), *(_annotation(i, category_id=1) for i in range(20, 30))]))
  text = str(source.findings)
  assert text.startswith("10 annotations of a category") and "annotation 20" in text
  assert "and 7 more" in text


def test_a_file_of_lvis(load):
  """Addresses in the place of names, no `iscrowd`, and what the metric needs stays with the images."""
  lists = dict(neg_category_ids=[5], not_exhaustive_category_ids=[90])
  images = [
    dict(id=7, coco_url="http://images.cocodataset.org/train2017/a.jpg", height=40, width=60, **lists),
    dict(id=3, coco_url="http://images.cocodataset.org/val2017/b.jpg", height=40, width=60, **lists),
  ]
  for image, name in zip(images, ("train2017/a.jpg", "val2017/b.jpg")):
    path = load.folder / name
    path.parent.mkdir()
    (load.folder / path.name).rename(path)
  categories = [dict(id=90, name="toothbrush", frequency="r"), dict(id=5, name="airplane", frequency="f")]
  raw = _file([_annotation(11, iscrowd=...)], images=images, categories=categories)
  source = load(raw)
  assert [source.record(i)["file_name"] for i in range(2)] == ["train2017/a.jpg", "val2017/b.jpg"]
  assert not source.findings.counts and source[0]["image"].shape == (40, 60, 3)
  evaluator = coco_ap.CocoEvaluator(source.ground_truth)
  assert {"box_AP_rare", "mask_AP_frequent", "box_AR_300"} <= evaluator.result().keys()
