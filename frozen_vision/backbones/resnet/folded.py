"""A frozen ResNet as an inference program: BatchNorm in the convolutions, equal blocks scanned."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float

from frozen_vision.backbones import base
from frozen_vision.backbones.resnet import architecture
from frozen_vision.devices import sharding
from frozen_vision.layers import convolution
from frozen_vision.layers import storage as stored
from frozen_vision.layers.convolution import ConvSpec
from frozen_vision.ops.arrays import Array

Tree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FoldedResNet(base.FoldedBackbone):
  """What `fold` makes.

  Attributes:
    stem: its convolutions.
    stages: for each `first`, the block with the shortcut, and what `storage.fold_blocks` makes of the others.
  """

  stem: Tree
  stages: tuple[Tree, ...]

  def __call__(self, images: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b _h _w _c"], ...]:
    """Features of every level; see `Backbone.__call__`."""
    config = self.config
    stem, stages = stored.arrays((self.stem, self.stages))
    layers = self._layers(sharding.gathered(stem), config.stem())
    fine, x = architecture.run_stem(images.astype(self.dtype), layers, config)
    features = [fine] if config.finest_stride == 2 else []
    for index, stage in enumerate(stages):
      x = self._block(x, sharding.gathered(stage["first"]), config.block(index, 0))
      specs = config.block(index, 1)
      x = stored.run_blocks(x, stage, lambda x, leaves, _, specs=specs: self._block(x, leaves, specs))
      features.append(x)
    return tuple(features)

  def embed(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
    """The last map, averaged over positions."""
    return jnp.mean(self(images)[-1], axis=(1, 2))

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
  shardings: FoldedResNet | None,
) -> FoldedResNet:
  """The program of a ResNet; see `Backbone.fold`."""
  store, read = stored.choose(storage, dtype, backbone.dtype), stored.reader(read)
  sharded = stored.values(shardings)
  stem = read("stem", backbone.stem).fold(store)
  folded = FoldedResNet(
    stem=stored.put(stem, sharded and sharded.stem),
    stages=convolution.fold_stages(
      backbone.stages, store, scan=scan, read=read, shardings=sharded and sharded.stages
    ),
    **base.static_fields(backbone, dtype=store.dtype, storage=store.kind),
  )
  return stored.variables(folded)
