"""NAS-FPN (Ghiasi et al., arXiv 1904.07392), as TensorFlow's Model Garden releases it.

That is the decoder of "Proper Reuse of Image Classification Features Improves Object Detection" (arXiv
2204.00484): on a frozen classifier it is what has to learn, and it is where freezing begins to help.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.layers import norms
from frozen_vision.layers.activations import ACTIVATIONS
from frozen_vision.layers.convolution import BatchNorm, MapConv
from frozen_vision.necks.base import Neck
from frozen_vision.necks.fpn import resize_nearest
from frozen_vision.ops import convolution as conv_ops
from frozen_vision.ops.arrays import Array

Norm = Literal["batch", "group"]
Map = Float[Array, "b _h _w _c"]

_FINEST_STRIDE = 8
_LEVELS = 5
_GROUPS = 32
_EPSILON, _MOMENTUM = 1e-4, 1 - 0.997  # of the BatchNorms in 2204.00484's release
_HE = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class Node(NamedTuple):
  """One of the seven nodes that the search has found.

  Attributes:
    level: 0 for stride 8 to 4 for stride 128.
    combine: "sum", or "attention": the coarser input plus the finer one times a gate per channel.
    inputs: two earlier nodes; 0 to 4 are the levels that come in.
    more: earlier nodes of the same level that nothing else uses, which are added.
  """

  level: int
  combine: Literal["sum", "attention"]
  inputs: tuple[int, int]
  more: tuple[int, ...] = ()


# Node i of this list is number 5 + i; the last five are the outputs.
NODES = (
  Node(1, "attention", (1, 3)),
  Node(1, "sum", (1, 5)),
  Node(0, "sum", (0, 6)),
  Node(1, "sum", (6, 7)),
  Node(2, "attention", (7, 8), (2,)),
  Node(4, "attention", (6, 9), (4,)),
  Node(3, "attention", (9, 10)),
)


def global_max(x: Map) -> Float[Array, "b 1 1 _c"]:
  """The maximum of a map per channel.

  The gradient of `jnp.max` divides by the number of cells that equal the maximum, which is none where a
  program computes the map twice and rounds it in two ways: 0 / 0. This one selects a cell.
  """
  return nnx.max_pool(x, x.shape[1:3])


class NASFPNBlock(nnx.Module):
  """One repeat: seven nodes on five maps that all have `channels` channels."""

  def __init__(
    self,
    channels: int,
    *,
    activation: Callable[[jax.Array], jax.Array],
    norm: Callable[[], nnx.Module],
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    self.activation = activation
    self.convs = nnx.List(
      [MapConv(channels, channels, (3, 3), dtype=dtype, kernel_init=_HE, rngs=rngs) for _ in NODES]
    )
    self.norms = nnx.List([norm() for _ in NODES])

  def __call__(self, maps: Sequence[Map]) -> list[jax.Array]:
    sizes = [x.shape[1:3] for x in maps]
    levels = list(range(_LEVELS))
    nodes: list[jax.Array] = list(maps)

    def resized(number: int, level: int) -> jax.Array:
      if levels[number] < level:
        factor = 2 ** (level - levels[number])
        return conv_ops.max_pool(nodes[number], size=factor, strides=factor, padding="SAME")
      return resize_nearest(nodes[number], sizes[level])

    for node, conv, norm in zip(NODES, self.convs, self.norms, strict=True):
      first, second = node.inputs
      if node.combine == "attention" and levels[first] < levels[second]:
        first, second = second, first
      x, other = resized(first, node.level), resized(second, node.level)
      if node.combine == "attention":
        other = other * nnx.sigmoid(global_max(nodes[first]))  # resizing keeps the maximum
      x = sum((nodes[number] for number in node.more), x + other)
      nodes.append(norm(conv(self.activation(x))))
      levels.append(node.level)
    outputs = dict(zip(levels[-_LEVELS:], nodes[-_LEVELS:], strict=True))
    return [outputs[level] for level in range(_LEVELS)]


class NASFPN(Neck):
  """Repeats of the searched block on levels of strides 8 to 128.

  Backbone levels finer than stride 8 are not read. Levels beyond the backbone's are its last one, max-pooled.

  Attributes:
    feature_specs: specs of the outputs, strides 8 to 128; all have `channels` channels.
  """

  def __init__(
    self,
    feature_specs: Sequence[FeatureSpec],
    channels: int = 256,
    *,
    repeats: int = 5,
    norm: Norm = "batch",
    activation: str = "relu",
    input_norm: bool = False,
    attention_heads: int = 0,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Builds the neck.

    Args:
      feature_specs: levels of the backbone, fine to coarse, each half as large as the one before; one has
        stride 8.
      channels: channels of every output level.
      repeats: blocks in a row; the paper of the neck has 7, the release of 2204.00484 has 5.
      norm: "batch" as released, over the whole batch of all devices; "group" (32 groups) where a device batch
        says little.
      activation: "relu", or "swish" as in the release's Faster R-CNNs.
      input_norm, attention_heads: of the input stage, see `Neck`; the reference has neither.
      dtype: dtype of the computation; parameters and norm statistics are float32.
      rngs: for the weights.

    Raises:
      ValueError: levels that are not those of a pyramid through stride 8, no repeats, an unknown norm or
        activation, or channels that 32 groups do not divide.
    """
    used = tuple(spec for spec in feature_specs if spec.stride >= _FINEST_STRIDE)
    strides = [_FINEST_STRIDE * 2**level for level in range(_LEVELS)]
    found = [spec.stride for spec in used]
    if not found or found != strides[: len(found)]:
      raise ValueError(
        f"NASFPN: backbone levels have strides {[spec.stride for spec in feature_specs]}; expected some of "
        f"{strides}, from {_FINEST_STRIDE} on. A plain ViT needs a simple_pyramid first."
      )
    if repeats < 1:
      raise ValueError(f"NASFPN: repeats={repeats}; expected at least 1.")
    if activation not in ACTIVATIONS:
      raise ValueError(f"NASFPN: activation is {activation!r}; known: {', '.join(ACTIVATIONS)}.")
    if norm not in ("batch", "group"):
      raise ValueError(f"NASFPN: norm is {norm!r}; known: batch, group.")
    if norm == "group" and channels % _GROUPS:
      raise ValueError(
        f"NASFPN: {channels} channels do not divide into {_GROUPS} groups; give a multiple of {_GROUPS}, or "
        "norm='batch'."
      )
    super().__init__(used, input_norm=input_norm, attention_heads=attention_heads, dtype=dtype, rngs=rngs)
    self.unused = len(feature_specs) - len(used)
    self.feature_specs = tuple(FeatureSpec(stride, channels) for stride in strides)

    def make_norm() -> nnx.Module:
      if norm == "batch":
        return BatchNorm(channels, epsilon=_EPSILON, momentum=_MOMENTUM, rngs=rngs)
      return norms.group_norm(channels, _GROUPS, dtype=dtype, rngs=rngs)

    # None where a level has the right number of channels already, as in the reference.
    self.laterals = nnx.List(
      [
        nnx.Linear(spec.channels, channels, dtype=dtype, kernel_init=_HE, rngs=rngs)
        if spec.channels != channels
        else None
        for spec in used
      ]
    )
    self.lateral_norms = nnx.List([None if layer is None else make_norm() for layer in self.laterals])
    self.blocks = nnx.List(
      [
        NASFPNBlock(channels, activation=ACTIVATIONS[activation], norm=make_norm, dtype=dtype, rngs=rngs)
        for _ in range(repeats)
      ]
    )

  def __call__(self, features: Sequence[Map]) -> tuple[Float[Array, "b _h _w d"], ...]:
    """Backbone levels, fine to coarse -> five pyramid levels in `dtype`.

    Raises:
      ValueError: a number of levels or channels other than `feature_specs` announced.
    """
    maps = self.inputs(features[self.unused :])
    maps = [
      x if layer is None else norm(layer(x))
      for x, layer, norm in zip(maps, self.laterals, self.lateral_norms, strict=True)
    ]
    while len(maps) < _LEVELS:
      maps.append(conv_ops.max_pool(maps[-1], size=2, strides=2, padding="SAME"))
    for block in self.blocks:
      maps = block(maps)
    return tuple(maps)
