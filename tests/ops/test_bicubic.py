"""Bicubic resizing equals PyTorch's, both kinds; `tests/references/vit.py` wrote what it gives."""

import pathlib

import numpy as np
import pytest

from frozen_vision.ops import bicubic

_GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "bicubic.npz"

_SIZES = [(7, 5), (11, 13), (3, 4), (14, 2)]


@pytest.fixture(scope="module")
def golden():
  return np.load(_GOLDEN)


@pytest.mark.parametrize("size", _SIZES)
@pytest.mark.parametrize("kind", ["bicubic", "bicubic_antialias", "bicubic_scale"])
def test_equal_to_interpolate(golden, kind, size):
  map_ = golden["map"]
  scale = tuple((wanted + 0.1) / length for wanted, length in zip(size, map_.shape[:2]))
  found = bicubic.resize_bicubic(
    map_, size, antialias=kind == "bicubic_antialias", scale=scale if kind == "bicubic_scale" else None
  )
  wanted = golden[f"{kind}.{size[0]}x{size[1]}"]
  assert found.shape == wanted.shape
  assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_kinds_differ(golden):
  shrunk = [golden[f"{kind}.3x4"] for kind in ("bicubic", "bicubic_antialias", "bicubic_scale")]
  assert all(np.abs(a - b).max() > 0.01 for a, b in zip(shrunk, shrunk[1:]))


def test_weights_sum_to_one():
  for antialias in (False, True):
    for size_in, size_out in ((37, 64), (37, 16), (14, 14)):
      matrix = bicubic.bicubic_matrix(size_in, size_out, antialias=antialias)
      np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
  np.testing.assert_array_equal(bicubic.bicubic_matrix(14, 14), np.eye(14, dtype=np.float32))
