"""Codewords of surface normals."""

import numpy as np
import pytest

from frozen_vision.data.dense import codewords
from frozen_vision.data.generated import rooms


def _around(directions, count, spread, seed=0):
  noise = np.random.default_rng(seed).normal(size=(len(directions) * count, 3)) * spread
  found = np.repeat(directions, count, axis=0) + noise
  return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_clusters_are_found():
  directions = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0.0, 0.8], [-0.6, 0.64, 0.48]])
  found = codewords.cluster(_around(directions, 200, 0.02), 5)
  closeness = directions @ found.T
  assert sorted(closeness.argmax(axis=1)) == [0, 1, 2, 3, 4]  # each has a codeword of its own
  assert closeness.max(axis=1).min() > 0.999
  np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=2e-6)


def test_every_codeword_is_the_mean_direction_of_what_is_nearest_to_it():
  normals = _around(np.array([[0.0, 0.0, 1.0]]), 600, 0.6)
  found = codewords.cluster(normals, 6)
  nearest = np.linalg.norm(normals[:, None] - found, axis=-1).argmin(axis=1)
  for k in range(6):
    mean = normals[nearest == k].mean(axis=0)
    np.testing.assert_allclose(mean / np.linalg.norm(mean), found[k], atol=0.02)


def test_fewer_directions_than_codewords_are_repeated():
  found = codewords.cluster(np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]] * 5), 4)
  assert {tuple(row) for row in found} == {(0.0, 0.0, 1.0), (1.0, 0.0, 0.0)}


def test_a_source_gives_the_same_codewords_every_time():
  source = rooms.Rooms(5, 32)
  first, second = (codewords.learn(source, 12) for _ in range(2))
  np.testing.assert_array_equal(first, second)
  angles = np.degrees(np.arccos(np.clip(source.truth(0)["normals"].reshape(-1, 3) @ first.T, -1, 1)))
  assert np.median(angles.min(axis=1)) < 15  # codewords lie where the normals are


def test_a_source_without_normals_is_named():
  class Blank(rooms.Rooms):
    def truth(self, index):
      return {name: 0 * values for name, values in super().truth(index).items()}

  with pytest.raises(ValueError, match=r"No pixel of 2 images of Rooms\(.*surface normal"):
    codewords.learn(Blank(2, 32), 4)


def test_a_lattice_covers_the_half_that_faces_the_camera():
  found = codewords.lattice(40)
  np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=2e-6)
  assert np.all(found[:, 2] > 0)
  targets = _around(np.array([[0.0, 0.0, 1.0]]), 500, 1.0)
  targets = targets[targets[:, 2] > 0]
  assert np.degrees(np.arccos((targets @ found.T).max(axis=1))).max() < 25
