import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.ops import roi_align as roi_ops
from tests.ops import roi_align_reference as reference

_align = jax.jit(
  roi_ops.roi_align,
  static_argnames=("strides", "output_size", "sampling_ratio", "max_samples", "chunk"),
)
_HEIGHT, _WIDTH, _STRIDES = 96, 136, (4, 8, 16, 32)


def _features(rng, batch=2, channels=3):
  shapes = [(-(-_HEIGHT // s), -(-_WIDTH // s)) for s in _STRIDES]
  return tuple(rng.normal(size=(batch, h, w, channels)).astype(np.float32) for h, w in shapes)


def _expected(features, rois, levels, size, ratio=None, max_samples=None):
  return np.stack(
    [
      np.stack(
        [
          reference.roi_align(features[level][image], roi, 1 / _STRIDES[level], size, ratio, max_samples)
          for roi, level in zip(rois[image], levels[image])
        ]
      )
      for image in range(len(rois))
    ]
  )


def test_assign_levels_has_sharp_edges():
  sides = np.array([1, 56, 111.99, 112, 223.9, 224, 448, 5000], np.float32)
  rois = np.stack([0 * sides, 0 * sides, sides, sides], axis=-1)
  np.testing.assert_array_equal(roi_ops.assign_levels(rois, 4), [0, 0, 0, 1, 1, 2, 3, 3])
  np.testing.assert_array_equal(roi_ops.assign_levels(rois[:2] * 0, 4), [0, 0])


@pytest.mark.parametrize("size, ratio, max_samples", [(7, None, None), (5, 2, None), (3, None, 4)])
def test_equals_loops(size, ratio, max_samples):
  rng = np.random.default_rng(size)
  features = _features(rng)
  rois = np.stack([reference.odd_rois(rng, 21, _HEIGHT, _WIDTH) for _ in range(2)])
  # Any level for any roi: exactness must not depend on rois being on the level of their size.
  levels = rng.integers(0, 4, rois.shape[:2])
  found = _align(
    features,
    rois,
    strides=_STRIDES,
    output_size=size,
    sampling_ratio=ratio,
    levels=levels,
    max_samples=max_samples,
    chunk=8,
  )
  expected = _expected(features, rois, levels, size, ratio, max_samples)
  np.testing.assert_allclose(found, expected, atol=3e-5)


def test_result_does_not_depend_on_chunk_or_order():
  rng = np.random.default_rng(0)
  features = _features(rng)
  rois = np.stack([reference.odd_rois(rng, 15, _HEIGHT, _WIDTH) for _ in range(2)])

  def align(rois, chunk):
    return _align(features, rois, strides=_STRIDES, output_size=7, sampling_ratio=None, chunk=chunk)

  whole = align(rois, 64)
  np.testing.assert_allclose(align(rois, 4), whole, atol=2e-6)
  np.testing.assert_allclose(align(rois[:, ::-1], 4)[:, ::-1], whole, atol=2e-6)
  assert align(rois[:, :0], 4).shape == (2, 0, 7, 7, 3)


def test_gradient_is_the_transpose():
  # RoIAlign is linear in the features: its matrix, read off column by column from the forward
  # pass, must be the one the backward pass applies.
  rng = np.random.default_rng(1)
  shapes = [(14, 18), (7, 9)]
  rois = np.stack([reference.odd_rois(rng, 13, 56, 72)])
  count = sum(h * w for h, w in shapes)

  def align(flat):  # [count, c] -> [n, 3, 3, c]
    first = shapes[0][0] * shapes[0][1]
    features = (flat[:first].reshape(1, *shapes[0], -1), flat[first:].reshape(1, *shapes[1], -1))
    return _align(features, rois, strides=(4, 8), output_size=3, sampling_ratio=None, chunk=4)[0]

  matrix = jax.jit(align)(jnp.eye(count)).reshape(-1, count)
  gradient = rng.normal(size=(13, 3, 3, 1)).astype(np.float32)
  found = jax.jit(lambda g: jax.vjp(align, jnp.zeros((count, 1)))[1](g)[0])(gradient)
  np.testing.assert_allclose(found[:, 0], gradient.reshape(-1) @ matrix, atol=2e-5)
  to_rois = jax.grad(
    lambda rois: jnp.sum(
      _align((jnp.ones((1, 8, 8, 1)),), rois, strides=(4,), output_size=2, sampling_ratio=2)
    )
  )(jnp.asarray(rois))
  np.testing.assert_array_equal(to_rois, 0)


def test_empty_roi_gives_the_features_at_its_point():
  y, x = jnp.meshgrid(jnp.arange(16.0), jnp.arange(16.0), indexing="ij")
  features = jnp.stack([y, x], axis=-1)[None]
  rois = jnp.array([[[20.0, 30.0, 20.0, 30.0], [20.0, 30.0, 10.0, 5.0]]])
  found = _align((features,), rois, strides=(4,), output_size=2, sampling_ratio=None)
  np.testing.assert_allclose(found, np.broadcast_to([7.0, 4.5], found.shape), atol=1e-5)


def test_constant_map_gives_the_constant_wherever_a_roi_lies_inside():
  rng = np.random.default_rng(2)
  corner = rng.uniform(0, 60, (1, 30, 2))
  rois = np.concatenate([corner, corner + rng.uniform(0, 60, (1, 30, 2))], -1).astype(np.float32)
  features = tuple(jnp.full((1, 128 // s, 128 // s, 1), 3.0, jnp.bfloat16) for s in _STRIDES)
  found = _align(features, rois, strides=_STRIDES, output_size=7, sampling_ratio=None)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(found.astype(np.float32), 3.0, atol=1e-6)


def test_broken_roi_stays_alone():
  rois = np.array([[[0, 0, 30, 30], [np.nan] * 4, [0, 0, np.inf, 8], [-1e30, 0, 1e30, 9]]])
  found = _align((jnp.ones((1, 16, 16, 1)),), rois, strides=(4,), output_size=2, sampling_ratio=None)
  np.testing.assert_allclose(found[0, 0], 1.0)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
  "features, rois, strides, levels, message",
  [
    (((1, 8, 8, 2),), (1, 3, 4), (4, 8), None, "one stride per level"),
    (((1, 8, 8, 2), (1, 4, 4, 3)), (1, 3, 4), (4, 8), None, "one b and"),
    (((2, 8, 8, 2),), (1, 3, 4), (4,), None, r"expected \[2, n, 4\]"),
    (((1, 8, 8, 2),), (1, 3, 4), (4,), (1, 2), r"expected \(1, 3\)"),
  ],
)
def test_mismatches_are_named(features, rois, strides, levels, message):
  with pytest.raises(ValueError, match=message):
    roi_ops.roi_align(
      tuple(jnp.zeros(shape) for shape in features),
      jnp.zeros(rois),
      strides=strides,
      output_size=2,
      sampling_ratio=None,
      levels=levels and jnp.zeros(levels, jnp.int32),
    )
