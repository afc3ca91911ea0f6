"""Errors of normals and depth against loops over pixels, the formulas of the field one by one."""

import json
import math

import numpy as np
import pytest

from frozen_vision.metrics import dense


def looped_angles(predicted, true):
  """The angles of all pixels of all images that have a normal, in degrees."""
  found = []
  for p_map, t_map in zip(predicted, true):
    for p, t in zip(p_map.reshape(-1, 3).tolist(), t_map.reshape(-1, 3).tolist()):
      if any(t):
        cosine = sum(a * b for a, b in zip(p, t)) / math.hypot(*p) / math.hypot(*t)
        found.append(math.degrees(math.acos(max(-1.0, min(1.0, cosine)))))
  return found


def looped_depth(predicted, true):
  """The metrics of one image."""
  pairs = [(p, t) for p, t in zip(predicted.ravel().tolist(), true.ravel().tolist()) if t > 0]
  n = len(pairs)
  logs = [math.log(p) - math.log(t) for p, t in pairs]
  ratios = [max(p / t, t / p) for p, t in pairs]
  return {
    "abs_rel": sum(abs(p - t) / t for p, t in pairs) / n,
    "rmse": math.sqrt(sum((p - t) ** 2 for p, t in pairs) / n),
    "log10": sum(abs(math.log10(p) - math.log10(t)) for p, t in pairs) / n,
    "silog": 100 * math.sqrt(sum(g * g for g in logs) / n - (sum(logs) / n) ** 2),
    "delta1": sum(r < 1.25 for r in ratios) / n,
    "delta2": sum(r < 1.5625 for r in ratios) / n,
    "delta3": sum(r < 1.953125 for r in ratios) / n,
  }


def _maps(rng, *shape, unknown=0.2):
  true = rng.normal(size=(*shape, 3)) + [0, 0, 2]
  true /= np.linalg.norm(true, axis=-1, keepdims=True)
  predicted = true + rng.normal(size=true.shape) * 0.4
  predicted /= np.linalg.norm(predicted, axis=-1, keepdims=True)
  depth = rng.uniform(0.5, 9.0, shape)
  guessed = depth * np.exp(rng.normal(size=shape) * 0.3)
  hidden = rng.random(shape) < unknown
  true[hidden], depth[rng.random(shape) < unknown] = 0, 0
  return [x.astype(np.float32) for x in (true, predicted, depth, guessed)]


@pytest.fixture(scope="module")
def maps():
  return _maps(np.random.default_rng(0), 5, 11, 13)


def _evaluator(true, depth, **options):
  names = [f"image{i}" for i in range(len(true))]
  return dense.DenseEvaluator(
    lambda i: {"normals": true[i], "depth": depth[i]}, names.__getitem__, len(true), **options
  )


def _filled(maps, **options):
  """All images in batches of two, in frames that are larger than they are, the last one repeated."""
  true, predicted, depth, guessed = maps
  evaluator = _evaluator(true, depth, **options)
  for first in range(0, len(true), 2):
    index = np.minimum([first, first + 1], len(true) - 1)
    padding = ((0, 0), (0, 3), (0, 2))
    outputs = {
      "normals": np.pad(predicted[index], (*padding, (0, 0)), constant_values=7),
      "depth": np.pad(guessed[index], padding, constant_values=7),
    }
    batch = {
      "index": index,
      "original_size": np.tile(true.shape[1:3], (2, 1)),
      "example_valid": np.array([True, first + 1 < len(true)]),
    }
    evaluator.update(outputs, batch)
  return evaluator


def test_metrics_equal_the_loops(maps):
  true, predicted, depth, guessed = maps
  found = _filled(maps).result()
  angles = looped_angles(predicted, true)
  assert found["mean_angle"] == pytest.approx(np.mean(angles), rel=1e-6)
  assert found["median_angle"] == pytest.approx(np.median(angles), abs=1e-3)
  for limit in (11.25, 22.5, 30.0):
    assert found[f"within_{limit:g}"] == sum(angle < limit for angle in angles) / len(angles)
  each = [looped_depth(p, t) for p, t in zip(guessed, depth)]
  for name in each[0]:
    assert found[name] == pytest.approx(np.mean([one[name] for one in each]), rel=1e-6), name


