"""One more global attention block after the last backbone level, as HTC++ has it (Swin, A2.2)."""

from flax import nnx
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from frozen_vision.layers.attention import attention
from frozen_vision.ops.arrays import Array

_INIT = nnx.initializers.truncated_normal(0.02)


class ExtraAttention(nnx.Module):
  """Transformer block over all cells of a map: pre-norm attention, pre-norm MLP, a last norm.

  The Swin paper names no more than one extra global self-attention layer; the block is that of
  ViT-Adapter's Swin-L HTC++ (1536 channels, 48 heads, MLP ratio 4, biases in qkv). Its stochastic
  depth of 0.3 is left out. Cells of the padding take part.
  """

  def __init__(
    self,
    channels: int,
    num_heads: int,
    *,
    mlp_ratio: int = 4,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Builds the block.

    Args:
      channels: of the map.
      num_heads: must divide `channels`; Swin-L: 48.
      mlp_ratio: hidden channels of the MLP over `channels`.
      dtype: of the computation; parameters, norm statistics and softmax are float32.
      rngs: for the weights.

    Raises:
      ValueError: the heads do not divide the channels.
    """
    if num_heads < 1 or channels % num_heads:
      raise ValueError(
        f"ExtraAttention: {channels} channels do not divide into {num_heads} heads; give a"
        " divisor (neck.attention_heads)."
      )
    self.num_heads = num_heads
    self.dtype = dtype

    def norm():
      return nnx.LayerNorm(channels, dtype=dtype, rngs=rngs)

    def linear(i, o):
      return nnx.Linear(i, o, dtype=dtype, kernel_init=_INIT, rngs=rngs)

    self.norm1, self.norm2, self.norm = norm(), norm(), norm()
    self.qkv = linear(channels, 3 * channels)
    self.proj = linear(channels, channels)
    self.fc1 = linear(channels, mlp_ratio * channels)
    self.fc2 = linear(mlp_ratio * channels, channels)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    shape = x.shape
    x = jnp.asarray(x, self.dtype).reshape(shape[0], -1, shape[-1])
    qkv = self.qkv(self.norm1(x)).reshape(*x.shape[:2], 3, self.num_heads, -1)
    y = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
    x = x + self.proj(y.reshape(x.shape))
    x = x + self.fc2(nnx.gelu(self.fc1(self.norm2(x)), approximate=False))
    return self.norm(x).reshape(shape)
