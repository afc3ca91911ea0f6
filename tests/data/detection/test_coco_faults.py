"""COCO-format files as people report them: every drop is counted, and what has a remedy says so."""

import json
import unicodedata

import numpy as np
from PIL import Image
import pytest

from frozen_vision.data import findings, names, prepare, reports
from frozen_vision.data.detection import coco, lost_objects, transforms
from frozen_vision.metrics import coco_ap

_BIG = 2**60


def _box(x, y, w, h):
  return dict(bbox=[x, y, w, h], segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]], area=w * h)


@pytest.fixture(name="files")
def _files(tmp_path):
  """Writes a file of `count` images with three objects each; `change` alters an annotation or an image."""
  (tmp_path / "img").mkdir(exist_ok=True)

  def write(change=lambda row: row, *, count=4, image=lambda row: row):
    rows = []
    records = []
    for i in range(count):
      record = image(dict(id=i + 1, file_name=f"im{i}.png", height=64, width=80))
      records.append(record)
      Image.new("RGB", (80, 64), (i, 40, 90)).save(tmp_path / "img" / f"im{i}.png")
      for j, box in enumerate((_box(2, 3, 12, 13), _box(36, 36, 17, 18), _box(50, 5, 20, 20))):
        row = dict(id=3 * i + j + 1, image_id=record["id"], category_id=1 + j % 2, iscrowd=0, **box)
        rows.append(change(row))
    categories = [dict(id=1, name="a"), dict(id=2, name="b")]
    (tmp_path / "ann.json").write_text(
      json.dumps(dict(images=records, annotations=rows, categories=categories))
    )
    return tmp_path / "ann.json", tmp_path / "img"

  return write


def _without_mask(row):
  return row | dict(segmentation=[])


def _refused(source):
  with pytest.raises(findings.DroppedError) as caught:
    reports.check({"training": source})
  assert reports.check({"training": source}, allow_drops=True)["training"]["examples"] == len(source)
  return str(caught.value)


def test_boxes_only_are_read_as_such(files):
  source = coco.load_coco(*files(_without_mask), require_masks=None, drop_empty=True)
  assert not source.has_masks and len(source) == 4 and not source.findings
  assert coco.load_coco(*files(), require_masks=None).has_masks
  # Crowds have run lengths even where nothing else has a mask.
  crowd = dict(iscrowd=1, segmentation=dict(size=[64, 80], counts=[64 * 80]))
  mixed = files(lambda row: row | crowd if row["id"] == 1 else _without_mask(row))
  assert not coco.load_coco(*mixed, require_masks=None).has_masks


def test_half_of_the_masks_missing_stops(files):
  paths = files(lambda row: _without_mask(row) if row["id"] % 2 else row)
  source = coco.load_coco(*paths, require_masks=None)
  assert source.findings.dropped() == {"annotations": (6, 12)}
  message = _refused(source)
  assert (
    "Of the training data 6 of 12 annotations would be left out: 6 annotations without any usable" in message
  )
  assert "annotation 1 of im0.png; annotation 3 of im0.png; annotation 5 of im1.png; and 3 more" in message
  assert "head.with_masks=False" in message and "--config.data.allow_drops=True" in message
  assert not coco.load_coco(*paths, require_masks=False).findings


def test_few_drops_are_said_and_written(files, tmp_path, caplog):
  caplog.set_level("INFO")
  paths = files(lambda row: _without_mask(row) if row["id"] == 3 else row)
  report = reports.check({"training": coco.load_coco(*paths, require_masks=None), "validation": [1, 2]})
  assert (
    "Training data: 1 annotations without any usable segmentation: dropped (annotation 3 of im0"
    in caplog.text
  )
  reports.write(report, tmp_path / "run")
  written = json.loads((tmp_path / "run" / "data.json").read_text())
  assert written["validation"].pop("fingerprint")["examples"] == 2
  assert written["validation"] == {"source": "[1, 2]", "examples": 2}
  assert written["training"]["dropped"] == {"annotations": 1}
  assert written["training"]["totals"] == {"images": 4, "annotations": 12}
  assert written["training"]["found"][0]["examples"] == ["annotation 3 of im0.png"]


