"""Several views of an image: where their boxes go, what is filtered, how masks are averaged."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.heads import base as heads_base
from frozen_vision.heads import views as views_lib
from frozen_vision.heads.htc import config as htc_config
from frozen_vision.heads.htc import htc
from frozen_vision.ops import mirror


class Preset(heads_base.DetectionHead):
  """A head whose candidates are its features: (boxes [b, n, k, 4], probabilities [b, n, c], masks [m, m])."""

  def __init__(self, **options):
    self.config = htc_config.htc(**(dict(num_classes=2, score_threshold=0.1, max_detections=6) | options))
    self.asked = nnx.static([])

  def losses(self, features, batch, rng):
    raise NotImplementedError

  def select(self, *candidates, **options):
    return htc.HTC.select(self, *candidates, **options)

  def score_boxes(self, features, image_size):
    boxes, probabilities, _ = features
    return boxes, probabilities, jnp.ones(boxes.shape[:2], bool)

  def predict_masks(self, features, boxes, labels):
    self.asked.append(np.asarray(boxes))
    return jnp.broadcast_to(features[2], (*labels.shape, *features[2].shape))


def _view(boxes, scores, size, *, mask=np.zeros((2, 2)), **options):
  """One image; every candidate has a score of class 0 and the rest of class 1's is zero."""
  boxes = np.asarray(boxes, np.float32)[None, :, None]
  probabilities = np.stack([np.asarray(scores, np.float32), np.zeros(len(scores), np.float32)], -1)[None]
  features = tuple(map(jnp.asarray, (boxes, probabilities, np.asarray(mask, np.float32))))
  return views_lib.View(features, jnp.asarray([size], jnp.int32), **options)


def _found(detections):
  valid = np.asarray(detections["valid"][0])
  return np.asarray(detections["boxes"][0])[valid], np.asarray(detections["scores"][0])[valid]


def test_boxes_of_all_views_lie_in_pixels_of_the_first():
  size, original = (100, 200), jnp.asarray([[50, 100]])
  views = [
    _view([[0, 0, 10, 10]], [0.9], size),
    _view([[60, 20, 100, 60]], [0.8], (200, 400)),  # twice as large
    _view([[0, 70, 20, 100]], [0.7], size, mirrored=True),  # at the right border
    _view([[100, 0, 300, 50]], [0.6], (50, 300), mirrored=True),
  ]
  boxes, scores = _found(views_lib.predict(Preset(), views, original))
  np.testing.assert_allclose(scores, [0.9, 0.8, 0.7, 0.6], rtol=1e-6)
  expected = [[0, 0, 10, 10], [30, 10, 50, 30], [180, 70, 200, 100], [0, 0, 200 * 2 / 3, 100]]
  np.testing.assert_allclose(boxes, expected, rtol=1e-5)


@pytest.mark.parametrize("kind, scores", [("hard", [0.9]), ("soft_linear", [0.9, 0.8 * (1 - 0.9)])])
def test_one_object_seen_twice_is_merged_by_the_kind_of_nms(kind, scores):
  views = [
    _view([[0, 0, 10, 20]], [0.8], (100, 100)),
    _view([[180, 0, 198, 40]], [0.9], (200, 200), mirrored=True),  # [1, 0, 10, 20]
  ]
  head = Preset(nms_kind=kind, score_threshold=0.05)
  boxes, found = _found(views_lib.predict(head, views, jnp.asarray([[100, 100]])))
  np.testing.assert_allclose(found, scores, rtol=1e-5)
  np.testing.assert_allclose(boxes[0], [1, 0, 10, 20], atol=1e-5)


@pytest.mark.parametrize(
  "sizes, kept", [("s", [0]), ("m", [1, 2]), ("l", [3, 4]), ("ml", [1, 2, 3, 4]), ("lms", [0, 1, 2, 3, 4])]
)
def test_sizes_are_areas_in_the_original_image(sizes, kept):
  # The input has half the original's width and a quarter of its height.
  sides = [31, 32, 95, 96, 200]
  boxes = [[8 * i, 0, 8 * i + side / 2, side / 4] for i, side in enumerate(sides)]
  scores = 0.9 - 0.1 * np.arange(5)
  view = _view(boxes, scores, (100, 400), sizes=sizes)
  head = Preset(nms_iou=0.99)
  _, found = _found(views_lib.predict(head, [view], jnp.asarray([[400, 800]])))
  np.testing.assert_allclose(found, scores[kept], rtol=1e-6)
  # If each class has its own box, each counts for itself.
  (shared, probabilities, mask), size = view.features, view.image_size
  both = jnp.concatenate([shared, shared * jnp.asarray([1, 1, 0, 0]) + jnp.asarray([0, 0, 400, 100])], axis=2)
  view = views_lib.View((both, probabilities[..., :1].repeat(2, -1), mask), size, sizes="s")
  head = Preset(class_specific_boxes=True, nms_iou=0.99)
  detections = views_lib.predict(head, [view], jnp.asarray([[400, 800]]))
  np.testing.assert_array_equal(np.asarray(detections["labels"])[np.asarray(detections["valid"])], [0])


def test_masks_are_asked_for_in_every_view_and_averaged_as_seen_in_the_first():
  mask = np.array([[0.2, 0.8], [0.4, 1.0]])
  views = [
    _view([[20, 10, 60, 50]], [0.9], (100, 100), mask=mask),
    _view([[0, 0, 1, 1]], [0.0], (200, 50), mask=mask),
    _view([[0, 0, 1, 1]], [0.0], (200, 50), mask=mask, mirrored=True),
  ]
  head = Preset(max_detections=1)
  detections = views_lib.predict(head, views, jnp.asarray([[100, 100]]))
  asked = np.stack(head.asked)[:, 0, 0]
  np.testing.assert_allclose(asked, [[20, 10, 60, 50], [10, 20, 30, 100], [20, 20, 40, 100]], rtol=1e-6)
  np.testing.assert_allclose(detections["masks"][0, 0], (2 * mask + mask[:, ::-1]) / 3, rtol=1e-6)


def test_more_rows_and_no_masks():
  boxes = [[8 * i, 0, 8 * i + 6, 6] for i in range(8)]
  view = _view(boxes, np.linspace(0.9, 0.5, 8), (100, 100))
  head = Preset(with_masks=False)
  detections = views_lib.predict(head, [view], jnp.asarray([[100, 100]]), max_detections=7)
  assert "masks" not in detections and detections["valid"].shape == (1, 7) and detections["valid"].all()
  assert views_lib.predict(head, [view], jnp.asarray([[100, 100]]))["valid"].shape == (1, 6)


def test_mirroring_leaves_the_padding():
  rng = np.random.default_rng(0)
  images, sizes = np.zeros((3, 6, 7, 3), np.uint8), np.array([[6, 7], [4, 5], [6, 2]], np.int32)
  expected = images.copy()
  for image, other, (height, width) in zip(images, expected, sizes):
    image[:height, :width] = rng.integers(1, 255, (height, width, 3))
    other[:height, :width] = image[:height, :width][:, ::-1]
  found = jax.jit(mirror.mirror)(images, sizes)
  assert found.dtype == jnp.uint8
  np.testing.assert_array_equal(found, expected)
