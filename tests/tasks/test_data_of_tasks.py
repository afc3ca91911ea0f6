"""What tasks make of data with faults, before anything is built or trained."""

import json

import numpy as np
from PIL import Image
import pytest

from frozen_vision import config_files
from frozen_vision.data import findings, names, reports
from frozen_vision.tasks import build as tasks_build
from tests import paths


def _annotated(folder, *, masks=True, damaged=()):
  """A COCO JSON and its images below a new folder: (the option's values, the file)."""
  (folder / "img").mkdir(parents=True)
  images, annotations = [], []
  for i in range(4):
    file = folder / "img" / f"{i}.png"
    Image.fromarray(np.full((64, 80, 3), 40 * i, np.uint8)).save(file)
    if i in damaged:
      file.write_bytes(file.read_bytes()[:60])
    images.append(dict(id=i + 1, file_name=file.name, height=64, width=80))
    square = [[2, 3, 22, 3, 22, 23, 2, 23]] if masks else []
    row = dict(id=i + 1, image_id=i + 1, category_id=1, bbox=[2, 3, 20, 20], area=400, iscrowd=0)
    annotations.append(row | dict(segmentation=square))
  path = folder / "ann.json"
  path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=[dict(id=1, name="a")])))
  return dict(annotations=str(path), images=str(folder / "img"))


def _detection(train, validation, **options):
  changes = {"detection": dict(data="files", train=train, validation=validation, frame=(64, 80))}
  return tasks_build.build_task(config_files.load_config("configs/coco_htc.py:files", changes | options))


@pytest.fixture(autouse=True)
def _at_root(request, monkeypatch):
  monkeypatch.chdir(request.config.rootpath)


def test_annotations_without_masks_train_boxes_only(tmp_path):
  boxes, masks = _annotated(tmp_path / "boxes", masks=False), _annotated(tmp_path / "masks")
  task = _detection(boxes, boxes)
  assert task.headline.endswith("Boxes only: the training annotations have no masks.")
  assert task.best_metric == "box_AP" and "masks" not in task.blank_example()
  assert "masks" not in next(task.train_batches(0))
  config = config_files.load_config("configs/coco_htc.py:files")
  config = tasks_build.read_config(config)
  assert config.detection.head.with_masks and not task.settle(config).detection.head.with_masks
  reports.check(task.data)
  task = _detection(masks, boxes)
  assert task.headline.endswith("Only boxes are evaluated: the validation annotations have no masks.")
  assert task.best_metric == "box_AP" and "masks" in task.blank_example() and task.settle(config) == config
  assert _detection(masks, masks).best_metric == "mask_AP"
  with pytest.raises(ValueError, match="copy_paste is 0.5, and only boxes are trained.*copy_paste=0"):
    _detection(boxes, boxes, **{"detection.copy_paste": 0.5})


def test_bad_images_of_both_sets_are_found_when_a_run_starts(tmp_path):
  sound, damaged = _annotated(tmp_path / "one"), _annotated(tmp_path / "two", damaged=[2])
  for pair, name in (((sound, damaged), "validation"), ((damaged, sound), "training")):
    task = _detection(*pair)
    with pytest.raises(
      findings.DroppedError, match=f"Of the {name} data 1 of 4 images .*2.png: cannot be decoded"
    ):
      reports.check(task.data)
    assert len(task.data[name]) == 3
  unchecked = _detection(sound, damaged, **{"data.check": False})
  assert len(unchecked.data["validation"]) == 4


def test_objects_that_are_never_shown_stop_a_run(tmp_path):
  pair = _annotated(tmp_path / "one")
  task = _detection(pair, pair, **{"detection.frame": (2, 2), "detection.resize": "fit"})
  with pytest.raises(findings.DroppedError, match="4 of 4 objects .*smaller than min_box_size.*larger frame"):
    reports.check(task.data)


def test_held_out_images_do_not_repeat_what_was_found(tmp_path):
  pair = _annotated(tmp_path / "one", damaged=[2])
  task = _detection(pair, dict(annotations="", images=""), **{"detection.validation_fraction": 0.3})
  assert task.data["training"].findings.counts == {"image_unreadable": 1}
  assert not task.data["validation"].findings


def _segmentation(folder, **options):
  pair = dict(images="img", labels="lab")
  section = dict(data="files", root=str(folder), classes="classes.json", train=pair, validation=pair)
  changes = {"segmentation": section} | options
  return tasks_build.build_task(config_files.load_config("configs/ade20k_mask2former.py", changes))


def test_a_class_of_value_255_and_one_that_never_occurs():
  task = _segmentation(paths.faults_dir("label_value_255"))
  assert [entry["name"] for entry in task.classes] == ["background", "lesion"]
  assert not task.data["training"].findings


def test_labels_of_no_class(tmp_path):
  for kind in ("img", "lab"):
    (tmp_path / kind).mkdir()
    for i in range(3):
      Image.fromarray(np.full((40, 40), i, np.uint8)).save(tmp_path / kind / f"{i}.png")
  (tmp_path / "classes.json").write_text('["a", "b", "c", "d"]')
  task = _segmentation(tmp_path)
  assert task.data["training"].findings.examples == {"class_absent": ["d"]}
  assert not task.data["validation"].findings
  (tmp_path / "classes.json").write_text('["a", "b"]')
  with pytest.raises(findings.DroppedError, match="1 of 3 images would be left out.*2 .1600 pixels."):
    reports.check(_segmentation(tmp_path).data)
  task = _segmentation(tmp_path, **{"segmentation.unknown_labels": "ignore"})
  with pytest.raises(findings.DroppedError, match="1,600 of 4,800 pixels would be left out"):
    reports.check(task.data)


def test_videos_and_folders(tmp_path):
  (tmp_path / "a.mp4").write_bytes(b"no video")
  (tmp_path / "l.csv").write_text("path,label\na.mp4,x\n")
  changes = {"action": dict(data="videos", train=str(tmp_path / "l.csv"), validation=str(tmp_path / "l.csv"))}
  source = "configs/kinetics_video_swin.py"
  task = tasks_build.build_task(config_files.load_config(source, changes))
  with pytest.raises(findings.DroppedError, match="1 of 1 videos would be left out.*a.mp4"):
    reports.check(task.data)
  (tmp_path / "l.csv").write_text("path,label\n../x.mp4,x\n")
  with pytest.raises(names.OutsideError, match="line 2, has the file name '../x.mp4'"):
    tasks_build.build_task(config_files.load_config(source, changes))
  for label in ("x", "y"):
    (tmp_path / "all" / label).mkdir(parents=True)
    (tmp_path / "all" / label / "0.png").write_bytes(b"no image")
  changes = {"classification": dict(train=str(tmp_path / "all"), validation=str(tmp_path / "all"))}
  task = tasks_build.build_task(config_files.load_config("configs/cifar10_swinv2_nano.py", changes))
  with pytest.raises(findings.DroppedError, match="2 of 2 images would be left out"):
    reports.check(task.data)
