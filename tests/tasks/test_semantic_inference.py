"""Windows, mirrored images and label maps at original sizes, against loops over the images."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from frozen_vision.tasks import semantic_inference as inference

_SIZES = np.array([[20, 31], [9, 40], [24, 12]], np.int32)
_FRAME = (24, 40)


def make_images(seed=0):
  rng = np.random.default_rng(seed)
  images = np.zeros((3, *_FRAME, 3), np.uint8)
  for image, (height, width) in zip(images, _SIZES):
    image[:height, :width] = rng.integers(1, 256, (height, width, 3))
  return images


def scorer(images, sizes):
  """A score that knows its place in the window and how much content the window has."""
  x = images.astype(jnp.float32)
  place = jnp.arange(images.shape[2], dtype=jnp.float32)[None, None, :, None]
  content = jnp.prod(sizes, axis=1).astype(jnp.float32)[:, None, None, None]
  return jnp.concatenate([x[..., :1] + place, x[..., 1:2] * 2, x[..., :1] * 0 + content], axis=-1)


def starts(length, window, stride):
  """As a reader of mmseg would list them: a grid, and the last window at the end."""
  found = [0]
  while found[-1] + window < length:
    found.append(min(found[-1] + stride, length - window))
  return found


@pytest.mark.parametrize("window, stride", [((8, 16), (5, 11)), ((16, 16), (16, 16)), ((30, 50), (20, 20))])
def test_sliding_windows(window, stride):
  images = make_images()
  found = jax.jit(inference.sliding(scorer, window, stride))(images, _SIZES)
  window = tuple(min(w, f) for w, f in zip(window, _FRAME))
  for image, (height, width), scores in zip(images, _SIZES, np.asarray(found)):
    total, count = np.zeros((*_FRAME, 3)), np.zeros((*_FRAME, 1))
    for top in starts(height, window[0], stride[0]):
      for left in starts(width, window[1], stride[1]):
        part = image[None, top : top + window[0], left : left + window[1]]
        inside = np.minimum(np.array([height - top, width - left]), window)[None]
        new = np.asarray(scorer(jnp.asarray(part), jnp.asarray(inside)))[0]
        total[top : top + window[0], left : left + window[1]] += new
        count[top : top + window[0], left : left + window[1]] += 1
    assert (count[:height, :width] > 0).all()
    np.testing.assert_allclose(
      scores[:height, :width], (total / np.maximum(count, 1))[:height, :width], rtol=1e-5
    )


def test_mirrored_scores_are_turned_back():
  images = make_images()
  turned = np.asarray(jax.jit(inference.mirror)(images, _SIZES))
  found = np.asarray(jax.jit(inference.mirrored(scorer))(images, _SIZES))
  for i, (height, width) in enumerate(_SIZES):
    np.testing.assert_array_equal(turned[i, :height, :width], images[i, :height, :width][:, ::-1])
    np.testing.assert_array_equal(turned[i, :, width:], images[i, :, width:])
    alone = scorer(
      jnp.asarray(images[i : i + 1, :height, :width][:, :, ::-1]), jnp.asarray(_SIZES[i : i + 1])
    )
    np.testing.assert_array_equal(found[i, :height, :width], np.asarray(alone)[0, :, ::-1])


def _resized(scores, size):
  """Bilinear without smoothing, position by position (align_corners False)."""
  for axis, target in enumerate(size):
    length = scores.shape[axis]
    at = np.clip((np.arange(target) + 0.5) * length / target - 0.5, 0, length - 1)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, length - 1)
    share = (at - low).reshape([-1 if a == axis else 1 for a in range(3)])
    scores = np.take(scores, low, axis) * (1 - share) + np.take(scores, high, axis) * share
  return scores


def test_label_maps_at_original_sizes():
  rng = np.random.default_rng(0)
  originals = np.array([[33, 129], [70, 20], [24, 12]], np.int32)
  views = [
    inference.View(rng.standard_normal((3, *_FRAME, 5)).astype(np.float32), _SIZES),
    inference.View(rng.standard_normal((3, 12, 20, 5)).astype(np.float32), (_SIZES + 1) // 2),
  ]
  found = np.asarray(jax.jit(inference.label_maps, static_argnums=2)(views, originals, (70, 129)))
  assert found.dtype == np.uint8 and found.shape == (3, 96, 256)
  for i, (height, width) in enumerate(originals):
    mean = np.mean(
      [
        _resized(scores[i, : sizes[i, 0], : sizes[i, 1]].astype(np.float64), (height, width))
        for scores, sizes in views
      ],
      axis=0,
    )
    order = np.sort(mean, axis=-1)
    clear = order[..., -1] - order[..., -2] > 1e-5
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(found[i, :height, :width][clear], mean.argmax(-1)[clear])
    assert not found[i, height:].any() and not found[i, :, width:].any()
  # Pillow's own bilinear filter, for enlarging.
  enlarged = Image.fromarray(views[0].scores[0, :20, :31, 0]).resize((129, 33), Image.Resampling.BILINEAR)
  np.testing.assert_allclose(
    _resized(views[0].scores[0, :20, :31, :1].astype(np.float64), (33, 129))[..., 0],
    np.asarray(enlarged),
    atol=1e-5,
  )
