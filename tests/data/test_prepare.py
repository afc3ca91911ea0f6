"""Preparation: bad files are named, and what is written reads back as it was."""

import json
import pathlib
import pickle
import shutil
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from frozen_vision.data import prepare, prepare_checks
from frozen_vision.data.detection import coco, prepared_coco
from frozen_vision.data.segmentation import ade20k, prepared_segmentation
from frozen_vision.files import lock
from tests import paths, samples
from tests.data import test_images

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(name="part", scope="module")
def _part(tmp_path_factory):
  """COCO's layout: crowds, an image without objects."""
  return samples.coco_root(tmp_path_factory.mktemp("coco"))


@pytest.fixture(name="written", scope="module")
def _written(part, tmp_path_factory):
  pytest.importorskip("tensorflow", reason="writing shards needs TensorFlow")
  out = tmp_path_factory.mktemp("prepared")
  assert prepare.main(["coco", "--root", str(part), "--out", str(out)]) == 0
  return out


def _assert_same(one, other):
  assert list(one) == list(other)
  for key, value in one.items():
    assert type(other[key]) is type(value), key
    np.testing.assert_equal(other[key], value, err_msg=key)
    if isinstance(value, np.ndarray):
      assert other[key].dtype == value.dtype and other[key].shape == value.shape, key


@pytest.mark.parametrize("split", ["train", "val"])
def test_reads_back_exactly_what_was_there(part, written, split):
  direct = coco.coco_root(part, split)
  prepared = prepared_coco.PreparedCoco(written, split)
  assert len(prepared) == len(direct) and prepared.labelled
  assert prepared.categories == direct.categories
  assert prepared.class_names == direct.class_names
  np.testing.assert_array_equal(prepared.image_ids, direct.image_ids)
  np.testing.assert_array_equal(prepared.objects_per_image(), direct.objects_per_image())
  crowds = 0
  for index in range(len(direct)):
    assert prepared.read(index)[1] == direct.read(index)[1]  # the file's own bytes
    record = direct[index]
    _assert_same(record, prepared[index])
    np.testing.assert_array_equal(coco.masks(prepared[index]), coco.masks(record))
    crowds += record["crowd"].sum()
  assert crowds > 0
  assert prepared.ground_truth == direct.ground_truth
  with pytest.raises(IndexError):
    prepared[len(direct)]


def test_what_images_of_lvis_were_searched_for_is_kept(part, tmp_path):
  pytest.importorskip("tensorflow", reason="writing shards needs TensorFlow")
  folder, annotations = part / "val2017", tmp_path / "lvis.json"
  raw = json.loads((part / "annotations" / "instances_val2017.json").read_text())
  ids = [category["id"] for category in raw["categories"]]
  for number, image in enumerate(raw["images"]):
    image |= {"neg_category_ids": ids[: number % 3], "not_exhaustive_category_ids": ids[-1:] * (number % 2)}
  annotations.write_text(json.dumps(raw))
  command = ["coco", "--images", str(folder), "--annotations", str(annotations), "--out", str(tmp_path)]
  assert prepare.main([*command, "--split", "lvis"]) == 0
  direct, prepared = coco.load_coco(annotations, folder), prepared_coco.PreparedCoco(tmp_path, "lvis")
  for index in range(len(direct)):
    _assert_same(direct[index], prepared[index])
  assert sum(len(prepared[index]["negative_classes"]) for index in range(len(direct))) > 0
  index_file = prepared_coco.KIND.folder(tmp_path, "lvis") / "index.npz"
  with np.load(index_file) as archive:
    index = dict(archive)
  np.savez(index_file, **index | {"negative_classes": index["negative_classes"] + len(ids)})
  with pytest.raises(ValueError, match="index.npz is damaged .*negative_classes of images do not fit them"):
    prepared_coco.PreparedCoco(tmp_path, "lvis")


def test_filters_of_the_prepared_data(part, written):
  options = {"drop_empty": True}
  direct = coco.coco_root(part, "train", **options)
  prepared = prepared_coco.PreparedCoco(written, "train", **options)
  assert len(prepared) == len(direct) < 12
  _assert_same(direct[len(direct) - 1], prepared[len(direct) - 1])
  chosen = direct.image_ids[[1, 3]].tolist()
  prepared = prepared_coco.PreparedCoco(written, "train", image_ids=chosen)
  assert prepared.ground_truth == coco.coco_root(part, "train", image_ids=chosen).ground_truth
  assert [prepared[i]["image_id"] for i in range(2)] == chosen
  with pytest.raises(coco.CocoError, match=r"these ids: \[5\]"):
    prepared_coco.PreparedCoco(written, "train", image_ids=[5])


