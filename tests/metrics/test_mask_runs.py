import numpy as np
from pycocotools import mask as mask_utils
import pytest

from frozen_vision.data.detection import mask_encoding
from frozen_vision.metrics import mask_runs
from frozen_vision.ops import masks as mask_ops

HALF = np.float32(0.5)


def on_full_image(probabilities, boxes, height, width, threshold=0.5):
  """What pycocotools encodes of each mask, pasted into a whole image."""
  pasted = [mask_ops.paste_mask(p, box, height, width, threshold) for p, box in zip(probabilities, boxes)]
  rles = [mask_utils.encode(np.asfortranarray(mask, np.uint8)) for mask in pasted]
  return [{"size": [height, width], "counts": rle["counts"].decode()} for rle in rles]


BOXES = np.array([
  (3, 4, 20.5, 31), (0, 0, 50, 40), (40.2, 30.7, 50, 40), (7, 7, 7, 9), (0, 0, 0.4, 0.4),
  (49.2, 39.2, 50, 40), (-20, -9, 80, 70), (60, 3, 70, 9), (-9, 3, -2, 9), (9, 9, 3, 3), (np.nan, 0, 9, 9),
  (3, 0, 9, np.inf), (5, -3, 8, 99),
])  # fmt: skip


@pytest.mark.parametrize("fill", ["random", "ones", "zeros", "at the threshold"])
def test_encoding_equals_pycocotools_on_the_full_image(fill):
  shape, rng = (len(BOXES), 28, 28), np.random.default_rng(0)
  probabilities = {
    "random": rng.random(shape),
    "ones": np.ones(shape),
    "zeros": np.zeros(shape),
    "at the threshold": rng.choice([0, HALF, np.nextafter(HALF, 0, dtype=np.float32), 1], shape),
  }[fill].astype(np.float32)
  expected = on_full_image(probabilities, BOXES, 40, 50)
  assert mask_runs.encode_masks(probabilities, BOXES, 40, 50) == expected


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_many_shapes_of_images_masks_and_boxes(threshold):
  for seed in range(40):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 70, 2).tolist()
    count, cells = int(rng.integers(0, 9)), int(rng.choice([1, 2, 7, 28]))
    probabilities = rng.random((count, cells, cells), np.float32)
    boxes = rng.normal(0, 50, (count, 4)) + (0, 0, width, height)
    if seed % 2:
      boxes = np.clip(np.round(boxes), 0, (width, height, width, height))
    expected = on_full_image(probabilities, boxes, height, width, threshold)
    assert mask_runs.encode_masks(probabilities, boxes, height, width, threshold) == expected


def test_masks_that_do_not_fit_into_memory_together(monkeypatch):
  rng = np.random.default_rng(1)
  probabilities = rng.random((len(BOXES), 7, 7), np.float32)
  together = mask_runs.encode_masks(probabilities, BOXES, 40, 50)
  monkeypatch.setattr(mask_runs, "_MAX_PIXELS", 700)  # less than the largest
  monkeypatch.setattr(mask_runs, "_MAX_PRODUCT", 1)
  assert mask_runs.encode_masks(probabilities, BOXES, 40, 50) == together == on_full_image(
    probabilities, BOXES, 40, 50
  )  # fmt: skip


def test_counts_are_compressed_as_pycocotools_does():
  rng = np.random.default_rng(0)
  masks = [
    rng.random(shape) < density for shape in ((1, 1), (37, 53), (300, 400)) for density in (0, 0.01, 0.5, 1)
  ]
  masks.append(np.zeros((6000, 6000), bool))
  masks[-1][:, 3000] = True  # counts of 25 bits
  expected = [mask_utils.encode(np.asfortranarray(mask, np.uint8))["counts"].decode() for mask in masks]
  runs = [mask_encoding.rle_counts(counts) for counts in expected]
  lengths = np.array([len(each) for each in runs])
  assert mask_encoding.compressed_counts(np.concatenate(runs), lengths) == expected
  nothing = np.zeros(0, np.int64)
  assert mask_encoding.compressed_counts(nothing, nothing) == []
