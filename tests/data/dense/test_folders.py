"""Images with normals and depth from files."""

import io
import pickle
import shutil

import numpy as np
from PIL import Image
import pytest

from frozen_vision.data import fingerprint, images, prepare
from frozen_vision.data.dense import folders, map_files, prepared_dense
from tests.data.dense import dense_files


def _npy(array):
  buffer = io.BytesIO()
  np.save(buffer, array)
  return buffer.getvalue()


def _png(array):
  buffer = io.BytesIO()
  Image.fromarray(array).save(buffer, "PNG")
  return buffer.getvalue()


@pytest.mark.parametrize("write", [dense_files.toolkit, dense_files.mtan])
def test_both_layouts_of_nyuv2_hold_the_rooms(tmp_path, write):
  rooms = write(tmp_path)
  for split in ("train", "test"):
    source = folders.nyuv2(tmp_path, split)
    assert len(source) == 3 and source.targets == ("normals", "depth")
    assert source.largest_size == dense_files.SIZE
    for index in range(3):
      record, wanted = source[index], rooms[index]
      np.testing.assert_array_equal(record["image"], wanted["image"])
      np.testing.assert_allclose(record["normals"], wanted["normals"], atol=1e-6)
      np.testing.assert_allclose(record["depth"], wanted["depth"], atol=6e-4)
  assert folders.nyuv2(tmp_path, "test", ("depth",)).targets == ("depth",)


def test_a_layout_that_is_not_there_is_described(tmp_path):
  (tmp_path / "image/train").mkdir(parents=True)
  with pytest.raises(FileNotFoundError) as error:
    folders.nyuv2(tmp_path, "train")
  for text in (f"{tmp_path}/normal/train", f"{tmp_path}/train/depth", "labeled.mat", "nyuv2_surfacenormal"):
    assert text in str(error.value)
  with pytest.raises(ValueError, match="split is 'val'; expected train or test"):
    folders.nyuv2(tmp_path, "val")