@pytest.mark.parametrize("with_box", [True, False])
def test_boxes_in_fractions_are_an_error_that_says_so(files, with_box):
  def scaled(row):
    x, y, w, h = row["bbox"]
    row = row | _box(x / 80, y / 64, w / 80, h / 64)
    return row if with_box else {key: value for key, value in row.items() if key != "bbox"}

  with pytest.raises(
    coco.CocoError, match="12 of 12 boxes lie within 0..1, such as annotation 1 with .* pixels"
  ):
    coco.load_coco(*files(scaled))
  # A few tiny boxes in a corner are none of that.
  source = coco.load_coco(*files(lambda row: row | _box(0, 0, 1, 1) if row["id"] == 1 else row))
  assert len(source) == 4


def test_names_in_another_unicode_form_are_found(files, tmp_path):
  def named(row):
    return row | dict(file_name=f"größe/ö{row['id']}.png")

  annotations, folder = files(image=named)
  (folder / unicodedata.normalize("NFD", "größe")).mkdir()
  for i in range(4):
    (folder / f"im{i}.png").rename(
      folder / unicodedata.normalize("NFD", "größe") / unicodedata.normalize("NFD", f"ö{i + 1}.png")
    )
  source = coco.load_coco(annotations, folder)
  assert len(source) == 4 and source.findings.counts == {"image_renamed": 4} and not source.findings.dropped()
  assert source[0]["image"].shape == (64, 80, 3)
  assert len(source.ground_truth["images"]) == 4


def test_missing_and_damaged_images_are_counted(files):
  annotations, folder = files()
  (folder / "im1.png").write_bytes((folder / "im1.png").read_bytes()[:60])
  source = coco.load_coco(annotations, folder, check_images=True)
  assert source.findings.counts == {"image_unreadable": 1} and len(source) == 3
  assert "im1.png: cannot be decoded" in _refused(source)
  (folder / "im2.png").unlink()
  source = coco.load_coco(annotations, folder, check_images=True)
  assert source.findings.dropped() == {"images": (2, 4)}


@pytest.mark.parametrize("name", ["../im0.png", "/etc/hosts"])
def test_names_that_lead_outside_are_refused(files, name):
  annotations, folder = files(image=lambda row: row | dict(file_name=name) if row["id"] == 1 else row)
  with pytest.raises(names.OutsideError, match="ann.json, image 1, has the file name .*allow_outside"):
    coco.load_coco(annotations, folder)
  Image.new("RGB", (80, 64)).save(folder.parent / "im0.png")
  if name.startswith(".."):
    assert coco.load_coco(annotations, folder, allow_outside=True)[0]["image"].shape == (64, 80, 3)


def test_nothing_but_crowds(files, capsys):
  paths = files(lambda row: row | dict(iscrowd=1))
  with pytest.raises(coco.CocoError, match="every annotation is a crowd .iscrowd 1.*Set iscrowd to 0"):
    coco.load_coco(*paths, drop_empty=True)
  source = coco.load_coco(*paths)
  assert source.findings.counts == {"crowd_only": 1}
  with pytest.raises(coco.CocoError, match="every annotation is a crowd"):
    coco.hold_out(source, 0.5, seed=0)
  command = ["coco", "--annotations", str(paths[0]), "--images", str(paths[1]), "--check"]
  assert prepare.main(command) == 0
  assert prepare.main([*command, "--strict"]) == 1
  assert "nothing but crowds" in capsys.readouterr().out


def test_preparing_boxes_only_needs_no_option(files, capsys):
  annotations, folder = files(_without_mask)
  command = ["coco", "--annotations", str(annotations), "--images", str(folder), "--check", "--strict"]
  assert prepare.main(command) == 0
  assert "boxes only: no annotation has a mask" in capsys.readouterr().out


