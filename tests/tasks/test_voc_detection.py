"""Detection on VOC's layout: data, classes and the numbers of an evaluation, without a model."""

import json

import numpy as np
import pytest

from frozen_vision import config_files
from frozen_vision.data import prepare
from frozen_vision.metrics import voc_ap
from frozen_vision.tasks import build as tasks_build
from tests import tiny
from tests.data.detection import voc_files


@pytest.fixture
def config(tmp_path):
  config = tiny.detection()
  config.detection.data = "voc"
  config.detection.root = str(voc_files.devkit(tmp_path / "VOCdevkit"))
  return config


def _evaluated(task):
  """Perfect detections of every object, and one that is wrong in each image."""
  source, evaluator = task.data["validation"], task.evaluator()
  for index in range(len(source)):
    record = source[index]
    boxes = np.concatenate([record["boxes"], [[0, 0, 3, 3]]])[None].astype(np.float32)
    labels = np.concatenate([record["labels"], [14]])[None]
    scores = np.full(labels.shape, 0.9, np.float32)
    scores[0, -1] = 0.1
    size = np.array([[record["height"], record["width"]]])
    evaluator.update(
      dict(boxes=boxes, labels=labels, scores=scores, valid=np.ones(labels.shape, bool)),
      dict(image_size=size, original_size=size, image_id=np.array([record["image_id"]])),
    )
  return evaluator.result()


def test_boxes_are_trained_on_and_difficult_ones_are_not_counted(config):
  task = tasks_build.build_task(config)
  assert len(task.classes) == 20 and task.best_metric == "box_AP"
  assert "Boxes only" in task.headline
  with task.train_batches(0) as batches:
    batch = next(batches)
  assert "masks" not in batch and batch["valid"].any(axis=1).all()
  found = _evaluated(task)
  # The dog is found; of persons the test images show a difficult one alone, so nothing of that class counts.
  assert {name: found[name] for name in ("voc_AP", "voc_AP50", "voc_AP75", "box_AP")} == {
    "voc_AP": 1.0, "voc_AP50": 1.0, "voc_AP75": 1.0, "box_AP": pytest.approx(1.0),
  }  # fmt: skip


def test_difficult_objects_may_be_left_out_and_the_measure_be_chosen(config):
  config.detection.voc.update(dict(difficult=False, average_precision="area"))
  task = tasks_build.build_task(config)
  assert len(task.data["training"]) == 3  # the fourth image shows a difficult object alone
  assert voc_ap.measured_by(task.data["validation"].ground_truth) == "area"
  assert voc_ap.measured_by(tasks_build.build_task(tiny.detection()).data["validation"].ground_truth) is None


def test_classes_of_ones_own(config, tmp_path):
  config.detection.voc.classes = str(tmp_path / "classes.json")
  (tmp_path / "classes.json").write_text(json.dumps(["person", "dog", "chair", "car"]))
  assert [one["name"] for one in tasks_build.build_task(config).classes] == ["person", "dog", "chair", "car"]
  (tmp_path / "classes.json").write_text(json.dumps(["person"]))
  with pytest.raises(ValueError, match="chair.*--config.detection.voc.classes=FILE"):
    tasks_build.build_task(config)


def test_prepared_data_are_measured_alike(config, tmp_path):
  assert prepare.main(["voc", "--root", config.detection.root, "--out", str(tmp_path / "shards")]) == 0
  config.detection.update(dict(data="prepared", root=str(tmp_path / "shards")))
  found = _evaluated(tasks_build.build_task(config))
  assert found["voc_AP50"] == 1.0


def test_the_recipe_opens_the_devkit(config):
  changes = {"detection.root": config.detection.root, "detection.head.with_masks": False}
  task = tasks_build.build_task(config_files.load_config("voc_faster_rcnn", changes))
  assert (len(task.data["training"]), len(task.data["validation"])) == (4, 2)
  assert isinstance(task.evaluator(), voc_ap.VocEvaluator)


def test_no_data(config, tmp_path):
  config.detection.root = str(tmp_path / "absent")
  with pytest.raises(FileNotFoundError, match="VOCtrainval_06-Nov-2007.tar"):
    tasks_build.build_task(config)
