"""LVIS's metric against the `lvis` package, whose numbers `tests/references/lvis_ap.py` writes."""

import copy
import json

import pytest

from frozen_vision.metrics import coco_ap, coco_matching
from tests import paths
from tests.metrics import lvis_data

# The package's names in the order of ours.
_NAMES = (
  *("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"),
  *("AR@300", "ARs@300", "ARm@300", "ARl@300"),
)


@pytest.fixture(scope="module")
def truth():
  return lvis_data.truth()


def _files(folder, truth, detections):
  paths = folder / "truth.json", folder / "detections.json"
  for path, content in zip(paths, (truth, detections)):
    path.write_text(json.dumps(content))
  return paths


def test_numbers_equal_those_of_the_package(tmp_path, truth):
  result = coco_ap.evaluate_files(*_files(tmp_path, truth, lvis_data.detections(truth)))
  wanted = json.loads((paths.golden_dir() / "lvis_ap.json").read_text())
  for iou_type, prefix in coco_matching.PREFIXES.items():
    found = [result[f"{prefix}_{name}"] for name in coco_matching.LVIS_METRIC_NAMES]
    assert found == pytest.approx([wanted[iou_type][name] for name in _NAMES], abs=1e-9)
  assert len(result) == 26
  table = coco_matching.format_table(result)
  assert "maxDets=300 | classes=rare ] = 0.133" in table and table.count("\n") == 27


def test_what_an_image_does_not_speak_of_counts_neither_way(tmp_path, truth):
  """False alarms of a class that an image was not searched for, and of one that is marked in part."""
  detections = lvis_data.detections(truth)
  before = coco_ap.evaluate_files(*_files(tmp_path, truth, detections), ["bbox"])
  image = truth["images"][1]
  present = {row["category_id"] for row in truth["annotations"] if row["image_id"] == image["id"]}
  silent = {category["id"] for category in truth["categories"]} - present - set(image["neg_category_ids"])

  def with_alarm(category):
    alarm = dict(image_id=image["id"], category_id=category, bbox=[0.0, 0.0, 9.0, 9.0], score=2.0)
    return coco_ap.evaluate_files(*_files(tmp_path, truth, [*detections, alarm]), ["bbox"])

  assert with_alarm(min(silent)) == before
  assert with_alarm(image["not_exhaustive_category_ids"][0]) == before
  marked = min(present - set(image["not_exhaustive_category_ids"]))
  assert with_alarm(marked)["box_AP"] < before["box_AP"]


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda truth: truth["images"][3].pop("neg_category_ids"), "image 13 has neg_category_ids = None"),
    (lambda truth: truth["images"][0].update(not_exhaustive_category_ids=[999]), r"image 10 .* \[999\]"),
    (lambda truth: truth["categories"][0].update(frequency="x"), "category 2 has the frequency 'x'"),
  ],
)
def test_a_file_that_is_lvis_in_part_is_refused(truth, change, message):
  changed = copy.deepcopy(truth)
  change(changed)
  with pytest.raises(ValueError, match=message):
    coco_ap.CocoEvaluator(changed)
