"""Linear layers, GELU and the two-layer MLP of transformers."""

from collections.abc import Callable
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float

from frozen_vision.ops.arrays import Array


def linear(inputs: int, outputs: int, *, use_bias: bool = True, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
  """A linear layer initialised as transformers are: a truncated normal of 0.02."""
  return nnx.Linear(
    inputs,
    outputs,
    use_bias=use_bias,
    dtype=dtype,
    rngs=rngs,
    kernel_init=nnx.initializers.truncated_normal(0.02),
  )


def uniform_linear(inputs: int, outputs: int, *, rngs: nnx.Rngs) -> nnx.Linear:
  """A linear layer drawn as PyTorch draws one, weights and biases uniform within 1 / sqrt(inputs); float32.

  For layers that released code leaves as PyTorch makes them.
  """
  bound = inputs**-0.5

  def draw(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32, **_: Any) -> Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return nnx.Linear(inputs, outputs, kernel_init=draw, bias_init=draw, rngs=rngs)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """x times the normal distribution's cumulative, exact, by erf as in PyTorch and in float32 as there.

  `jax.nn.gelu` takes erfc, which costs an exponential more for every number.
  """
  y = x.astype(jnp.float32)
  return (y * (0.5 + 0.5 * jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


class Mlp(nnx.Module):
  """Linear, activation, linear; the activation is exact GELU by default."""

  def __init__(
    self,
    channels: int,
    hidden: int,
    *,
    activation: Callable[[Array], Array] = gelu,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    self.activation = activation
    self.fc1 = linear(channels, hidden, dtype=dtype, rngs=rngs)
    self.fc2 = linear(hidden, channels, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
    return self.fc2(self.activation(self.fc1(x)))