def test_worker_reads_without_tensorflow(written, tmp_path):
  prepared = prepared_coco.PreparedCoco(written, "val")
  size = len(pickle.dumps(prepared))
  image = prepared[1]["image"]
  data = pickle.dumps(prepared)
  assert len(data) == size < 20_000
  (tmp_path / "source.pickle").write_bytes(data)
  code = (
    "import pickle, sys\n"
    "source = pickle.load(open(sys.argv[1], 'rb'))\n"
    "print(source[1]['image'].sum(), 'tensorflow' in sys.modules)"
  )
  result = subprocess.run(
    [sys.executable, "-c", code, tmp_path / "source.pickle"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert result.stdout.split() == [str(image.sum()), "False"]


def test_preparing_twice_asks_first(part, written, capsys):
  command = ["coco", "--root", str(part), "--split", "val", "--out", str(written)]
  assert prepare.main(command) == 1
  assert "--overwrite" in capsys.readouterr().err
  folder = prepared_coco.KIND.folder(written, "val")
  with lock.hold(folder.parent.with_name(".val.lock"), "shards"):
    assert prepare.main([*command, "--overwrite"]) == 1
    assert f"is writing prepared data in {folder}. Wait for it" in capsys.readouterr().err
  # An interrupted run: shards, but no index yet.
  (folder / "index.npz").unlink()
  with pytest.raises(FileNotFoundError, match="is incomplete; prepare it with"):
    prepared_coco.PreparedCoco(written, "val")
  assert prepare.main(command) == 0
  assert len(prepared_coco.PreparedCoco(written, "val")) == 5
  with pytest.raises(FileNotFoundError, match="is absent"):
    prepared_coco.PreparedCoco(written, "test")


def test_bad_files_are_named_and_left_out(part, tmp_path, capsys):
  pytest.importorskip("tensorflow", reason="writing shards needs TensorFlow")
  images, annotations = tmp_path / "images", part / "annotations" / "instances_val2017.json"
  shutil.copytree(part / "val2017", images)
  names = sorted(path.name for path in images.iterdir())
  (images / names[0]).write_bytes((images / names[0]).read_bytes()[:9000])
  shutil.copy(images / names[3], images / names[1])  # another size
  (images / names[2]).unlink()
  command = ["coco", "--images", str(images), "--annotations", str(annotations), "--split", "val"]
  command += ["--out", str(tmp_path / "out")]
  assert prepare.main([*command, "--strict"]) == 1
  assert not (tmp_path / "out").exists()
  capsys.readouterr()
  assert prepare.main([*command, "--check"]) == 0 and not (tmp_path / "out").exists()
  assert prepare.main(command) == 0
  text = capsys.readouterr().out
  assert f"bad: {names[0]}: cannot be decoded" in text and "truncated" in text
  assert f"bad: {names[1]}: is " in text
  assert f"do not exist: image dropped ({names[2]})" in text
  assert "4 checked, 2 usable, 2 bad" in text and "damaged 1" in text and "wrong size 1" in text
  prepared = prepared_coco.PreparedCoco(tmp_path / "out", "val")
  assert sorted(prepared[i]["file_name"] for i in range(2)) == names[3:]
  assert len(prepared.ground_truth["images"]) == 2


def test_images_of_any_folder(capsys):
  folder = paths.data_dir("odd_images")
  assert prepare.main(["images", "--images", str(folder)]) == 0
  text = capsys.readouterr().out
  named = {line.split(": ")[1] for line in text.splitlines() if line.startswith("bad: ")}
  assert named == {f"files/{name}" for name in test_images.BAD}
  assert "81 checked, 67 usable, 14 bad" in text
  assert "not looked at, since not named as images: manifest.json" in text
  assert "note: files/gray_12in16.tif: dark" in text
  assert prepare.main(["images", "--images", str(folder), "--strict"]) == 1


def test_workers_find_the_same():
  folder = paths.data_dir("odd_images") / "files"
  tasks = [prepare_checks.Task(path, path.name) for path in sorted(folder.glob("*.png"))]
  alone, together = (list(prepare_checks.check_images(tasks, workers)) for workers in (1, 2))
  assert [(r.name, r.info, str(r.error)) for r in alone] == [(r.name, r.info, str(r.error)) for r in together]


def test_wrong_calls_and_nothing_usable(tmp_path, capsys):
  (tmp_path / "a.jpg").write_bytes(b"no image")
  assert prepare.main(["images", "--images", str(tmp_path)]) == 1
  assert "nothing usable" in capsys.readouterr().err
  for arguments, message in (
    (["images", "--images", str(tmp_path / "absent")], "no such folder"),
    (["coco", "--images", "x"], "give --root, or --images and --annotations"),
    (["coco", "--root", "x", "--images", "y"], "not both"),
    (["coco", "--root", "x"], "give --out"),
    (["coco", "--root", "x", "--check"], "no such folder of images"),
  ):
    assert prepare.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_without_tensorflow_the_error_says_so(part, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
  assert prepare.main(["coco", "--root", str(part), "--out", str(tmp_path)]) == 1
  assert "pip install tensorflow-cpu" in capsys.readouterr().err
  assert prepare.main(["coco", "--root", str(part), "--check"]) == 0


def _labelled(root, split="training", count=3):
  """ADE20K's layout with small images and labels."""
  rng = np.random.default_rng(0)
  for folder, ending in (("images", "jpg"), ("annotations", "png")):
    (root / folder / split).mkdir(parents=True, exist_ok=True)
    for i in range(count):
      size = (20 + i, 30)
      pixels = rng.integers(0, 151 if folder == "annotations" else 256, (*size, 3), dtype=np.uint8)
      pixels = pixels[..., 0] if folder == "annotations" else pixels
      Image.fromarray(pixels).save(root / folder / split / f"ADE_{i}.{ending}")


def test_ade20k_reads_back_exactly_what_was_there(tmp_path):
  pytest.importorskip("tensorflow", reason="writing shards needs TensorFlow")
  for split in ade20k.SPLITS:
    _labelled(tmp_path / "ade", split)
  out = tmp_path / "out"
  assert prepare.main(["ade20k", "--root", str(tmp_path / "ade"), "--out", str(out)]) == 0
  for split in ade20k.SPLITS:
    direct = ade20k.ade20k_root(tmp_path / "ade", split)
    prepared = prepared_segmentation.PreparedSegmentation(out, split)
    prepared = pickle.loads(pickle.dumps(prepared))
    assert len(prepared) == len(direct) == 3 and prepared.class_names == direct.class_names
    assert prepared.largest_size == direct.largest_size == (22, 30)
    for i in range(3):
      _assert_same(direct[i], prepared[i])
      assert prepared.image_bytes(i) == direct.image_bytes(i)
    with pytest.raises(IndexError):
      prepared[3]
  with pytest.raises(FileNotFoundError, match="test.* is absent; prepare it with"):
    prepared_segmentation.PreparedSegmentation(out, "test")
  assert prepare.main(["ade20k", "--root", str(tmp_path / "ade"), "--out", str(out)]) == 1  # asks first


def test_bad_label_files_are_named_and_left_out(tmp_path, capsys):
  _labelled(tmp_path, count=6)
  labels = tmp_path / "annotations/training"
  (labels / "ADE_0.png").unlink()
  (labels / "ADE_1.png").write_bytes((labels / "ADE_1.png").read_bytes()[:90])
  Image.new("L", (5, 5)).save(labels / "ADE_2.png")
  Image.new("L", (30, 23), 200).save(labels / "ADE_3.png")
  (tmp_path / "images/training/ADE_4.jpg").write_bytes(b"no image")
  command = ["ade20k", "--root", str(tmp_path), "--split", "training", "--check"]
  assert prepare.main(command) == 0
  text = capsys.readouterr().out
  for line in (
    "bad: ADE_0: has no label image",
    "ADE_1.png: cannot be decoded",
    "bad: ADE_2: is 30 x 22 pixels",
    "ADE_3.png: has labels outside of the class list: 200 (690 pixels)",
    "bad: ADE_4: not a readable image",
    "6 checked, 1 usable, 5 bad",
    "usable: 1 images, 150 classes",
  ):
    assert line in text, line
  assert prepare.main([*command, "--strict"]) == 1


def test_checking_labels_with_workers(tmp_path, capsys):
  root = samples.segmentation_root(tmp_path)
  command = ["segmentation", "--images", str(root / "val/images"), "--labels", str(root / "val/labels")]
  command += ["--classes", str(root / "meta.json"), "--split", "validation", "--check", "--strict"]
  assert prepare.main([*command, "--workers", "2"]) == 0
  assert "4 checked, 4 usable, 0 bad" in capsys.readouterr().out
