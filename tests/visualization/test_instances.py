import json

import numpy as np
from PIL import Image
import pytest

from frozen_vision.data.detection import photos
from frozen_vision.ops import masks as mask_ops
from frozen_vision.visualization import instances


def scene(size=128, n=3, *, scores=False, seed=0):
  rng = np.random.default_rng(seed)
  image = rng.integers(60, 90, (size, size, 3), dtype=np.uint8)
  boxes, masks = np.zeros((n, 4)), np.zeros((n, size, size), bool)
  for i in range(n):
    x, y = rng.integers(0, size // 2, 2)
    w, h = rng.integers(size // 8, size // 2, 2)
    boxes[i], masks[i, y : y + h, x : x + w] = (x, y, x + w, y + h), True
  labels = rng.integers(0, 5, n)
  return image, instances.Instances(boxes, labels, rng.random(n) if scores else None, masks)


def test_small_images_are_enlarged_by_an_integer_factor():
  image, it = scene()
  before = image.copy()
  picture = instances.draw_detections(image, it.boxes, it.labels, None, it.masks, list("abcde"))
  assert picture.dtype == np.uint8 and picture.shape == (640, 640, 3)
  np.testing.assert_array_equal(image, before)
  large = np.zeros((700, 1024, 3), np.uint8)
  assert instances.draw_detections(large, it.boxes, it.labels).shape == large.shape


def test_masks_and_boxes_are_where_they_belong():
  image = np.full((100, 100, 3), 40, np.uint8)
  mask = np.zeros((1, 100, 100), bool)
  mask[0, 50:90, 10:40] = True
  picture = instances.draw_detections(
    image, np.array([[10, 50, 40, 90]]), np.array([3]), np.array([0.9]), mask, min_long_side=400
  )
  color = np.array(instances.class_color(3))
  np.testing.assert_array_equal(picture[200, 80], color)  # Upper edge of the box, at 4x.
  inside = picture[280, 100].astype(int)
  np.testing.assert_allclose(inside, 40 + 0.38 * (color - 40), atol=2)
  changed = np.any(picture != 40, axis=-1)
  assert not changed[:170].any() and not changed[:, 170:].any()  # But the tag above the box.


def test_no_instance_leaves_the_image_unchanged():
  image = np.random.default_rng(0).integers(0, 256, (512, 640, 3), dtype=np.uint8)
  picture = instances.draw_detections(image, np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))
  np.testing.assert_array_equal(picture, image)


def test_colors_are_fixed_and_distinct():
  colors = np.array([instances.class_color(i) for i in range(80)])
  assert instances.class_color(7) == instances.class_color(7) and colors.min() >= 0
  distance = np.abs(colors[:, None] - colors[None]).sum(-1) + 1000 * np.eye(80)
  assert distance.min() > 20


def test_extreme_boxes_are_drawn():
  image = np.zeros((20, 300, 3), np.uint8)
  boxes = np.array([[-50, -50, 900, 900], [299.6, 19.7, 300, 20], [5, 5, 5, 5.0]])
  names = ["x" * 80, "ä", "é"]
  picture = instances.draw_detections(image, boxes, np.arange(3), class_names=names)
  assert picture.shape == (40, 600, 3) and picture.any()


@pytest.mark.parametrize("n", [1, 5])
def test_comparison_sheet(n, tmp_path):
  examples = []
  for i in range(n):
    image, truth = scene(96, seed=i)
    _, prediction = scene(96, n=i, scores=True, seed=i + 50)
    examples.append(instances.Comparison(image, prediction, truth, f"image {i}"))
  sheet = instances.draw_comparisons(examples, list("abcde"), panel_size=200)
  width = 24 + (24 + 2 * 200 + 8) * (1 if n == 1 else 2)
  assert sheet.shape[1] == width and (sheet[0] == 255).all()
  instances.save_png(sheet, tmp_path / "sheet.png")
  np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "sheet.png")), sheet)
  with pytest.raises(ValueError, match="no example"):
    instances.draw_comparisons([])


@pytest.mark.usefixtures("without_type_checks")
def test_wrong_shapes_are_named():
  image, it = scene()
  with pytest.raises(ValueError, match=r"float64 \(128, 128, 3\); expected uint8"):
    instances.draw_detections(image / 255, it.boxes, it.labels)
  with pytest.raises(ValueError, match=r"masks is \(3, 128, 8\); expected \(3, 128, 128\)"):
    instances.draw_detections(image, it.boxes, it.labels, masks=it.masks[..., :8])


def test_instances_of_a_batch():
  """Padding rows and rows below the threshold are dropped; masks are cropped to the content."""
  _, it = scene(96)
  frame = np.zeros((1, 4, 96, 100), bool)
  frame[0, :3, :, :96] = it.masks
  batch = {
    "image": np.zeros((1, 96, 100, 3), np.uint8),
    "image_size": np.array([[96, 96]]),
    "boxes": np.concatenate([it.boxes, np.zeros((1, 4))])[None],
    "labels": np.append(it.labels, 0)[None],
    "valid": np.array([[True, True, True, False]]),
    "masks": mask_ops.pack(frame),
  }
  truth = instances.true_instances(batch, 0)
  np.testing.assert_array_equal(truth.masks, it.masks)
  np.testing.assert_array_equal(truth.boxes, it.boxes)
  predictions = {
      "boxes": batch["boxes"], "labels": batch["labels"], "valid": batch["valid"],
      "scores": np.array([[0.9, 0.1, 0.5, 0.9]]), "masks": np.ones((1, 4, 28, 28), np.float32),
  }  # fmt: skip
  prediction = instances.predicted_instances(predictions, 0, (96, 96), score_threshold=0.4)
  np.testing.assert_array_equal(prediction.masks, it.masks[[0, 2]])
  np.testing.assert_array_equal(prediction.scores, [0.9, 0.5])


def test_real_photograph_with_its_truth():
  source = photos.sample_photos()
  truth = json.loads(source.annotations.read_text())
  record = truth["images"][0]
  image = np.asarray(Image.open(source.images / record["file_name"]).convert("RGB"))
  own = [a for a in truth["annotations"] if a["image_id"] == record["id"]]
  boxes = np.array([a["bbox"] for a in own])
  boxes[:, 2:] += boxes[:, :2]
  names = {category["id"]: category["name"] for category in truth["categories"]}
  names = [names.get(i, "") for i in range(max(names) + 1)]
  labels = np.array([a["category_id"] for a in own])
  picture = instances.draw_detections(image, boxes, labels, class_names=names)
  plain = instances.draw_detections(image, boxes[:0], labels[:0])
  assert picture.shape == plain.shape and np.any(picture != plain)
