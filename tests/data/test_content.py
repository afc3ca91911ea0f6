"""Digests of data: the same for the same data and transform, another for whatever changes."""

import dataclasses
import os
import pickle
import shutil
import threading

import numpy as np
import pytest

from frozen_vision.data import content
from frozen_vision.data.classification import augment, folders
from frozen_vision.data.detection import transforms as detection_transforms
from frozen_vision.data.generated import scenes, semantic_scenes
from frozen_vision.data.segmentation import label_maps, sources
from frozen_vision.data.video import sources as video_sources
from tests import tiny

_of = content.digest


def _touch(path):
  """Gives a file another time of change."""
  found = os.stat(path)
  os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))


@pytest.fixture
def images(tmp_path):
  return tiny.image_folder(tmp_path / "images")


def test_a_changed_file_changes_it_and_reading_does_not(images):
  source = folders.ImageFolder(images)
  before = _of(source)
  source.check()
  assert source[3]["label"] == 0
  assert _of(source) == _of(folders.ImageFolder(images)) == _of(pickle.loads(pickle.dumps(source))) == before
  path = images / "class1" / "2.png"
  _touch(path)
  touched = _of(source)
  assert touched != before
  found = os.stat(path)
  path.write_bytes(path.read_bytes() + b"\0")
  os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
  assert _of(source) != touched


def test_names_labels_and_classes_change_it_and_the_place_of_the_folder_does_not(images):
  before = _of(folders.ImageFolder(images))
  moved = shutil.move(images, images.parent / "moved")
  assert _of(folders.ImageFolder(moved)) == before
  assert _of(folders.ImageFolder(moved, classes=["class1", "class0", "class2"])) != before
  (moved / "class1" / "2.png").rename(moved / "class2" / "9.png")
  assert _of(folders.ImageFolder(moved)) != before


def test_settings_of_generated_data_change_it():
  made = [
    scenes.SceneSource(length, image_size=64, seed=seed) for length, seed in ((4, 0), (4, 0), (5, 0), (4, 1))
  ]
  made[0][2]
  first, *others = map(_of, made)
  assert [other == first for other in others] == [True, False, False]
  assert _of(semantic_scenes.SemanticScenes(4, split="train", image_size=64, seed=0)) != first


def test_annotations_and_label_images_count(tmp_path):
  rng = np.random.default_rng(0)
  for name in ("images", "labels"):
    (tmp_path / name).mkdir()
  pixels = rng.integers(0, 2, (8, 8)).astype(np.uint8)
  (tmp_path / "images" / "a.png").write_bytes(label_maps.encode(pixels))
  (tmp_path / "labels" / "a.png").write_bytes(label_maps.encode(pixels))
  label_format = label_maps.LabelFormat(class_names=("0", "1"))
  source = sources.LabelledImages(tmp_path / "images", tmp_path / "labels", label_format)
  before = _of(source)
  assert source.largest_size == (8, 8) and _of(source) == before
  _touch(tmp_path / "labels" / "a.png")
  assert _of(source) != before


def test_videos_are_files_too(tmp_path):
  (tmp_path / "a.mp4").write_bytes(b"0")
  listed = video_sources.VideoList([tmp_path / "a.mp4"], [0], ["run"])
  chosen = video_sources.concatenate([listed])
  before = _of(listed), _of(chosen)
  _touch(tmp_path / "a.mp4")
  assert _of(listed) != before[0] and _of(chosen) != before[1]
  (tmp_path / "a.mp4").unlink()
  with pytest.raises(FileNotFoundError, match="a.mp4"):
    _of(listed)


def test_every_setting_of_a_transform_changes_it():
  transform = augment.TrainTransform(16)
  before = _of(transform)
  assert _of(augment.TrainTransform(16)) == before
  changes = [
    dict(size=17),
    dict(padding=1),
    dict(flip=False),
    dict(rand_augment=augment.RandAugment(magnitude=8.0)),
  ]
  found = {_of(dataclasses.replace(transform, **change)) for change in changes}
  assert len(found | {before}) == 5
  resize = detection_transforms.ResizeToLimits()
  assert _of(resize) != before


def test_what_cannot_be_read_is_named():
  with pytest.raises(TypeError, match="_thread.lock|dict.'a'. is a lock"):
    _of({"a": threading.Lock()})
