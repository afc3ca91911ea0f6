"""Activations by name, and the gated MLP."""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float

from frozen_vision.layers.mlp import gelu, linear
from frozen_vision.ops.arrays import Array


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """The tanh form of GELU, in float32 (big_vision and `gelu_pytorch_tanh`)."""
  return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """x * sigmoid(1.702 x), in float32 (OpenAI's CLIP)."""
  y = x.astype(jnp.float32)
  return (y * jax.nn.sigmoid(1.702 * y)).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "gelu": gelu,
  "gelu_tanh": gelu_tanh,
  "quick_gelu": quick_gelu,
  "relu": jax.nn.relu,
  "relu6": jax.nn.relu6,
  "swish": jax.nn.silu,
}


def gated(gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
  """silu(gate) * up, in float32, returned in the input's dtype."""
  y = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
  return y.astype(gate.dtype)


class SwiGlu(nnx.Module):
  """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

  def __init__(self, channels: int, hidden: int, *, dtype: Any, rngs: nnx.Rngs):
    self.gate = linear(channels, hidden, dtype=dtype, rngs=rngs)
    self.up = linear(channels, hidden, dtype=dtype, rngs=rngs)
    self.down = linear(hidden, channels, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
    return self.down(gated(self.gate(x), self.up(x)))
