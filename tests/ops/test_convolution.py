"""Convolutions by cells of the kernel equal the compiler's, values and gradients; pooling at the edges."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.layers.convolution import MapConv
from frozen_vision.ops import convolution


def _draw(*shape):
  return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), "float32")


@pytest.mark.parametrize("padding, strides", [("SAME", 2), (1, 1), (((2, 0), (1, 3)), (2, 1)), ("VALID", 2)])
@pytest.mark.parametrize("groups, inputs, outputs", [(6, 6, 6), (6, 6, 12), (3, 6, 9), (1, 6, 4)])
def test_equals_the_compilers_convolution(groups, inputs, outputs, strides, padding):
  x, kernel = _draw(2, 9, 12, inputs), _draw(3, 5, inputs // groups, outputs)

  def ours(x, kernel):
    return convolution.convolve(x, kernel, strides=strides, padding=padding, groups=groups)

  def reference(x, kernel):
    return jax.lax.conv_general_dilated(
      x,
      kernel,
      (strides, strides) if isinstance(strides, int) else strides,
      ((padding, padding),) * 2 if isinstance(padding, int) else padding,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=groups,
    )

  weights = _draw(*jax.eval_shape(reference, x, kernel).shape)

  @jax.jit
  def values_and_gradients(x, kernel):
    results = []
    for function in (ours, reference):
      value, pull_back = jax.vjp(function, x, kernel)
      results.append((value, pull_back(weights)))
    return results

  (found, gradients), (wanted, wanted_gradients) = values_and_gradients(x, kernel)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
  for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strides", [1, (2, 1), 3])
def test_a_kernel_of_one_cell_is_a_matrix_product_with_its_gradients(strides):
  x, kernel = _draw(2, 7, 9, 5), _draw(1, 1, 5, 8)
  steps = (strides, strides) if isinstance(strides, int) else strides

  def ours(x, kernel):
    return convolution.convolve(x, kernel, strides=strides)

  def reference(x, kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, steps, ((0, 0), (0, 0)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  weights = _draw(*jax.eval_shape(reference, x, kernel).shape)
  found, wanted = (jax.vjp(function, x, kernel) for function in (ours, reference))
  np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5, atol=1e-5)
  for gradient, wanted_gradient in zip(found[1](weights), wanted[1](weights), strict=True):
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3])
def test_gradients_in_bfloat16_are_added_in_float32(size):
  x, kernel = jnp.ones((4, 32, 32, 2), jnp.bfloat16), jnp.zeros((size, size, 2, 4), jnp.bfloat16)

  @jax.grad
  def gradient_of(kernel):
    return convolution.convolve(x, kernel, padding="VALID").sum()

  gradient = gradient_of(kernel)
  assert gradient.dtype == jnp.bfloat16
  np.testing.assert_array_equal(gradient, np.full_like(gradient, 4 * (33 - size) ** 2))


def test_a_depthwise_convolution_in_bfloat16_adds_in_float32():
  x, kernel = jnp.ones((1, 8, 8, 4), jnp.bfloat16), jnp.full((5, 5, 1, 4), 1.015625, jnp.bfloat16)
  y = convolution.convolve(x, kernel, padding="VALID", groups=4)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, jnp.full_like(y, 25 * 1.015625))


@pytest.mark.parametrize("kernel, groups", [((3, 3, 1, 8), 8), ((1, 1, 8, 6), 1)])
def test_on_a_cpu_no_convolution_is_compiled_that_is_slow_there(kernel, groups):
  text = (
    jax.jit(lambda x, k: convolution.convolve(x, k, groups=groups))
    .lower(_draw(1, 8, 8, 8), _draw(*kernel))
    .as_text()
  )
  assert ("convolution" in text) == (jax.default_backend() != "cpu")


@pytest.mark.parametrize("size, groups", [((3, 2), 3), ((3, 2), 1), ((1, 1), 1)])
@pytest.mark.parametrize("options", [dict(), dict(strides=(2, 1), padding="VALID", use_bias=False)])
def test_a_layer_of_a_head_equals_flax_s(size, groups, options):
  layers = [
    kind(6, 9, size, feature_group_count=groups, rngs=nnx.Rngs(0), **options) for kind in (MapConv, nnx.Conv)
  ]
  for dtype in ("float32", "bfloat16"):
    found, wanted = (layer(_draw(2, 9, 12, 6).astype(dtype)) for layer in layers)
    assert found.dtype == wanted.dtype
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
  ours = MapConv(6, 9, size, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  assert ours(_draw(1, 4, 4, 6)).dtype == jnp.bfloat16


def test_channels_that_do_not_fit_are_named():
  with pytest.raises(ValueError, match=r"\(3, 3, 2, 8\) in 4 groups takes 8 channels .* the map has 6"):
    convolution.convolve(_draw(1, 4, 4, 6), _draw(3, 3, 2, 8), groups=4)


def test_pooling_ignores_what_is_outside_of_the_map():
  x = -jnp.arange(1, 10, dtype=jnp.float32).reshape(1, 3, 3, 1)
  pooled = convolution.max_pool(x, size=3, strides=2, padding=1)
  np.testing.assert_array_equal(pooled[0, :, :, 0], [[-1, -2], [-4, -5]])
  means = convolution.average_pool(x, size=2, strides=2)
  np.testing.assert_array_equal(means[0, :, :, 0], [[-3, -4.5], [-7.5, -9]])
