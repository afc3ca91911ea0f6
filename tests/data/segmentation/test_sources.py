"""Sources of labelled images: pairs of files, ADE20K's layout, real data as on disk, generated scenes."""

import json
import pickle

import numpy as np
from PIL import Image
import pytest

from frozen_vision.data import images
from frozen_vision.data.generated import scenes, semantic_scenes
from frozen_vision.data.segmentation import ade20k, class_lists, label_maps, sources
from tests import paths

FORMAT = label_maps.LabelFormat(("a", "b"))


def write(root, name, *, size=(6, 8), label=None, image=True):
  """images/NAME.jpg and labels/NAME.png, whose values are random classes unless given."""
  for folder in ("images", "labels"):
    (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
  if image:
    Image.new("RGB", size[::-1], "gray").save(root / "images" / f"{name}.jpg")
  if label is None:
    label = np.random.default_rng(len(name)).integers(0, 2, size, dtype=np.uint8)
  if label is not False:
    Image.fromarray(label).save(root / "labels" / f"{name}.png")
  return label


def open_(root, **options):
  return sources.LabelledImages(root / "images", root / "labels", FORMAT, **options)


def test_pairs_are_found_by_path(tmp_path):
  wanted = {name: write(tmp_path, name) for name in ("b", "city/a", "city/deep/c")}
  write(tmp_path, "extra", image=False)
  source = pickle.loads(pickle.dumps(open_(tmp_path)))
  assert [source.name(i) for i in range(len(source))] == ["b", "city/a", "city/deep/c"]
  for i in range(3):
    record = source[i]
    assert set(record) == {"image", "label", "name"} and record["image"].shape == (6, 8, 3)
    np.testing.assert_array_equal(record["label"], wanted[record["name"]])
    np.testing.assert_array_equal(source.label(i), record["label"])
  assert source.largest_size == (6, 8)
  part = source.take([2])
  assert len(part) == 1 and part.name(0) == "city/deep/c" and part.largest_size == (6, 8)


def test_suffixes_as_cityscapes_has_them(tmp_path):
  for name in ("x/1_leftImg8bit", "x/1_other"):
    write(tmp_path, name, label=False)
  (tmp_path / "labels/x").mkdir(exist_ok=True)
  Image.new("L", (8, 6), 1).save(tmp_path / "labels/x/1_gtFine_labelIds.png")
  Image.new("L", (8, 6), 0).save(tmp_path / "labels/x/1_gtFine_instanceIds.png")
  source = open_(tmp_path, image_suffix="_leftImg8bit", label_suffix="_gtFine_labelIds")
  assert len(source) == 1 and source.name(0) == "x/1" and (source.label(0) == 1).all()


def test_unlabelled_images(tmp_path):
  write(tmp_path, "a")
  for name in ("b", "c"):
    write(tmp_path, name, label=False)
  with pytest.raises(
    ValueError, match="2 of 3 images of .* have no label image in .*: b.jpg, c.jpg. Expected the same"
  ):
    open_(tmp_path)
  assert len(open_(tmp_path, unlabelled="skip")) == 1
  kept = open_(tmp_path, unlabelled="keep")
  assert len(kept) == 3 and kept[1]["label"] is None and kept.label_path(2) is None
  nothing = sources.LabelledImages(tmp_path / "images", None, FORMAT, unlabelled="keep")
  assert [nothing.label(i) for i in range(3)] == [None] * 3
  with pytest.raises(ValueError, match="known: error, skip, keep"):
    open_(tmp_path, unlabelled="drop")


def test_sizes_that_differ_are_named(tmp_path):
  write(tmp_path, "a", label=np.zeros((6, 7), np.uint8))
  with pytest.raises(images.ImageError, match=r"images/a.jpg: is 8 x 6 pixels .* annotations are for 7 x 6"):
    open_(tmp_path)[0]
  turned = Image.new("RGB", (8, 6))
  exif = turned.getexif()
  exif[274] = 6
  turned.save(tmp_path / "images/a.jpg", exif=exif)
  Image.new("L", (8, 6)).save(tmp_path / "labels/a.png")
  with pytest.raises(
    images.ImageError, match="is 6 x 8 pixels .* rotation that the file's EXIF tag asks for"
  ):
    open_(tmp_path)[0]


def test_wrong_folders_are_named(tmp_path):
  write(tmp_path, "a")
  with pytest.raises(FileNotFoundError, match="absent is not a folder; expected images"):
    sources.LabelledImages(tmp_path / "absent", tmp_path, FORMAT)
  with pytest.raises(ValueError, match="labels has no label images; expected"):
    open_(tmp_path, label_suffix="_ids")
  Image.new("RGB", (8, 6)).save(tmp_path / "images/a.png")
  with pytest.raises(ValueError, match="has a.jpg and a.png; expected one file"):
    open_(tmp_path)


def test_ade20k_layout(tmp_path):
  assert len(set(ade20k.CLASS_NAMES)) == 150
  assert ade20k.CLASS_NAMES[0] == "wall" and ade20k.CLASS_NAMES[-1] == "flag"
  stored = np.array([[0, 1, 2], [150, 150, 0]], np.uint8)
  for split in ade20k.SPLITS:
    for folder, ending, picture in (
      ("images", "jpg", Image.new("RGB", (3, 2))),
      ("annotations", "png", Image.fromarray(stored)),
    ):
      path = tmp_path / folder / split
      path.mkdir(parents=True)
      picture.save(path / f"ADE_{split}_1.{ending}")
    source = ade20k.ade20k_root(tmp_path, split)
    np.testing.assert_array_equal(source.label(0), [[255, 0, 1], [149, 149, 255]])
  stored[0, 0] = 151
  Image.fromarray(stored).save(tmp_path / "annotations/training/ADE_training_1.png")
  with pytest.raises(images.ImageError, match=r"ADE_training_1.png: .*151 \(1 pixels\)"):
    ade20k.ade20k_root(tmp_path, "training").label(0)
  with pytest.raises(FileNotFoundError, match="so .* is not ADE20K's. Download ADEChallengeData2016.zip"):
    ade20k.ade20k_root(tmp_path / "images", "training")
  with pytest.raises(ValueError, match="'test'; expected one of"):
    ade20k.ade20k_root(tmp_path, "test")


def test_camvid_as_it_lies_on_disk():
  root = paths.data_dir("camvid")
  form = class_lists.read_format(root / "meta.json")
  assert len(form.class_names) == 11 and "Unlabelled" not in form.class_names
  source = sources.LabelledImages(root / "val/images", root / "val/labels", form)
  assert len(source) == 51 and source.largest_size == (360, 480)
  record = source[0]
  stored = np.asarray(Image.open(root / "val/labels" / f"{record['name']}.png"))
  np.testing.assert_array_equal(record["label"], np.where(stored == 11, 255, stored))
  assert record["image"].shape == (360, 480, 3)


def test_coco_semantic_and_panoptic_files_agree():
  root = paths.data_dir("coco_panoptic")
  annotations = root / "annotations/panoptic_val2017.json"
  form = class_lists.read_format(annotations)
  assert len(form.class_names) == 133 and form.class_names[0] == "person"
  folder = root / "val2017"
  semantic = sources.LabelledImages(folder / "images", folder / "semantic", form)
  panoptic = sources.LabelledImages(folder / "images", folder / "panoptic", form, segments=annotations)
  assert len(semantic) == len(panoptic) == 40
  ids = [category["id"] for category in json.loads(annotations.read_text())["categories"]]
  for i in range(0, 40, 5):
    label = semantic.label(i)
    np.testing.assert_array_equal(panoptic.label(i), label)
    stored = np.asarray(Image.open(semantic.label_path(i)))
    known = label != 255
    np.testing.assert_array_equal(np.array(ids)[label[known]], stored[known])
    assert (stored[~known] == 0).all()
  with pytest.raises(images.ImageError, match="not among the annotations of the panoptic JSON"):
    sources.LabelledImages(
      folder / "images", folder / "panoptic", form, segments=root / "annotations/panoptic_train2017.json"
    ).label(0)


def test_scenes_have_the_class_of_the_shape_that_shows():
  source = semantic_scenes.SemanticScenes(5, (64, 96), seed=3, split="validation")
  shapes = scenes.SceneSource(5, (64, 96), seed=3, split="validation")
  assert source.class_names == ("background", "disc", "rectangle", "triangle", "star", "ring", "cross")
  assert len(source) == 5 and source.largest_size == (64, 96)
  for i in range(5):
    record, truth = source[i], shapes[i]
    np.testing.assert_array_equal(record["image"], truth["image"])
    wanted = np.zeros((64, 96), int)
    for mask, label in zip(truth["masks"], truth["labels"]):
      wanted[mask] = label + 1
    assert record["label"].dtype == np.uint8
    np.testing.assert_array_equal(record["label"], wanted)
    np.testing.assert_array_equal(source.label(i), wanted)
  with pytest.raises(IndexError):
    source[5]
