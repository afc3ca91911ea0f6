"""Trained upsampling of maps."""

from flax import nnx
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from frozen_vision.ops.arrays import Array

_KAIMING = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class Deconv2x(nnx.Module):
  """Transposed convolution, kernel 2, stride 2, as a matrix product: its outputs never overlap."""

  def __init__(self, channels_in: int, channels_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    self.dtype = dtype
    self.kernel = nnx.Param(_KAIMING(rngs.params(), (2, 2, channels_in, channels_out), jnp.float32))
    self.bias = nnx.Param(jnp.zeros((channels_out,), jnp.float32))

  def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h*2 w*2 d"]:
    kernel = jnp.asarray(self.kernel[...], self.dtype)
    y = jnp.einsum("nhwc,ijcd->nhiwjd", jnp.asarray(x, self.dtype), kernel)
    n, h, _, w, _, d = y.shape
    return y.reshape(n, 2 * h, 2 * w, d) + jnp.asarray(self.bias[...], self.dtype)
