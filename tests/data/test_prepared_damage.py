"""Prepared data that are damaged: one error that names the file, and no growth."""

import json
import random
import shutil
import zipfile

import numpy as np
from PIL import Image
import pytest

from frozen_vision.data import fingerprint, images, prepare, prepared
from frozen_vision.data.detection import prepared_coco
from frozen_vision.data.segmentation import prepared_segmentation


@pytest.fixture(name="sound", scope="module")
def _sound(tmp_path_factory):
  """Prepared instances and label maps of six small images."""
  pytest.importorskip("tensorflow", reason="writing shards needs TensorFlow")
  folder = tmp_path_factory.mktemp("sound")
  for kind in ("img", "lab"):
    (folder / kind).mkdir()
  rng = np.random.default_rng(0)
  images, annotations = [], []
  for i in range(6):
    Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(folder / "img" / f"{i}.png")
    Image.fromarray(rng.integers(0, 2, (40, 50), np.uint8)).save(folder / "lab" / f"{i}.png")
    images.append(dict(id=i + 1, file_name=f"{i}.png", height=40, width=50))
    square = [[2, 3, 14, 3, 14, 16, 2, 16]]
    box = dict(bbox=[2, 3, 12, 13], area=156, segmentation=square, iscrowd=0)
    annotations.append(dict(id=i + 1, image_id=i + 1, category_id=1, **box))
  raw = dict(images=images, annotations=annotations, categories=[dict(id=1, name="a")])
  (folder / "ann.json").write_text(json.dumps(raw))
  (folder / "classes.txt").write_text("a\nb\n")
  out = ["--images", str(folder / "img"), "--out", str(folder / "out"), "--split", "train"]
  assert prepare.main(["coco", "--annotations", str(folder / "ann.json"), *out]) == 0
  labels = ["--labels", str(folder / "lab"), "--classes", str(folder / "classes.txt")]
  assert prepare.main(["segmentation", *labels, *out]) == 0
  return folder / "out"


_FILES = (
  "index.npz",
  "metadata.json",
  "dataset_info.json",
  "features.json",
  "*array_record*",
  "ground_truth.json",
)
_OPEN = {"coco": prepared_coco.PreparedCoco, "segmentation": prepared_segmentation.PreparedSegmentation}
_KINDS = {"coco": prepared_coco.KIND, "segmentation": prepared_segmentation.KIND}


@pytest.fixture(name="copied")
def _copied(sound, tmp_path):
  shutil.copytree(sound, tmp_path / "out")

  def paths(kind):
    return tmp_path / "out", _KINDS[kind].folder(tmp_path / "out", "train")

  return paths


def _read_all(kind, out):
  source = _OPEN[kind](out, "train")
  records = [source[index] for index in range(len(source))]
  if kind == "coco":
    assert len(source.ground_truth["images"]) == len(records)
  return records


def _truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _garble(path):
  data = bytearray(path.read_bytes())
  for position in range(0, len(data), 7):
    data[position] ^= 0x5A
  path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [_truncate, _garble])
@pytest.mark.parametrize("kind", _OPEN)
@pytest.mark.parametrize("pattern", _FILES)
def test_damaged_files_are_named(copied, kind, pattern, damage):
  out, folder = copied(kind)
  found = list(folder.glob(pattern))
  if not found:
    assert (kind, pattern) == ("segmentation", "ground_truth.json")
    return
  damage(found[0])
  with pytest.raises(
    prepared.PreparedError, match="is damaged .*Prepare the split again: .*--overwrite"
  ) as caught:
    _read_all(kind, out)
  assert str(folder) in str(caught.value)
  if pattern in ("index.npz", "metadata.json", "ground_truth.json"):
    assert pattern in str(caught.value)


def test_a_flipped_bit_in_a_shard_names_the_shard(copied):
  out, folder = copied("coco")
  (shard,) = folder.glob("*array_record*")
  data = bytearray(shard.read_bytes())
  start = data.find(b"IDAT")
  assert start > 0
  data[start + 40] ^= 1
  shard.write_bytes(bytes(data))
  with pytest.raises(prepared.PreparedError, match=shard.name):
    _read_all("coco", out)


def test_an_index_that_would_grow_is_refused(copied):
  out, folder = copied("coco")
  with zipfile.ZipFile(folder / "index.npz", "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("image_ids.npy", b"\0" * 50_000_000)
  assert (folder / "index.npz").stat().st_size < 100_000
  with pytest.raises(prepared.PreparedError, match="index.npz is damaged .a member is compressed"):
    _read_all("coco", out)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(objects=np.ones(3, np.int64)), "objects has 3 entries, expected 6"),
    (dict(objects=np.ones(6)), "objects is absent or of the wrong kind"),
    (dict(image_ids=np.ones((6, 2), np.int64)), "image_ids has 2 axes"),
    (dict(image_ids=np.array([None] * 6)), "is damaged"),
  ],
)
def test_an_index_of_another_form_is_refused(copied, change, message):
  out, folder = copied("coco")
  with np.load(folder / "index.npz") as index:
    content = dict(index) | change
  np.savez(folder / "index.npz", **content)
  with pytest.raises(prepared.PreparedError, match=message):
    _read_all("coco", out)


@pytest.mark.parametrize("kind", list(_KINDS))
def test_the_fingerprint_names_shards_that_have_changed(copied, sound, kind):
  out, folder = copied(kind)
  before = fingerprint.of_source(_OPEN[kind](sound, "train"))
  assert fingerprint.of_source(_OPEN[kind](out, "train")) == before
  (shard,) = folder.glob("*array_record*")
  shard.write_bytes(shard.read_bytes() + b"\0")
  changed = fingerprint.changed(
    {"training": before}, {"training": fingerprint.of_source(_OPEN[kind](out, "train"))}
  )
  assert changed == {"training": "shards"}


@pytest.mark.parametrize("name", ["../../../x", "/etc/x", "a/../../x"])
def test_names_in_an_index_are_no_paths(copied, name):
  out, folder = copied("segmentation")
  with np.load(folder / "index.npz") as index:
    content = dict(index)
  content["names"] = np.array([name, *content["names"][1:]])
  np.savez(folder / "index.npz", **content)
  with pytest.raises(prepared.PreparedError, match=f"'{name}' is no name of an image below a folder"):
    _read_all("segmentation", out)


def test_random_damage_is_an_error_or_changes_nothing(copied):
  rng = random.Random(0)
  out, folder = copied("coco")
  expected = [record["image"] for record in _read_all("coco", out)]
  files = {path: path.read_bytes() for path in sorted(folder.iterdir())}
  refused = 0
  for _ in range(40):
    path = rng.choice(list(files))
    data = bytearray(files[path])
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))
    try:
      found = _read_all("coco", out)
    except (prepared.PreparedError, images.ImageError):
      refused += 1
    else:
      for one, other in zip(found, expected):
        np.testing.assert_array_equal(one["image"], other)
    path.write_bytes(files[path])
  assert refused
