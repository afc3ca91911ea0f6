"""Fingerprints of data: equal for equal data, and every part that changes is named."""

import shutil

import pytest

from frozen_vision.data import fingerprint
from frozen_vision.data.classification import folders
from frozen_vision.data.detection import coco, photos, semantic_maps
from frozen_vision.data.generated import motion_clips, scenes, semantic_scenes, shape_images
from frozen_vision.data.segmentation import label_maps
from frozen_vision.data.segmentation import sources as segmentation
from frozen_vision.data.video import sources as videos
from tests import tiny


def _changed(first, second):
  return fingerprint.changed({"training": first}, {"training": second}).get("training")


def test_image_folders(tmp_path):
  root = tiny.image_folder(tmp_path / "images", classes=2, images=3)
  first = fingerprint.of_source(folders.ImageFolder(root))
  assert first["examples"] == 6 and all(type(value) in (int, str) for value in first.values())
  copied = shutil.copytree(root, tmp_path / "elsewhere")
  assert fingerprint.of_source(folders.ImageFolder(copied)) == first

  def now():
    return _changed(first, fingerprint.of_source(folders.ImageFolder(copied)))

  image = copied / "class0" / "1.png"
  image.write_bytes(image.read_bytes() + b"\0")
  assert now() == "file sizes"
  shutil.copy(root / "class0" / "1.png", image)
  image.rename(image.with_name("3.png"))
  assert now() == "file names"
  (copied / "class0" / "3.png").unlink()
  assert now() == (6, 5)
  decoded = [folders.DecodedImages(folders.ImageFolder(path)) for path in (root, root)]
  decoded[1]._images[0, 0, 0, 0] ^= 1
  assert _changed(*map(fingerprint.of_source, decoded)) == "pixels"


def test_annotations():
  sample = photos.sample_photos()
  source = coco.load_coco(sample.annotations, sample.images)
  first = fingerprint.of_source(source)
  assert fingerprint.of_source(coco.load_coco(sample.annotations, sample.images)) == first
  source._table.boxes[3, 2] += 1
  assert _changed(first, fingerprint.of_source(source)) == "annotations"
  assert _changed(first, fingerprint.of_source(source.take(range(3)))) == (len(source), 3)


def test_label_images(tmp_path):
  for folder in ("images", "labels"):
    for name in ("a", "b"):
      path = tmp_path / folder / f"{name}.png"
      path.parent.mkdir(exist_ok=True)
      path.write_bytes(name.encode())

  def source(*names):
    found = segmentation.LabelledImages(
      tmp_path / "images", tmp_path / "labels", label_maps.LabelFormat(names)
    )
    return fingerprint.of_source(found)

  first = source("sky", "tree")
  assert _changed(first, source("sky", "sea")) == "class list"
  (tmp_path / "labels" / "b.png").write_bytes(b"bb")
  assert _changed(first, source("sky", "tree")) == "file sizes"
  maps = [
    semantic_maps.WithSemanticMaps(scenes.SceneSource(2, 64), tmp_path / folder, num_classes=2)
    for folder in ("images", "labels")
  ]
  assert _changed(*map(fingerprint.of_source, maps)) == "semantic maps"


def test_videos(tmp_path):
  (tmp_path / "a.mp4").write_bytes(b"a")
  paths = [tmp_path / "a.mp4", tmp_path / "absent.mp4"]
  one = videos.VideoList(paths, [0, 1], ["walk", "run"])
  other = videos.VideoList(paths, [1, 0], ["walk", "run"])
  first = fingerprint.of_source(one)
  assert _changed(first, fingerprint.of_source(other)) == "labels"
  both = [fingerprint.of_source(videos.Selection([part])) for part in (one, other)]
  assert "labels" in _changed(*both)
  (tmp_path / "a.mp4").write_bytes(b"ab")
  assert _changed(first, fingerprint.of_source(one)) == "file sizes"


@pytest.mark.parametrize(
  "make",
  [
    lambda seed: scenes.SceneSource(3, 64, seed),
    lambda seed: semantic_scenes.SemanticScenes(3, 64, seed),
    lambda seed: motion_clips.MotionClipSource(3, 4, 32, seed),
    lambda seed: shape_images.ShapeImages(3, 32, seed),
  ],
)
def test_generated_data_are_what_they_are_made_from(make):
  first = fingerprint.of_source(make(0))
  assert first == fingerprint.of_source(make(0))
  assert _changed(first, fingerprint.of_source(make(1))) == "description"


def test_sources_without_an_identity():
  class Records:
    def __len__(self):
      return 2

  assert fingerprint.of_source(Records()) == fingerprint.of_source(Records())


def test_a_resumed_run_says_what_has_changed():
  saved = {"training": {"examples": 50, "file sizes": "a"}, "validation": {"examples": 3, "labels": "a"}}
  assert fingerprint.check_resumed(saved, saved, where="W", allow=False) is None
  assert fingerprint.check_resumed(None, saved, where="W", allow=False) is None
  more = {"training": saved["training"] | {"labels": "b"}, "test": {"examples": 1}}
  assert fingerprint.check_resumed(saved, saved | more, where="W", allow=False) is None  # of a later version
  with pytest.raises(ValueError, match="there are 0 validation examples, 3 then"):
    fingerprint.check_resumed(saved, {"training": saved["training"]}, where="W", allow=False)
  now = {"training": {"examples": 49, "file sizes": "b"}, "validation": {"examples": 3, "labels": "b"}}
  said = "there are 49 training examples, 50 then; the validation examples have other labels"
  with pytest.raises(ValueError, match=f"{said}.*--config.data.allow_changes=True"):
    fingerprint.check_resumed(saved, now, where="W", allow=False)
  assert said in fingerprint.check_resumed(saved, now, where="W", allow=True)
