"""Mask head of one cascade stage, with mask information flow (HTC, Chen et al. 2019)."""

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from frozen_vision.heads.htc.config import HTCConfig
from frozen_vision.layers.activations import ACTIVATIONS
from frozen_vision.layers.convolution import MapConv
from frozen_vision.layers.upsampling import Deconv2x
from frozen_vision.ops.arrays import Array

_KAIMING = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class MaskHead(nnx.Module):
  """3x3 convolutions, an upsampling by 2, and one mask per class.

  With `flow`, the last features of the previous stage's mask head enter through a 1x1 convolution.
  """

  def __init__(self, channels: int, config: HTCConfig, *, flow: bool, dtype: DTypeLike, rngs: nnx.Rngs):
    width = config.mask_channels
    sizes = [channels] + [width] * config.mask_convs

    def conv(i, o):
      return MapConv(i, o, (3, 3), dtype=dtype, kernel_init=_KAIMING, rngs=rngs)

    self.convs = nnx.List([conv(i, o) for i, o in zip(sizes[:-1], sizes[1:])])
    # It is added to this head's input, hence the output width. The reference needs mask_channels ==
    # channels.
    self.flow = nnx.Linear(width, channels, dtype=dtype, kernel_init=_KAIMING, rngs=rngs) if flow else None
    self.upsample = Deconv2x(sizes[-1], width, dtype=dtype, rngs=rngs)
    self.logits = nnx.Linear(width, config.num_classes, dtype=dtype, kernel_init=_KAIMING, rngs=rngs)
    self.dtype = dtype
    self.activation = ACTIVATIONS[config.activation]

  def features(
    self, x: Float[Array, "n h w c"], previous: Float[Array, "n h w d"] | None = None
  ) -> Float[Array, "n h w d"]:
    """Roi features (and the features of the stage before) -> features before the upsampling."""
    if previous is not None:
      if self.flow is None:
        raise ValueError("MaskHead got features of a previous stage but was built without `flow`.")
      x = x + self.activation(self.flow(previous))
    for conv in self.convs:
      x = self.activation(conv(x))
    return x

  def predict(
    self, x: Float[Array, "n h w d"], labels: Int[Array, "n"] | None = None
  ) -> Float[Array, "n h*2 w*2"] | Float[Array, "n h*2 w*2 k"]:
    """Features -> float32 logits of the class `labels`, or of all classes (last axis) if None.

    With labels only the wanted class is computed, which saves the memory of all the others.
    """
    x = self.activation(self.upsample(x))
    if labels is None:
      return self.logits(x).astype(jnp.float32)
    kernel = jnp.asarray(self.logits.kernel[...], self.dtype)[:, labels]
    logits = jnp.einsum("nhwc,cn->nhw", x, kernel, preferred_element_type=jnp.float32)
    return logits + self.logits.bias[...][labels][:, None, None]


def mask_flow(
  heads: "nnx.List[MaskHead]", stage: int, x: Float[Array, "n h w c"], flow: bool
) -> list[jax.Array]:
  """Features of the mask heads up to `stage` on one set of rois, each fed by the last if `flow`."""
  features, previous = [], None
  for head in heads[: stage + 1]:
    previous = head.features(x, previous if flow else None)
    features.append(previous)
  return features