def test_normals_of_a_file():
  vectors = np.zeros((2, 3, 3), np.float32)
  vectors[0] = [0.6, 0, 0.8]
  vectors[1, 0] = [0, 2, 0]  # any length
  vectors[1, 1] = np.nan
  found = map_files.read_normals(_npy(vectors), "a.npy", (1, -1, 1))
  np.testing.assert_allclose(found[0], [[0.6, 0, 0.8]] * 3, atol=1e-6)
  np.testing.assert_allclose(found[1], [[0, -1, 0], [0, 0, 0], [0, 0, 0]], atol=1e-6)
  colours = np.clip((vectors[:1] + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)
  found = map_files.read_normals(_png(colours), "a.png", (1, 1, 1))
  np.testing.assert_allclose(found, [[[0.6, 0, 0.8]] * 3], atol=0.01)
  gray = np.full((1, 2, 3), 128, np.uint8)
  assert not map_files.read_normals(_png(gray), "a.png", (1, 1, 1)).any()


def test_depth_of_a_file():
  depth = np.array([[1.5, 0.0], [np.inf, -2.0]])
  for shape in ((2, 2), (2, 2, 1)):
    found = map_files.read_depth(_npy(depth.reshape(shape)), "a.npy", 0.001)
    np.testing.assert_array_equal(found, [[1.5, 0], [0, 0]])
  found = map_files.read_depth(_png(np.array([[1500, 0]], np.uint16)), "a.png", 0.002)
  np.testing.assert_allclose(found, [[3.0, 0.0]])


@pytest.mark.parametrize(
  "read, data, name, message",
  [
    ("depth", _png(np.zeros((2, 2), np.uint8)), "a.png", "mode L; expected depth as gray of 16 bits"),
    ("depth", _npy(np.zeros((2, 2, 3))), "a.npy", r"shape \(2, 2, 3\); expected numbers \[h, w\]"),
    ("depth", _npy(np.zeros((2, 2)))[:-8], "a.npy", "no complete array"),
    ("depth", b"\x93NUMPY", "a.npy", "no complete array"),
    ("normals", _npy(np.zeros((2, 2))), "a.npy", r"expected numbers \[h, w, 3\]"),
    ("normals", _npy(np.array([{}], object)), "a.npy", "no complete array"),
    ("normals", b"", "a.png", "empty"),
    ("image", _npy(np.full((2, 2, 3), 200.0)), "a.npy", r"from 200.0 to 200.0; expected uint8"),
    ("image", _npy(np.full((2, 2, 3), np.nan)), "a.npy", "from nan"),
  ],
)
def test_files_that_cannot_be_used_are_named(read, data, name, message):
  with pytest.raises(images.ImageError, match=f"^{name}: .*{message}"):
    match read:
      case "depth":
        map_files.read_depth(data, name, 0.001)
      case "normals":
        map_files.read_normals(data, name, (1, 1, 1))
      case "image":
        map_files.read_image(data, name)


def test_a_header_that_lies_is_not_believed():
  data = bytearray(_npy(np.zeros((2, 2))))
  at = data.index(b"(2, 2)")
  data[at : at + 6] = b"(9, 9)"
  with pytest.raises(images.ImageError, match="32 bytes for float64 of shape"):
    map_files.read_depth(bytes(data), "a.npy", 0.001)


def test_what_is_left_out_is_counted(tmp_path):
  dense_files.toolkit(tmp_path, count=4)
  (tmp_path / "depth/train/00003.png").unlink()
  damaged = tmp_path / "image/train/00004.png"
  damaged.write_bytes(damaged.read_bytes()[:-30])
  array = tmp_path / "normal/train/00005.npy"
  array.write_bytes(array.read_bytes()[:-4])
  np.save(tmp_path / "normal/train/00007.npy", np.zeros((3, 3, 3)))
  for kind in ("image", "depth"):
    shutil.copy(tmp_path / f"{kind}/train/00006.png", tmp_path / f"{kind}/train/00007.png")
  (tmp_path / "normal/train/00006.npy").rename(tmp_path / "normal/train/00006.NPY")
  (tmp_path / "normal/train/00006.png").unlink()
  source = folders.nyuv2(tmp_path, "train").checked()
  assert [source.name(i) for i in range(len(source))] == ["00006"]
  assert source.findings.counts == {"incomplete": 1, "unreadable": 3}
  assert "00007.npy: is (3, 3) (height, width), and its image (40, 48)" in str(source.findings)
  assert "00003.png has no depth" in str(source.findings) and "00004.png" in str(source.findings)
  for kind in ("image", "depth", "normal"):
    for path in (tmp_path / kind / "test").iterdir():
      path.rename(path.with_name(f"{kind}_{path.name}"))
  with pytest.raises(ValueError, match="No image of .* has a file of its name"):
    folders.nyuv2(tmp_path, "test")


def test_sizes_that_differ_are_an_error(tmp_path):
  dense_files.toolkit(tmp_path)
  np.save(tmp_path / "normal/train/00003.npy", np.zeros((10, 12, 3)))
  source = folders.nyuv2(tmp_path, "train")
  with pytest.raises(images.ImageError, match=r"00003.npy: is \(10, 12\).*its image \(40, 48\)"):
    source[0]


def test_eigens_crop(tmp_path):
  for name in ("images", "depth"):
    (tmp_path / name).mkdir()
  np.save(tmp_path / "images/a.npy", np.zeros((480, 640, 3), np.uint8))
  np.save(tmp_path / "depth/a.npy", np.ones((480, 640), np.float32))
  source = folders.DenseFolders(
    tmp_path / "images", {"depth": tmp_path / "depth"}, folders.MapFormat(eigen_crop=True)
  )
  rows, columns = np.nonzero(source.truth(0)["depth"])
  assert (rows.min(), rows.max(), columns.min(), columns.max()) == (45, 470, 41, 600)
  np.save(tmp_path / "depth/a.npy", np.ones((40, 64), np.float32))
  with pytest.raises(images.ImageError, match="eigen_crop=False"):
    source.truth(0)


def test_a_source_is_sent_to_workers_and_has_an_identity(tmp_path):
  dense_files.toolkit(tmp_path)
  source = folders.nyuv2(tmp_path, "train")
  again = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(again[1]["depth"], source[1]["depth"])
  turned = folders.nyuv2(tmp_path, "train", format=folders.MapFormat(signs=(1, -1, -1)))
  assert fingerprint.of_source(source) == fingerprint.of_source(again) != fingerprint.of_source(turned)
  np.testing.assert_array_equal(turned[0]["normals"], source[0]["normals"] * [1, -1, -1])


@pytest.mark.parametrize("command", ["nyuv2", "dense"])
def test_prepared_data_are_those_of_the_files(tmp_path, command, capsys):
  dense_files.toolkit(tmp_path / "nyu")
  out = ["--out", str(tmp_path / "shards")]
  if command == "nyuv2":
    assert prepare.main(["nyuv2", "--root", str(tmp_path / "nyu"), *out]) == 0
  else:
    images_dir, normals = (str(tmp_path / "nyu" / kind / "train") for kind in ("image", "normal"))
    arguments = ["--images", images_dir, "--normals", normals, "--split", "training", *out]
    assert prepare.main(["dense", *arguments, "--check"]) == 0
    assert not (tmp_path / "shards").exists()
    assert prepare.main(["dense", *arguments]) == 0
  source = folders.nyuv2(
    tmp_path / "nyu", "train", ("normals", "depth") if command == "nyuv2" else ("normals",)
  )
  prepared = prepared_dense.PreparedDense(tmp_path / "shards", "training")
  assert prepared.targets == source.targets and prepared.largest_size == source.largest_size
  assert len(prepared) == len(source)
  for index in range(len(source)):
    one, other = source[index], prepared[index]
    assert one.keys() == other.keys() and one["name"] == other["name"]
    for key in ("image", *source.targets):
      np.testing.assert_array_equal(one[key], other[key])
  with pytest.raises(FileNotFoundError, match="frozen_vision.data.prepare nyuv2"):
    prepared_dense.PreparedDense(tmp_path / "shards", "absent")
