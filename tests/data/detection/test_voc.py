"""Detection data in PASCAL VOC's layout."""

import pickle

import numpy as np
import pytest

from frozen_vision.data import classes, fingerprint, prepare
from frozen_vision.data.detection import coco, prepared_coco, voc
from tests.data.detection import voc_files

_BOTH = ("2007_trainval", "2012_trainval")


@pytest.fixture
def devkit(tmp_path):
  return voc_files.devkit(tmp_path / "VOCdevkit")


def test_boxes_of_two_years(devkit):
  source = voc.load_voc(devkit, _BOTH, difficult="object")
  assert source.class_names == classes.VOC and not source.has_masks
  assert source.image_ids.tolist() == [2007000005, 2007000007, 2007000009, 20122007000027]
  first, *_, last = (source[i] for i in range(4))
  assert first["image"].shape == (64, 64, 3)
  assert first["file_name"] == "VOC2007/JPEGImages/000005.jpg"
  # Inclusive pixels 5..30 from 1 are [4, 30) from 0; a part of a person is no object.
  np.testing.assert_array_equal(first["boxes"], [[4, 6, 30, 40], [30, 4, 60, 50]])
  assert first["labels"].tolist() == [classes.VOC.index("chair"), classes.VOC.index("person")]
  np.testing.assert_array_equal(last["boxes"], [[19.5, 10, 40.25, 60]])
  # The painted rectangle is where the box says.
  assert first["image"][6:40, 4:30].mean() > 130 > 90 > first["image"][52:, :].mean()


def test_difficult_objects_are_crowds_unless_they_are_trained_on(devkit):
  hard = voc.load_voc(devkit, _BOTH, drop_empty=True)
  assert hard.image_ids.tolist() == [2007000005, 2007000007, 20122007000027]  # one had nothing else
  assert hard[0]["crowd"].tolist() == [False, True]
  easy = voc.load_voc(devkit, _BOTH, drop_empty=True, difficult="object")
  assert len(easy) == 4 and not easy[0]["crowd"].any()
  truth = hard.ground_truth
  assert [row["difficult"] for row in truth["annotations"]] == [0, 1, 0, 0]
  assert [row["iscrowd"] for row in truth["annotations"]] == [0, 1, 0, 0]


def test_how_a_year_is_measured(devkit):
  def measure(root, splits, **options):
    return voc.load_voc(root, splits, **options).ground_truth["info"]["average_precision"]

  assert measure(devkit, ("2007_test",)) == "11_points"
  assert measure(devkit / "VOC2007", ("test",)) == "11_points"
  assert measure(devkit, _BOTH) == measure(devkit / "VOC2012", ("trainval",)) == "area"
  assert measure(devkit, ("2007_test",), average_precision="area") == "area"


def test_a_folder_of_ones_own(tmp_path):
  """Other names, endings and classes; sizes from the images, where the files have none."""
  root = voc_files.write(tmp_path / "mine", {"my_list": {"größe_1": [("helmet", 2, 3, 40, 41, 0)], "b": []}})
  (root / "JPEGImages/b.jpg").rename(root / "JPEGImages/b.JPEG")
  path = root / "Annotations/größe_1.xml"
  path.write_text(path.read_text().replace("<width>64</width>", "<width>0</width>").replace("Left", "ä"))
  source = voc.load_voc(root, ("my_list",), class_names=("helmet",))
  assert len(source) == 2 and source.image_ids.tolist() == [1, 2]
  assert source[1]["file_name"].endswith("b.JPEG")
  np.testing.assert_array_equal(source[0]["boxes"], [[1, 2, 40, 41]])
  assert (source[0]["height"], source[0]["width"]) == (64, 64)


def test_a_source_can_be_sent_to_a_worker_and_has_an_identity(devkit):
  source = voc.load_voc(devkit, _BOTH)
  again = pickle.loads(pickle.dumps(source))
  assert again.ground_truth == source.ground_truth
  same = fingerprint.of_source(voc.load_voc(devkit, _BOTH))
  assert fingerprint.of_source(source) == same
  path = devkit / "VOC2007/Annotations/000007.xml"
  path.write_text(path.read_text().replace("<xmin>1<", "<xmin>3<"))
  assert fingerprint.of_source(voc.load_voc(devkit, _BOTH)) != same


def test_annotations_that_are_no_use_are_counted(devkit):
  path = devkit / "VOC2007/Annotations/000005.xml"
  path.write_text(path.read_text().replace("<xmin>5<", "<xmin>nan<").replace("<xmax>60<", "<xmax>70<"))
  (devkit / "VOC2007/JPEGImages/000007.jpg").unlink()
  source = voc.load_voc(devkit, ("2007_trainval",), difficult="object")
  assert source.findings.counts == {"annotation_invalid": 1, "box_clipped": 1, "image_missing": 1}
  assert "bbox ['nan', '7', '30', '40']" in str(source.findings)
  assert "000007.jpg" in str(source.findings)


@pytest.mark.parametrize(
  "break_it, error, message",
  [
    (
      lambda r: (r / "VOC2007/ImageSets/Main/trainval.txt").unlink(),
      FileNotFoundError,
      "no such list.* test",
    ),
    (lambda r: (r / "VOC2007/Annotations/000007.xml").unlink(), FileNotFoundError, "000007.xml: no such"),
    (
      lambda r: _write(r, "<annotation><object></annotation>"),
      coco.CocoError,
      "000007.xml: is no readable XML",
    ),
    (
      lambda r: _write(r, "<html><body/></html>"),
      coco.CocoError,
      "000007.xml: is an XML of 'html'; expected",
    ),
    (lambda r: _write(r, '<!DOCTYPE a [<!ENTITY b "c">]><a/>'), coco.CocoError, "declares entities"),
    (
      lambda r: _write(r, voc_files.xml("x", [("zebra", 1, 1, 5, 5, 0)])),
      coco.CocoError,
      "object 1: is .*zebra",
    ),
    (lambda r: (r / "VOC2007/ImageSets/Main/trainval.txt").write_text("../../x\n"), ValueError, "leads out"),
    (
      lambda r: (r / "VOC2007/ImageSets/Main/trainval.txt").write_text("\n"),
      coco.CocoError,
      "lists no images",
    ),
  ],
)
def test_files_that_cannot_be_used_are_named(devkit, break_it, error, message):
  break_it(devkit)
  with pytest.raises(error, match=message):
    voc.load_voc(devkit, ("2007_trainval",))


def _write(root, text):
  (root / "VOC2007/Annotations/000007.xml").write_text(text)


def test_no_folder_and_no_split(tmp_path, devkit):
  with pytest.raises(FileNotFoundError, match="2007_test.*VOCdevkit with --config.detection.root"):
    voc.load_voc(tmp_path / "absent", ("2007_test",))
  with pytest.raises(coco.CocoError, match="no split is given"):
    voc.load_voc(devkit, ())


def test_prepared_data_are_those_of_the_files(devkit, tmp_path):
  assert prepare.main(["voc", "--root", str(devkit), "--out", str(tmp_path / "shards")]) == 0
  for split, lists, difficult in (("train", _BOTH, "object"), ("val", ("2007_test",), "crowd")):
    source = voc.load_voc(devkit, lists, difficult=difficult)
    prepared = prepared_coco.PreparedCoco(tmp_path / "shards", split)
    assert prepared.ground_truth == source.ground_truth and prepared.class_names == source.class_names
    for index in range(len(source)):
      one, other = source[index], prepared[index]
      for key in ("image", "boxes", "labels", "crowd", "image_id"):
        np.testing.assert_array_equal(one[key], other[key])
