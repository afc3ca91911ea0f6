"""mIoU against a few independent lines: ignored pixels, absent classes, padding and several processes."""

import json
import logging

import numpy as np
from PIL import Image
import pytest

from frozen_vision.metrics import gather, mean_iou

_NAMES = ("a", "b", "c", "d", "never")


def make_images(count=5, seed=0):
  """Maps of many sizes with ignored pixels; class 3 is never true, class 4 neither true nor predicted."""
  rng = np.random.default_rng(seed)
  truth, predicted = [], []
  for _ in range(count):
    size = tuple(rng.integers(5, 12, 2))
    truth.append(rng.choice([0, 1, 2, 255], size, p=[0.5, 0.2, 0.1, 0.2]).astype(np.uint8))
    predicted.append(rng.integers(0, 4, size).astype(np.uint8))
  return truth, predicted


def independent(truth, predicted, num_classes):
  """{metric: value} from sets of pixels."""
  true, found = {c: set() for c in range(num_classes)}, {c: set() for c in range(num_classes)}
  for i, (t, p) in enumerate(zip(truth, predicted)):
    for (y, x), c in np.ndenumerate(t):
      if c != 255:
        true[c].add((i, y, x))
        found[p[y, x]].add((i, y, x))
  ious = {c: len(true[c] & found[c]) / len(true[c] | found[c]) for c in true if true[c] | found[c]}
  recalls = {c: len(true[c] & found[c]) / len(true[c]) for c in true if true[c]}
  right = sum(len(true[c] & found[c]) for c in true)
  return dict(
    ious=ious,
    mIoU=sum(ious.values()) / len(ious),
    mean_accuracy=sum(recalls.values()) / len(recalls),
    pixel_accuracy=right / sum(map(len, true.values())),
  )


def batch_of(predicted, indices, frame=(16, 20)):
  maps = np.full((len(indices), *frame), 77, np.uint8)  # what lies outside of an image must not be looked at
  for row, i in enumerate(indices):
    maps[row, : predicted[i].shape[0], : predicted[i].shape[1]] = predicted[i]
  return {"label_map": maps}, {
    "index": np.array(indices),
    "original_size": np.array([predicted[i].shape for i in indices]),
  }


def make_evaluator(truth, **options):
  return mean_iou.MeanIoUEvaluator(_NAMES, lambda i: truth[i], lambda i: f"folder/{i}", len(truth), **options)


def test_equals_sets_of_pixels(tmp_path):
  truth, predicted = make_images()
  evaluator = make_evaluator(truth, palette=[(10, 20, 30)] * 5)
  evaluator.update(*batch_of(predicted, [0, 1, 2]))
  predictions, batch = batch_of(predicted, [3, 4, 4])
  evaluator.update(predictions, batch | {"example_valid": np.array([True, True, False])})
  wanted = independent(truth, predicted, 5)
  assert set(wanted["ious"]) == {0, 1, 2, 3} and wanted["ious"][3] == 0
  found = evaluator.result()
  assert found == {key: pytest.approx(wanted[key], abs=1e-14) for key in found} and len(found) == 3
  per_class = evaluator.per_class()
  assert list(per_class) == list(_NAMES)
  assert per_class["never"] == dict(IoU=None, accuracy=None, pixels=0)
  assert per_class["d"] == dict(IoU=0.0, accuracy=None, pixels=0)
  evaluator.write(tmp_path)
  evaluator.write(tmp_path, main_process=False)
  assert json.loads((tmp_path / "per_class.json").read_text()) == per_class
  written = [np.asarray(Image.open(tmp_path / f"label_maps/folder/{i}.png")) for i in range(5)]
  for one, other in zip(written, predicted):
    np.testing.assert_array_equal(one, other)
  again = independent(truth, written, 5)
  for c, iou in again["ious"].items():
    assert per_class[_NAMES[c]]["IoU"] == pytest.approx(iou, abs=1e-14)


def test_counts_are_exact_beyond_floats(monkeypatch):
  many = np.zeros((5, 5), np.int64)
  many[0, 0] = 2**53
  states = [{"counts": counts.tolist(), "images": [i]} for i, counts in enumerate((many, many // 2**53))]
  monkeypatch.setattr(gather, "gather_objects", lambda value: json.loads(json.dumps(states)))
  assert make_evaluator([None, None]).counts()[0, 0] == 2**53 + 1


def test_processes_are_added(monkeypatch):
  truth, predicted = make_images()
  parts = [make_evaluator(truth) for _ in range(2)]
  parts[0].update(*batch_of(predicted, [0, 2, 4]))
  parts[1].update(*batch_of(predicted, [1, 3]))
  states = []
  monkeypatch.setattr(
    gather, "gather_objects", lambda value: states.append(json.loads(json.dumps(value))) or states
  )
  parts[0].counts()
  result = parts[1].result()
  wanted = independent(truth, predicted, 5)
  assert result == {key: pytest.approx(wanted[key], abs=1e-14) for key in result}
  twice = make_evaluator(truth)
  twice.update(*batch_of(predicted, [4]))
  with pytest.raises(ValueError, match="folder/4 was given on two processes"):
    twice.result()


def test_unlabelled_images_are_written_and_not_counted(tmp_path, caplog):
  truth, predicted = make_images(3)
  labelled = make_evaluator(truth[:2])
  labelled.update(*batch_of(predicted, [0, 1]))
  truth[2] = None
  evaluator = make_evaluator(truth)
  evaluator.update(*batch_of(predicted, [0, 1, 2]))
  assert evaluator.result() == labelled.result()
  evaluator.write(tmp_path)
  assert (tmp_path / "label_maps/folder/2.png").exists()
  evaluator.reset()
  evaluator.update(*batch_of(predicted, [2]))
  with caplog.at_level(logging.WARNING):
    assert evaluator.result() == {}
  assert "Only 1 of 3 images" in caplog.text and "No labelled pixel" in caplog.text


@pytest.mark.usefixtures("without_type_checks")
def test_what_does_not_fit_is_named():
  truth, predicted = make_images(2)
  evaluator = make_evaluator(truth)
  evaluator.update(*batch_of(predicted, [0]))
  with pytest.raises(ValueError, match="folder/0 was given twice"):
    evaluator.update(*batch_of(predicted, [0]))
  predictions, batch = batch_of(predicted, [1])
  with pytest.raises(ValueError, match=r"folder/1: The truth is .* and the prediction"):
    evaluator.update(predictions, batch | {"original_size": batch["original_size"] - 1})
  with pytest.raises(ValueError, match="folder/1 is 90 x 90 pixels"):
    evaluator.update(predictions, batch | {"original_size": np.array([[90, 90]])})
  truth[1] = np.full_like(truth[1], 5)
  with pytest.raises(ValueError, match="folder/1: The truth has class 5; expected 0 to 4"):
    evaluator.update(predictions, batch)
