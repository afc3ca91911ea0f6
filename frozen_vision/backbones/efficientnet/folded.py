"""A frozen EfficientNet as an inference program: BatchNorm in the convolutions, equal blocks scanned."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float

from frozen_vision.backbones import base
from frozen_vision.backbones.efficientnet import architecture
from frozen_vision.devices import sharding
from frozen_vision.layers import convolution
from frozen_vision.layers import storage as stored
from frozen_vision.layers.convolution import ConvSpec
from frozen_vision.ops.arrays import Array

Tree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FoldedEfficientNet(base.FoldedBackbone):
  """What `fold` makes.

  Attributes:
    stem, head: their convolutions; `head` is what `embed` uses.
    stages: for each `first`, and what `storage.fold_blocks` makes of the blocks after it.
  """

  stem: Tree
  stages: tuple[Tree, ...]
  head: Tree

  def __call__(self, images: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b _h _w _c"], ...]:
    """Features of every level; see `Backbone.__call__`."""
    config = self.config
    stem, stages = stored.arrays((self.stem, self.stages))
    layers = self._layers(sharding.gathered(stem), config.stem())
    x = convolution.activation(config.activation)(layers("conv", images.astype(self.dtype)))
    features = []
    for index, stage in enumerate(stages):
      x = self._block(x, sharding.gathered(stage["first"]), config.block(index, 0))
      specs = config.block(index, 1)
      x = stored.run_blocks(x, stage, lambda x, leaves, _, specs=specs: self._block(x, leaves, specs))
      if index in config.levels:
        features.append(x)
    return tuple(features)

  def embed(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
    """The last convolution's output, averaged over positions."""
    layers = self._layers(sharding.gathered(stored.arrays(self.head)), self.config.head())
    x = layers("conv", self(images)[-1])
    return jnp.mean(convolution.activation(self.config.activation)(x), axis=(1, 2))

  def _block(self, x: Array, leaves: Tree, specs: Mapping[str, ConvSpec]) -> Array:
    return architecture.run_block(x, self._layers(leaves, specs), self.config, specs)

  def _layers(self, leaves: Tree, specs: Mapping[str, ConvSpec]) -> architecture.Layers:
    return convolution.folded(leaves, specs, same=self.config.same_padding)


def fold(
  backbone: base.Backbone,
  *,
  storage: str | None,
  dtype: Any,
  scan: bool,
  read: Callable[[str, nnx.Module], nnx.Module] | None,
  shardings: FoldedEfficientNet | None,
) -> FoldedEfficientNet:
  """The program of an EfficientNet; see `Backbone.fold`."""
  store, read = stored.choose(storage, dtype, backbone.dtype), stored.reader(read)
  sharded = stored.values(shardings)
  stem, head = read("stem", backbone.stem).fold(store), read("head", backbone.head).fold(store)
  folded = FoldedEfficientNet(
    stem=stored.put(stem, sharded and sharded.stem),
    stages=convolution.fold_stages(
      backbone.stages, store, scan=scan, read=read, shardings=sharded and sharded.stages
    ),
    head=stored.put(head, sharded and sharded.head),
    **base.static_fields(backbone, dtype=store.dtype, storage=store.kind),
  )
  return stored.variables(folded)
