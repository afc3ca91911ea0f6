"""Cells that train: what is taken from a run's files, example by example."""

import json
import types

import numpy as np
from PIL import Image
import pytest

from frozen_vision.data.generated import rooms
from frozen_vision.data.segmentation import label_maps
from frozen_vision.files import lock
from frozen_vision.metrics import coco_ap
from frozen_vision.report import cells, examples, recipes, single
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import loop
from tests import tiny
from tests.report import reports


def _object(image, box):
  return {"image_id": image, "category_id": 3, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}


def test_boxes_are_scored_image_by_image(tmp_path):
  truth = {
    "images": [{"id": identity, "width": 50, "height": 40} for identity in (9, 4, 5, 7)],
    "categories": [{"id": 3, "name": "disk"}],
    "annotations": [
      _object(9, [1, 2, 10, 10]) | {"id": 1},
      _object(4, [1, 2, 10, 10]) | {"id": 2},
      _object(5, [5, 5, 20, 20]) | {"id": 3},
    ],
  }
  found = [
    _object(9, [1, 2, 10, 10]) | {"score": 0.9},  # exact
    _object(4, [30, 20, 5, 5]) | {"score": 0.8},  # elsewhere
    _object(5, [5, 5, 20, 15]) | {"score": 0.7},  # an IoU of 0.75: six of ten thresholds
    _object(7, [5, 5, 20, 15]) | {"score": 0.7},  # where there is nothing
  ]
  path = tmp_path / "detections.json"
  path.write_text(json.dumps(found))
  scores = examples.of_detections(truth, path)
  assert set(scores) == {"box_AP"}
  np.testing.assert_allclose(scores["box_AP"], [0, 0.6, np.nan, 1], atol=1e-9)  # by id: 4, 5, 7, 9
  # An image that is a whole set has the set's own AP.
  alone = {**truth, "images": [truth["images"][2]], "annotations": [truth["annotations"][2]]}
  whole, own = tmp_path / "truth.json", tmp_path / "own.json"
  whole.write_text(json.dumps(alone))
  own.write_text(json.dumps([found[2]]))
  assert coco_ap.evaluate_files(whole, own)["box_AP"] == pytest.approx(scores["box_AP"][1])


def test_a_detector_that_finds_nothing_has_scores(tmp_path):
  square = {"segmentation": [[1, 2, 11, 2, 11, 12, 1, 12]]}
  truth = {
    "images": [{"id": identity, "width": 50, "height": 40} for identity in (4, 9)],
    "categories": [{"id": 3, "name": "disk"}],
    "annotations": [_object(9, [1, 2, 10, 10]) | {"id": 1} | square],
  }
  path = tmp_path / "detections.json"
  path.write_text("[]")
  scores = examples.of_detections(truth, path)
  for row in ("box_AP", "mask_AP"):
    np.testing.assert_array_equal(scores[row], [np.nan, 0])
  del truth["annotations"][0]["segmentation"]
  assert set(examples.of_detections(truth, path)) == {"box_AP"}


def _task(validation, classes=2):
  return types.SimpleNamespace(data={"validation": validation}, classes=[{}] * classes)


class _Maps:
  """Three images of 2 x 2 pixels; the last one is not labelled."""

  maps = (np.array([[0, 0], [1, 1]], np.uint8), np.zeros((2, 2), np.uint8), None)

  def __len__(self):
    return 3

  def label(self, index):
    return self.maps[index]

  def name(self, index):
    return f"image {index}"


def test_label_maps_are_scored_image_by_image(tmp_path):
  folder = tmp_path / "label_maps"
  folder.mkdir()
  for index, predicted in enumerate(([[0, 0], [0, 1]], [[0, 0], [0, 0]], [[1, 1], [1, 1]])):
    (folder / f"image {index}.png").write_bytes(label_maps.encode(np.array(predicted, np.uint8)))
  [scores] = examples.of_run(_task(_Maps()), "segmentation", tmp_path).values()
  np.testing.assert_allclose(scores, [(2 / 3 + 1 / 2) / 2, 1, np.nan])


def test_videos_are_right_or_wrong(tmp_path):
  (tmp_path / "predictions.csv").write_text("index,true,predicted\n0,1,1\n3,2,0\n")
  [scores] = examples.of_run(_task(range(4)), "action", tmp_path).values()
  np.testing.assert_array_equal(scores, [1, np.nan, np.nan, 0])


