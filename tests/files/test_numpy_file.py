"""NumPy's `.npz` as tensors that are read one at a time."""

import ml_dtypes
import numpy as np
import pytest

from frozen_vision.files import checkpoint_file, numpy_file


def test_arrays_are_read_later(tmp_path):
  path = tmp_path / "weights.npz"
  half = np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3)
  arrays = {"params/a/kernel": np.ones((2, 3), np.float32), "b": half, "c": np.float32(3)}
  np.savez(path, **arrays)
  found = numpy_file.open_npz(path)
  assert {key: tensor.shape for key, tensor in found.items()} == {
    "params/a/kernel": (2, 3),
    "b": (2, 3),
    "c": (),
  }
  assert found["b"].dtype == ml_dtypes.bfloat16
  for key, array in arrays.items():
    np.testing.assert_array_equal(found[key].read(), array)
  assert checkpoint_file.open_checkpoint(path).tensors.keys() == arrays.keys()


def test_files_that_are_none(tmp_path):
  path = tmp_path / "weights.npz"
  np.savez(path, a=np.array([print], dtype=object))
  with pytest.raises(ValueError, match="Python objects in a.npy; they are never loaded"):
    numpy_file.open_npz(path)
  np.savez(path, a=np.arange(1000) + 0.5)
  content = path.read_bytes()
  path.write_bytes(content[:500])
  with pytest.raises(ValueError, match="not a complete .npz"):
    numpy_file.open_npz(path)
  path.write_bytes(content[:300] + bytes(50) + content[350:])
  found = numpy_file.open_npz(path)
  with pytest.raises(ValueError, match="cannot be read at a"):
    found["a"].read()
  path.write_bytes(content.replace(b"\x93NUMPY", b"\x93BUMPY", 1))
  with pytest.raises(ValueError, match="holds 'a.npy', which is no array of NumPy"):
    numpy_file.open_npz(path)
