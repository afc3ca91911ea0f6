"""Generated rooms: normals and depth agree with each other, with another ray caster, and with the picture."""

import math

import numpy as np
import pytest

from frozen_vision.data.dense import sources
from frozen_vision.data.generated import painting, rooms


@pytest.fixture(scope="module")
def source():
  return rooms.Rooms(6, (48, 64), seed=3)


def test_records_are_as_described(source):
  for index in range(len(source)):
    record = source[index]
    assert record["image"].shape == (48, 64, 3) and record["image"].dtype == np.uint8
    assert record["normals"].shape == (48, 64, 3) and record["normals"].dtype == np.float32
    assert record["depth"].shape == (48, 64) and record["depth"].dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(record["normals"], axis=-1), 1, atol=1e-6)
    assert 0.05 < record["depth"].min() and record["depth"].max() < rooms.MAX_DEPTH
    assert record["image"].std() > 5
  assert source.targets == sources.TARGETS and source.largest_size == (48, 64)


def test_normals_face_the_camera_and_stand_on_the_surfaces_that_depth_shows(source):
  for index in range(len(source)):
    truth = source.truth(index)
    points, normals = rooms.points(truth["depth"].astype(np.float64)), truth["normals"]
    assert np.all((points * normals).sum(-1) < 0)  # points are seen from the origin
    # On a plane, both neighbours of a pixel are at a right angle to its normal.
    flat = np.all(normals[:-1, :-1] == normals[1:, :-1], -1) & np.all(
      normals[:-1, :-1] == normals[:-1, 1:], -1
    )
    right, down = points[:-1, 1:] - points[:-1, :-1], points[1:, :-1] - points[:-1, :-1]
    one_plane = flat & (np.abs((right * normals[:-1, :-1]).sum(-1)) < 1e-4)  # boxes may lie behind each other
    assert one_plane.mean() > 0.5
    cross = np.cross(down, right)
    cross /= np.linalg.norm(cross, axis=-1, keepdims=True)
    found = np.abs((cross * normals[:-1, :-1]).sum(-1))[one_plane]
    assert np.median(found) > 1 - 1e-5 and np.quantile(found, 0.01) > 0.99


def test_a_wall_and_a_ball_by_hand(monkeypatch):
  """A room whose numbers are all drawn as near to zero as they can be."""

  class Least(painting.Random):
    def uniform(self, low=0.0, high=1.0):
      return min(max(low, 0.0), high)

    def integer(self, low, high):
      return low

  monkeypatch.setattr(rooms, "_box", lambda *arguments: rooms._ball(*arguments))
  record = rooms._render(Least(0), 66, 33)
  # The eye is 1.1 m above the floor and looks straight ahead. The ball of radius 0.2 is on the floor 1.2 m
  # before it; walls are 1.2 m to the left and the right and 2.5 m ahead, the ceiling is at 2.3 m.
  focal = rooms.FOCAL_LENGTH * 33
  centre, radius = np.array([0.0, 0.2 - 1.1, -1.2]), 0.2
  for row, column in ((55, 16), (57, 18), (2, 16), (32, 1), (30, 16), (60, 29)):
    ray = np.array([(column + 0.5 - 16.5) / focal, -(row + 0.5 - 33) / focal, -1.0])
    a, b, c = ray @ ray, -ray @ centre, centre @ centre - radius**2
    assert (b * b - a * c > 0) == (row in (55, 57))
    if b * b - a * c > 0:
      depth = (-b - math.sqrt(b * b - a * c)) / a
      normal = (ray * depth - centre) / radius
    else:
      walls = [(1.1 / -ray[1], (0, 1, 0)) if ray[1] < 0 else ((2.3 - 1.1) / ray[1], (0, -1, 0))]
      walls.append((1.2 / abs(ray[0]) if ray[0] else math.inf, (-np.sign(ray[0]), 0, 0)))
      walls.append((2.5, (0, 0, 1)))
      depth, normal = min(walls, key=lambda wall: wall[0])
    assert record["depth"][row, column] == pytest.approx(depth, rel=1e-6)
    np.testing.assert_allclose(record["normals"][row, column], normal, atol=1e-6)


def test_rooms_depend_on_their_place_alone(source):
  again = rooms.Rooms(2, (48, 64), seed=3)
  np.testing.assert_array_equal(again[1]["image"], source[1]["image"])
  np.testing.assert_array_equal(again.image(1), source.image(1))
  others = [rooms.Rooms(2, (48, 64), seed=4), rooms.Rooms(2, (48, 64), seed=3, split="validation")]
  for other in others:
    assert np.abs(other[1]["depth"] - source[1]["depth"]).max() > 0.1
  assert len({source.name(i) for i in range(6)}) == 6


@pytest.mark.parametrize(
  "arguments, message",
  [
    (dict(split="test"), "split is 'test'; expected one of"),
    (dict(num_images=-1), "num_images=-1"),
    (dict(image_size=16), "image_size is 16x16; both sides must be >= 32"),
  ],
)
def test_what_cannot_be(arguments, message):
  with pytest.raises(ValueError, match=message):
    rooms.Rooms(**{"num_images": 3, **arguments})
  with pytest.raises(IndexError):
    rooms.Rooms(3)[3]
