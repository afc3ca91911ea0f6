"""Feature pyramid network (Lin et al. 2017, section 3), as mmdet 3.3 configures it."""

from collections.abc import Sequence

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float
import numpy as np

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.layers.convolution import MapConv
from frozen_vision.necks.base import Neck
from frozen_vision.ops.arrays import Array

_XAVIER = nnx.initializers.xavier_uniform()


def resize_nearest(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b y x c"]:
  """Nearest-neighbour resize with PyTorch's rule: cell i reads floor(i * in / out).

  `jax.image.resize` samples cell centres instead, which differs for odd sizes.
  """
  for axis, out in zip((1, 2), size):
    length = x.shape[axis]
    if out == length:
      continue
    if out % length == 0:
      x = jnp.repeat(x, out // length, axis=axis)
    else:
      index = np.floor(np.arange(out, dtype=np.float32) * np.float32(length / out)).astype(np.int32)
      x = jnp.take(x, np.minimum(index, length - 1), axis=axis)
  return x


class FPN(Neck):
  """Top-down pyramid: 1x1 laterals, nearest upsampling, 3x3 outputs, extra levels by subsampling.

  Attributes:
    feature_specs: specs of the outputs; all have `channels` channels.
  """

  def __init__(
    self,
    feature_specs: Sequence[FeatureSpec],
    channels: int = 256,
    *,
    num_levels: int = 5,
    input_norm: bool = True,
    attention_heads: int = 0,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Builds the neck.

    Args:
      feature_specs: levels of the backbone, fine to coarse.
      channels: channels of every output level.
      num_levels: output levels; those beyond the backbone's are the last output, every second cell.
      input_norm, attention_heads: of the input stage, see `Neck`.
      dtype: dtype of the computation; parameters and norm statistics are float32.
      rngs: for the weights.

    Raises:
      ValueError: no levels, or fewer output levels than inputs.
    """
    feature_specs = tuple(feature_specs)
    if not feature_specs or num_levels < len(feature_specs):
      raise ValueError(
        f"FPN: num_levels={num_levels} outputs for {len(feature_specs)} backbone levels; expected"
        " at least one level and num_levels >= the number of levels."
      )
    super().__init__(
      feature_specs, input_norm=input_norm, attention_heads=attention_heads, dtype=dtype, rngs=rngs
    )
    strides = [spec.stride for spec in feature_specs]
    while len(strides) < num_levels:
      strides.append(2 * strides[-1])
    self.feature_specs = tuple(FeatureSpec(stride, channels) for stride in strides)
    self.laterals = nnx.List(
      [nnx.Linear(s.channels, channels, dtype=dtype, kernel_init=_XAVIER, rngs=rngs) for s in feature_specs]
    )
    self.outputs = nnx.List(
      [
        MapConv(channels, channels, (3, 3), dtype=dtype, kernel_init=_XAVIER, rngs=rngs)
        for _ in feature_specs
      ]
    )

  def __call__(self, features: Sequence[Float[Array, "b _h _w _c"]]) -> tuple[Float[Array, "b _h _w d"], ...]:
    """Backbone levels, fine to coarse -> `num_levels` pyramid levels in `dtype`.

    Map sizes are free: a coarser map is resized to the next finer one, whatever their ratio.

    Raises:
      ValueError: a number of levels or channels other than `feature_specs` announced.
    """
    maps = [lateral(x) for lateral, x in zip(self.laterals, self.inputs(features))]
    for i in range(len(maps) - 1, 0, -1):
      maps[i - 1] = maps[i - 1] + resize_nearest(maps[i], maps[i - 1].shape[1:3])
    outputs: list[jax.Array] = [conv(x) for conv, x in zip(self.outputs, maps)]
    while len(outputs) < len(self.feature_specs):
      outputs.append(outputs[-1][:, ::2, ::2])  # max-pool of kernel 1, stride 2
    return tuple(outputs)