def test_maps_are_scored_image_by_image(tmp_path):
  source = rooms.Rooms(3, 32)
  found = {source.name(0): {"mean_angle": 12.0}, source.name(2): {"mean_angle": 30.0}}
  (tmp_path / "per_image.json").write_text(json.dumps(found))
  scores = examples.of_run(_task(source), "dense_regression", tmp_path)
  assert set(scores) == {"mean_angle"}  # no depth was learned
  np.testing.assert_array_equal(scores["mean_angle"], [12, np.nan, 30])


@pytest.mark.slow
def test_a_cell_of_normals_and_depth(tmp_path, monkeypatch):
  config = tasks_build.read_config(tiny.dense_regression())
  monkeypatch.setattr(cells.Plan, "config", lambda plan, cell: config)
  asked = reports.plan(tmp_path, seeds=1, tasks=("normals_depth",), backbones=("swinv2_nano",))
  cell = asked.cell("swinv2_nano/normals_depth/0")
  result = single.run(asked, cell).result
  assert set(result["scores"]) == {row.name for row in recipes.RECIPES["normals_depth"].rows}
  scores = cells.read_examples(asked, cell)
  for name, value in result["scores"].items():
    assert np.mean(scores[name]) == pytest.approx(value, rel=1e-6)


@pytest.fixture
def tiny_cell(tmp_path, monkeypatch):
  """(plan, cell) of a linear head for segmentation, on a tiny backbone and three scenes."""
  config = tiny.segmentation("linear")
  config.update(dict(steps=2, checkpoint_every=1, pictures=1))
  config = tasks_build.read_config(config)
  monkeypatch.setattr(cells.Plan, "config", lambda plan, cell: config)
  asked = reports.plan(tmp_path, seeds=1, tasks=("linear_segmentation",), backbones=("swinv2_nano",))
  return asked, asked.cell("swinv2_nano/linear_segmentation/0")


def test_a_cell_trains_a_head(tiny_cell, monkeypatch):
  asked, cell = tiny_cell
  found = single.run(asked, cell)
  result, folder = found.result, asked.folder(cell)
  assert found.state == "finished" and 0 <= result["scores"]["mIoU"] <= 1
  details = result["details"]
  head = details["trained_parameters"]
  assert details["steps"] == 2 and details["test_examples"] == 3 and 0 < head < 10_000
  assert [step for step, _ in details["curves"]["train/loss"]] == [1, 2]
  assert details["seconds"] > 0
  scores = cells.read_examples(asked, cell)["mIoU"]
  assert scores.shape == (3,) and np.isfinite(scores).all()
  [picture] = (folder / "pictures").glob("*.png")
  with Image.open(picture) as image:
    assert image.width > 64
  # What was lost of a finished run's cell is made of the files of the run, which has nothing left to do.
  (folder / "cell.json").unlink()
  monkeypatch.setattr(loop, "train", lambda config, folder: {})
  again = single.run(asked, cell).result
  assert again["scores"] == result["scores"]
  assert again["details"]["seconds"] is None  # of which this process knows the last part alone


def test_a_run_that_is_told_to_stop_is_no_failure(tiny_cell, monkeypatch):
  asked, cell = tiny_cell
  monkeypatch.setattr(loop, "train", lambda config, folder: {})
  with pytest.raises(single.Interrupted):
    single.run(asked, cell)
  assert cells.look(asked, cell).state == "missing"
  assert not (asked.folder(cell) / "error.json").exists()


def test_a_cache_that_another_seed_writes_does_not_stop_a_probe(tmp_path, monkeypatch):
  asked = reports.plan(tmp_path, seeds=1, tasks=("linear",))
  config, tried = asked.config(asked.cell("other/probes/0")), []

  class Stop(Exception):
    """What follows is that of any probe."""

  def probe(config, folder):
    tried.append(config.cache.path)
    raise lock.LockedError("Another process is writing.") if config.cache.path else Stop

  monkeypatch.setattr(single.probe, "probe", probe)
  with pytest.raises(Stop):
    single._probe(recipes.RECIPES["probes"], config, tmp_path)
  assert tried == [str(tmp_path / "features"), ""]