def test_images_are_written_by_name(maps, tmp_path):
  true, predicted, depth, guessed = maps
  _filled(maps).write(tmp_path)
  written = json.loads((tmp_path / "per_image.json").read_text())
  assert list(written) == [f"image{i}" for i in range(5)]
  assert written["image3"]["mean_angle"] == pytest.approx(
    np.mean(looped_angles(predicted[3:4], true[3:4])), rel=1e-6
  )
  assert written["image3"]["rmse"] == pytest.approx(looped_depth(guessed[3], depth[3])["rmse"], rel=1e-6)


@pytest.mark.parametrize("target, absent", [("normals", "rmse"), ("depth", "mean_angle")])
def test_one_target_alone(maps, target, absent):
  whole, found = _filled(maps).result(), _filled(maps, targets=(target,)).result()
  assert absent not in found and found.items() <= whole.items()


def test_a_perfect_prediction():
  true, _, depth, _ = _maps(np.random.default_rng(1), 2, 6, 6, unknown=0.0)
  found = _filled((true, true, depth, depth)).result()
  assert found["mean_angle"] < 1e-5 and found["median_angle"] == 0.0
  assert found["within_11.25"] == found["delta1"] == 1.0
  assert found["abs_rel"] == found["rmse"] == found["silog"] == 0.0


def test_small_angles_are_exact_and_no_direction_is_a_right_angle_away():
  tiny = 1e-6
  vectors = np.array([[math.sin(tiny), 0, math.cos(tiny)], [0, 0, -2.0], [0, 0, 0]])
  found = dense.angles(vectors, np.array([[0.0, 0, 1]] * 3))
  np.testing.assert_allclose(found, [math.degrees(tiny), 180, 90], rtol=1e-9)


def test_images_without_a_truth_are_left_out(caplog):
  true, predicted, depth, guessed = _maps(np.random.default_rng(2), 3, 4, 4, unknown=0.0)
  depth[1] = 0
  each = [looped_depth(guessed[i], depth[i])["rmse"] for i in (0, 2)]
  assert _filled((true, predicted, depth, guessed)).result()["rmse"] == pytest.approx(np.mean(each), rel=1e-6)
  assert _filled((true * 0, predicted, depth * 0, guessed)).result() == {}
  assert "No pixel with a true normal" in caplog.text and "No pixel with a true depth" in caplog.text


def test_results_of_all_processes_are_put_together(maps, monkeypatch):
  """Two halves of the images, as two processes hold them, give what one gives."""
  whole = _filled(maps)
  halves = [_filled([x[part] for x in maps]) for part in (slice(0, 3), slice(3, 5))]
  states = []
  monkeypatch.setattr(dense.gather, "gather_objects", lambda state: states.append(state) or [state])
  for half in halves:
    half.result()
  # Indices of the second half begin at 3 in the whole.
  second = dict(states[1], images=[[index + 3, numbers] for index, numbers in states[1]["images"]])
  monkeypatch.setattr(
    dense.gather, "gather_objects", lambda state: json.loads(json.dumps([states[0], second]))
  )
  found = _evaluator(*[maps[i] for i in (0, 2)]).result()
  monkeypatch.undo()
  for name, value in whole.result().items():
    assert found[name] == pytest.approx(value, rel=1e-12), name


def test_errors_name_the_image(maps):
  true, predicted, depth, guessed = maps
  evaluator = _filled(maps)
  batch = {"index": np.array([2]), "original_size": np.array([[11, 13]])}
  outputs = {"normals": predicted[:1], "depth": guessed[:1]}
  with pytest.raises(ValueError, match="image2 was given twice"):
    evaluator.update(outputs, batch)
  with pytest.raises(ValueError, match=r"image2 is 11 x 14 pixels .* true normals are \(11, 13\)"):
    _evaluator(true, depth).update(outputs, batch | {"original_size": np.array([[11, 14]])})
