"""Checkpoints of TensorFlow: one that it wrote, damaged ones, and hostile ones."""

import shutil

import ml_dtypes
import numpy as np
import pytest

from frozen_vision.files import checkpoint_file, crc32c, formats, tensorflow_checkpoint
from tests import paths
from tests.files import bundle_file


@pytest.fixture
def checkpoint(tmp_path):
  """A copy of the index, and what TensorFlow says that its variables hold."""
  source = paths.golden_dir() / "tensorflow_checkpoint"
  for path in source.glob("ckpt-1*"):
    shutil.copy(path, tmp_path)
  return tmp_path / "ckpt-1.index", np.load(source / "values.npz")


def test_checksums_are_those_of_the_standard():
  # RFC 3720, appendix B.4.
  assert crc32c.checksum(b"123456789") == 0xE3069283
  assert crc32c.checksum(bytes(32)) == 0x8A9136AA
  assert crc32c.checksum(b"\xff" * 32) == 0x62A8AB43
  data = np.random.default_rng(0).bytes(70_001)
  for count in (4095, 4096, 4097, 70_001):
    # Bytes of zero in front change the state and so the sum: parts are joined in their order.
    whole = crc32c._continue(0xFFFFFFFF, data[:count]) ^ 0xFFFFFFFF
    assert crc32c.checksum(data[:count]) == whole


def test_what_tensorflow_wrote_is_read(checkpoint):
  index, values = checkpoint
  file = checkpoint_file.open_checkpoint(index)
  assert sorted(file.others) == ["_CHECKPOINTABLE_OBJECT_GRAPH", "text"]
  assert set(file.tensors) - {"save_counter"} == set(values.files)
  for name in values.files:
    found = file.tensors[name].read()
    assert found.shape == file.tensors[name].shape == values[name].shape, name
    assert found.dtype == (ml_dtypes.bfloat16 if name == "bfloat16" else values[name].dtype), name
    np.testing.assert_array_equal(found.astype(np.float64), values[name].astype(np.float64), err_msg=name)


def test_every_damaged_byte_is_named(checkpoint):
  index, values = checkpoint
  data = index.with_name("ckpt-1.data-00000-of-00001")
  rng = np.random.default_rng(0)
  for path, count in ((index, 200), (data, 30)):
    whole = path.read_bytes()
    for at in rng.integers(len(whole), size=count).tolist():
      path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at + 1 :])
      try:
        found = {
          name: tensor.read() for name, tensor in tensorflow_checkpoint.open_tensorflow(index)[0].items()
        }
      except (formats.FileFormatError, FileNotFoundError) as error:
        assert "ckpt-1" in str(error)
        continue
      # What says nothing: padding of the footer, strings, which are not read.
      for name in values.files:
        wanted = values[name].astype(np.float64)
        np.testing.assert_array_equal(found[name].astype(np.float64), wanted, err_msg=f"{path.name} {at}")
    path.write_bytes(whole)
  index.write_bytes(index.read_bytes()[:-100])
  with pytest.raises(formats.FileFormatError, match="not a complete index of a TensorFlow checkpoint"):
    tensorflow_checkpoint.open_tensorflow(index)


def test_other_files_of_a_checkpoint(checkpoint):
  index, _ = checkpoint
  data = index.with_name("ckpt-1.data-00000-of-00001")
  with pytest.raises(formats.FileFormatError, match="give its index, ckpt-1.index"):
    checkpoint_file.open_checkpoint(data)
  data.unlink()
  with pytest.raises(FileNotFoundError, match="not beside it: ckpt-1.data-00000-of-00001"):
    checkpoint_file.open_checkpoint(index)


_ARRAY = np.arange(6, dtype=np.float32)


@pytest.mark.parametrize(
  "header, changes, problem",
  [
    ({1: 0}, {}, "says that it has 0 data files"),
    ({1: 1 << 40}, {}, "says that it has 1,099,511,627,776 data files"),
    ({1: 1, 2: 1}, {}, "big-endian"),
    ({1: 1}, {"offset": 1}, "float32 of shape .6,., in 24 bytes at 1 of"),
    ({1: 1}, {"offset": 1 << 62}, "which has 24"),
    ({1: 1}, {"size": 1 << 62}, "in 4,611,686,018,427,387,904 bytes"),
    ({1: 1}, {"shape": bundle_file.message({2: bundle_file.message({1: 1 << 61})})}, "shape .2305843009"),
    ({1: 1}, {"shape": bundle_file.message({2: bundle_file.message({1: (1 << 64) - 6})})}, "shape .-6,."),
    ({1: 1}, {"shard": 3}, "in data file 3 of 1"),
    ({1: 1}, {"slices": b""}, "in slices"),
    ({1: 1}, {"dtype": 20}, "TensorFlow's type 20"),
  ],
)
def test_crafted_entries(tmp_path, header, changes, problem):
  path = bundle_file.write(tmp_path / "ckpt.index", {"a": _ARRAY})
  entries = [(b"", bundle_file.message(header)), (b"a", bundle_file.entry(_ARRAY, 0, **changes))]
  path.write_bytes(bundle_file.table(entries))
  with pytest.raises(formats.FileFormatError, match=problem):
    tensorflow_checkpoint.open_tensorflow(path)


def test_crafted_tables(tmp_path):
  path = bundle_file.write(tmp_path / "ckpt.index", {"a": _ARRAY})
  header = bundle_file.varint(0) * 2 + bundle_file.varint(len(bundle_file.HEADER)) + bundle_file.HEADER
  tables = {
    "compressed": bundle_file.raw_table(header, compression=1),
    "does not fit its block": bundle_file.raw_table(header + bundle_file.varint(9) + bytes(2)),
    "no header before": bundle_file.table([(b"a", bundle_file.entry(_ARRAY, 0))]),
    "holds 'a' twice": bundle_file.table(
      [(b"", bundle_file.HEADER), *[(b"a", bundle_file.entry(_ARRAY, 0))] * 2]
    ),
    # Names of strings that grow by a byte with every entry: the square of the file's size in memory.
    "an entry": bundle_file.raw_table(
      header + b"".join(bundle_file.varint(i) + bytes([1, 2]) + b"x\x08\x07" for i in range(5000))
    ),
  }
  for problem, content in tables.items():
    path.write_bytes(content)
    with pytest.raises(formats.FileFormatError, match=problem):
      tensorflow_checkpoint.open_tensorflow(path)
