import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.ops import masks as mask_ops
from tests import paths
from tests.ops import roi_align_reference as reference

_crop = jax.jit(mask_ops.crop_masks, static_argnums=3, static_argnames=("width", "chunk"))


def test_pack_and_unpack():
  rng = np.random.default_rng(0)
  for width in (1, 7, 8, 13, 24):
    masks = rng.random((2, 3, 5, width)) > 0.5
    packed = mask_ops.pack(masks)
    assert packed.shape == (2, 3, 5, -(-width // 8)) and packed.dtype == np.uint8
    np.testing.assert_array_equal(mask_ops.unpack(packed, width), masks)
    np.testing.assert_array_equal(mask_ops.unpack(jnp.asarray(packed), width), masks)
  assert mask_ops.pack(np.array([[True, False]]))[0, 0] == 128  # big-endian bits
  with pytest.raises(ValueError, match="not 25"):
    mask_ops.unpack(packed, 25)


def _bitmaps(rng, height, width):
  y, x = np.mgrid[:height, :width]
  ellipses = [
    ((y - rng.uniform(10, height - 10)) / rng.uniform(5, 40)) ** 2
    + ((x - rng.uniform(10, width - 10)) / rng.uniform(5, 40)) ** 2
    <= 1
    for _ in range(2)
  ]
  return np.stack([*ellipses, rng.random((height, width)) > 0.5, np.ones((height, width), bool)])


def test_crop_equals_loops():
  rng = np.random.default_rng(1)
  height, width, size, count = 75, 109, 6, 22
  bitmaps = np.stack([_bitmaps(rng, height, width) for _ in range(2)])
  indices = rng.integers(0, 4, (2, count))
  rois = np.stack([reference.odd_rois(rng, count, height, width) for _ in range(2)])
  found = _crop(mask_ops.pack(bitmaps), indices, rois, size, width=width, chunk=8)
  assert found.shape == (2, count, size, size) and found.dtype == jnp.float32
  for image in range(2):
    for i in range(count):
      bitmap = bitmaps[image, indices[image, i]][:, :, None]
      mean = reference.roi_align(bitmap, rois[image, i], 1.0, size)[..., 0]
      # Halves are decided by the last bit of the coordinates.
      clear = np.abs(mean - 0.5) > 1e-4
      np.testing.assert_array_equal(found[image, i][clear], (mean >= 0.5)[clear])
      assert clear.mean() > 0.5


def test_crop_of_a_box_that_needs_many_tiles():
  bitmap = np.zeros((1, 1, 300, 520), bool)
  bitmap[..., 150:, 260:] = True
  rois = jnp.array([[[0.0, 0.0, 520.0, 300.0], [259.0, 149.0, 261.0, 151.0]]])
  found = _crop(mask_ops.pack(bitmap), jnp.zeros((1, 2), jnp.int32), rois, 28)
  expected = np.zeros((28, 28))
  expected[14:, 14:] = 1
  np.testing.assert_array_equal(found[0, 0], expected)


def test_crop_accepts_padding_rows():
  packed = jnp.zeros((1, 2, 16, 2), jnp.uint8)
  rois = jnp.array([[[0, 0, 0, 0], [3, 3, 3, 9], [jnp.nan] * 4, [90, 90, 99, 99]]], jnp.float32)
  indices = jnp.array([[-1, 5, 2**31 - 1, 0]])
  np.testing.assert_array_equal(_crop(packed, indices, rois, 4), 0)
  assert mask_ops.crop_masks(packed, indices[:, :0], rois[:, :0], 4).shape == (1, 0, 4, 4)
  assert mask_ops.crop_masks(packed[:, :0], indices, rois, 4).shape == (1, 4, 4, 4)


def _paste_loop(probabilities, box, height, width, threshold):
  """Bilinear sampling at every pixel centre of the frame, zeros around the mask."""
  size = probabilities.shape[0]
  padded = np.pad(probabilities.astype(float), 1)
  out = np.zeros((height, width), bool)
  for i in range(height):
    for j in range(width):
      y = (i + 0.5 - box[1]) / (box[3] - box[1]) * size - 0.5
      x = (j + 0.5 - box[0]) / (box[2] - box[0]) * size - 0.5
      if -1 < y < size and -1 < x < size:
        top, left = int(np.floor(y)), int(np.floor(x))
        v, u = y - top, x - left
        patch = padded[top + 1 : top + 3, left + 1 : left + 3]
        out[i, j] = np.array([1 - v, v]) @ patch @ np.array([1 - u, u]) >= threshold
  return out


@pytest.mark.parametrize(
  "box",
  [
    (5.3, 4.1, 30.7, 20.2),
    (-10, -8, 20.5, 50),
    (39.2, 2, 60, 9),
    (3.2, 3.3, 4.1, 30),
    (0, 0, 40, 32),
  ],
)
def test_paste_equals_loop(box):
  rng = np.random.default_rng(3)
  probabilities = rng.random((7, 7)).astype(np.float32)
  found = mask_ops.paste_mask(probabilities, np.array(box), 32, 40)
  np.testing.assert_array_equal(found, _paste_loop(probabilities, box, 32, 40, 0.5))


@pytest.mark.parametrize(
  "box", [(5, 5, 5, 9), (9, 9, 3, 3), (100, 3, 120, 9), (-30, 3, -20, 9), (np.nan, 0, 9, 9)]
)
def test_paste_of_nothing_is_empty(box):
  found = mask_ops.paste_mask(np.ones((7, 7), np.float32), np.array(box), 32, 40)
  assert found.shape == (32, 40) and found.dtype == bool and not found.any()


def test_paste_equals_golden_masks():
  golden = np.load(paths.golden_dir() / "htc" / "htc.npz")
  for image in range(2):
    name = f"predict.hard.{image}."
    expected = golden[name + "masks_packed"]
    width = 8 * expected.shape[-1]  # both images are whole bytes wide
    for i, packed in enumerate(expected):
      probabilities = 1 / (1 + np.exp(-golden[name + "mask_logits"][i]))
      box = golden[name + "boxes"][i]
      found = mask_ops.paste_mask(probabilities, box, packed.shape[0], width)
      np.testing.assert_array_equal(found, mask_ops.unpack(packed, width))