def test_objects_that_training_never_shows_are_counted(files):
  source = coco.load_coco(*files(lambda row: row | _box(1, 1, 3, 3) if row["id"] % 3 == 1 else row))
  half = transforms.DetectionTrain((32, 40), 100, transforms.ResizeToLimits(), min_box_size=2.0)
  lost_objects.count(source, half)
  assert source.findings.counts == {"object_small": 4} and source.findings.dropped() == {"objects": (4, 12)}
  assert "1 in im0.png" in _refused(source)
  for frame, resize, scale in (
    ((32, 40), transforms.LargeScaleJitter((0.1, 2.0)), 1.0),
    ((128, 160), transforms.ResizeToLimits((32, 96)), 1.5),
    ((128, 160), transforms.ResizeToLimits(96, 100), 1.25),
    ((32, 40), transforms.ResizeToLimits(), 0.5),
  ):
    np.testing.assert_allclose(resize.largest_scale(np.array([[64, 80]]), frame), [scale])
    drawn = [resize((64, 80), frame, np.random.default_rng(seed)).scale for seed in range(50)]
    assert np.max(drawn) <= scale * 1.02
  source = coco.load_coco(*files())
  lost_objects.count(source, transforms.DetectionTrain((64, 80), 2, transforms.ResizeToLimits()))
  assert source.findings.counts == {"object_excess": 4}
  assert "Raise max_objects" in _refused(source)


def test_ids_above_2_to_53(files):
  """Neighbouring ids are one floating point number; pycocotools evaluates them."""
  annotations, folder = files(image=lambda row: row | dict(id=_BIG + row["id"]))
  raw = json.loads(annotations.read_text())
  for row in raw["annotations"]:
    row["category_id"] += _BIG
  raw["categories"] = [dict(id=_BIG + 1, name="a"), dict(id=_BIG + 2, name="b")]
  annotations.write_text(json.dumps(raw))
  source = coco.load_coco(annotations, folder, drop_empty=True)
  assert source.image_ids.tolist() == [_BIG + i for i in range(1, 5)]
  assert source[0]["labels"].tolist() == [0, 1, 0] and not source.findings
  example = transforms.DetectionEval((64, 80))(source[0])
  assert example["image_id"] == _BIG + 1
  perfect = [
    dict(image_id=row["image_id"], category_id=row["category_id"], bbox=row["bbox"], score=0.9)
    for row in raw["annotations"]
  ]
  (folder / "found.json").write_text(json.dumps(perfect))
  result = coco_ap.evaluate_files(annotations, folder / "found.json")
  assert result["box_AP"] == 1.0 and result["box_AR_100"] == 1.0
  fractions = [row | dict(bbox=[0.1, 0.2, 0.3, 0.4]) for row in perfect]
  (folder / "found.json").write_text(json.dumps(fractions))
  with pytest.raises(ValueError, match="found.json.*12 of 12 boxes lie within 0..1"):
    coco_ap.evaluate_files(annotations, folder / "found.json")


@pytest.mark.parametrize(
  "value", [1e300, 10**400, float("inf"), float("nan"), -(10**30), True, "7", None, [], {}]
)
@pytest.mark.parametrize("key", ["bbox", "area", "id", "image_id", "category_id"])
def test_numbers_beyond_what_arrays_hold_are_counted(files, key, value):
  def change(row):
    return row | {key: [value, 1, 2, 3] if key == "bbox" else value} if row["id"] == 2 else row

  source = coco.load_coco(*files(change))
  kinds = {"bbox": "annotation_invalid", "area": "area_missing", "id": "annotation_id"}
  expected = {kinds.get(key, "annotation_invalid"): 1}
  assert source.findings.counts == expected
  assert coco_ap.CocoEvaluator(source.ground_truth, ("bbox",)).class_names == ["a", "b"]


@pytest.mark.parametrize("side", [0, -4, 2**40, 1e300, 10**400, "64", None, 60.5, 2**20])
def test_sizes_beyond_images_are_counted(files, side):
  paths = files(image=lambda row: row | dict(height=side, width=side) if row["id"] == 1 else row)
  source = coco.load_coco(*paths)
  assert len(source) == 3 and source.findings.counts["image_invalid"] == 1
