"""Simple feature pyramid of a plain ViT's last map (ViTDet, arXiv 2203.16527), as detectron2 builds it."""

from collections.abc import Sequence

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.layers.convolution import MapConv
from frozen_vision.layers.mlp import gelu
from frozen_vision.layers.norms import LayerNorm
from frozen_vision.layers.upsampling import Deconv2x
from frozen_vision.necks.base import Neck
from frozen_vision.ops.arrays import Array

_EPSILON = 1e-6  # of detectron2's channel LayerNorm
_SCALES = (4, 2, 1, 0.5)


class SimplePyramid(Neck):
  """Four maps of 4, 2, 1 and 1/2 times the resolution of the last map, then extra levels by subsampling.

  Each is a transposed convolution or a max-pooling, then a 1x1 and a 3x3 convolution without biases, a
  LayerNorm after each.

  Attributes:
    feature_specs: specs of the outputs; all have `channels` channels.
  """

  def __init__(
    self,
    feature_specs: Sequence[FeatureSpec],
    channels: int = 256,
    *,
    num_levels: int = 5,
    input_norm: bool = False,
    attention_heads: int = 0,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Builds the neck.

    Args:
      feature_specs: levels of the backbone; the last one is read.
      channels: channels of every output level.
      num_levels: output levels, at least 4.
      input_norm, attention_heads: of the input stage, see `Neck`; the reference has neither.
      dtype: dtype of the computation; parameters and norm statistics are float32.
      rngs: for the weights.

    Raises:
      ValueError: fewer than 4 output levels, or a map whose stride or channels do not divide by 4.
    """
    last = tuple(feature_specs)[-1]
    if num_levels < len(_SCALES):
      raise ValueError(f"SimplePyramid: num_levels={num_levels}; expected at least {len(_SCALES)}.")
    if last.stride % 4 or last.channels % 4:
      raise ValueError(
        f"SimplePyramid: the backbone's last map has a stride of {last.stride} and {last.channels} channels; "
        "both must divide by 4. For patches of 14 pixels, build the backbone with stride=16."
      )
    self.num_inputs = len(tuple(feature_specs))
    super().__init__([last], input_norm=input_norm, attention_heads=attention_heads, dtype=dtype, rngs=rngs)
    strides = [int(last.stride / scale) for scale in _SCALES]
    while len(strides) < num_levels:
      strides.append(2 * strides[-1])
    self.feature_specs = tuple(FeatureSpec(stride, channels) for stride in strides)
    width = last.channels

    def deconvolution(inputs, outputs):
      return Deconv2x(inputs, outputs, dtype=dtype, rngs=rngs)

    def norm(size):
      return LayerNorm(size, epsilon=_EPSILON, rngs=rngs)

    self.up4_first, self.up4_norm = deconvolution(width, width // 2), norm(width // 2)
    self.up4_second = deconvolution(width // 2, width // 4)
    self.up2 = deconvolution(width, width // 2)
    widths = (width // 4, width // 2, width, width)
    self.laterals = nnx.List(
      [nnx.Linear(size, channels, use_bias=False, dtype=dtype, rngs=rngs) for size in widths]
    )
    self.lateral_norms = nnx.List([norm(channels) for _ in widths])
    self.outputs = nnx.List(
      [MapConv(channels, channels, (3, 3), use_bias=False, dtype=dtype, rngs=rngs) for _ in widths]
    )
    self.output_norms = nnx.List([norm(channels) for _ in widths])

  def __call__(self, features: Sequence[Float[Array, "b _h _w _c"]]) -> tuple[Float[Array, "b _h _w d"], ...]:
    """Backbone levels, of which the last is read -> `num_levels` pyramid levels in `dtype`.

    Raises:
      ValueError: a number of levels or channels other than `feature_specs` announced.
    """
    if len(features) != self.num_inputs:
      raise ValueError(f"SimplePyramid: got {len(features)} levels, was built for {self.num_inputs}.")
    [x] = self.inputs(features[-1:])
    fine = self.up4_second(gelu(self.up4_norm(self.up4_first(x))))
    maps = [fine, self.up2(x), x, _pooled(x)]
    outputs: list[jax.Array] = []
    for level, map_ in enumerate(maps):
      map_ = self.lateral_norms[level](self.laterals[level](map_))
      outputs.append(self.output_norms[level](self.outputs[level](map_)))
    while len(outputs) < len(self.feature_specs):
      outputs.append(outputs[-1][:, ::2, ::2])  # max-pool of kernel 1, stride 2
    return tuple(outputs)


def _pooled(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
  """The largest of every 2 x 2 cells; a row or column that is left over is pooled alone."""
  return nnx.max_pool(x, (2, 2), strides=(2, 2), padding="SAME")
