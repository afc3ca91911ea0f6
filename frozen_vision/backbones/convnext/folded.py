"""A frozen ConvNeXt as an inference program: LayerScale in the weights before it, blocks scanned."""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float

from frozen_vision.backbones import base
from frozen_vision.backbones.convnext import architecture
from frozen_vision.backbones.convnext.architecture import NORM_EPSILON
from frozen_vision.devices import sharding
from frozen_vision.layers import adapters, convolution, patches
from frozen_vision.layers import storage as stored
from frozen_vision.layers.mlp import gelu
from frozen_vision.ops.arrays import Array

Tree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FoldedConvNeXt(base.FoldedBackbone):
  """The inference program that `fold` makes.

  Attributes:
    stages: for each `downsample` and what `storage.fold_blocks` makes of its blocks.
    norm: that of `embed`.
  """

  stages: tuple[Tree, ...]
  norm: Tree

  def __call__(
    self, images: Float[Array, "b h w 3"], *, rng: jax.Array | None = None
  ) -> tuple[Float[Array, "b _h _w _c"], ...]:
    """Features of every stage; see `Backbone.__call__`."""
    del rng
    x = patches.pad_to_multiple(images.astype(self.dtype), self.feature_specs[-1].stride)
    features = []
    for index, stage in enumerate(stored.arrays(self.stages)):
      down = sharding.gathered(stage["downsample"])
      if index:
        x = _norm(x, down["norm"])
      x = stored.linear(patches.patches(x, 2 if index else 4), down["proj"])
      if not index:
        x = _norm(x, down["norm"])
      spec = self.config.depthwise(index)

      def block(x: Array, leaves: Tree, _: int, spec=spec) -> Array:
        return adapters.adapted(x, _block(x, leaves, spec), leaves)

      x = stored.run_blocks(x, stage, block, remat=self.remat)
      features.append(x)
    return architecture.cropped(features, images.shape[1:3], self.feature_specs)

  def block_shape(self, stage: int, index: int) -> base.BlockShape:
    del index
    channels = self.config.depthwise(stage).inputs
    return base.BlockShape(channels, channels)

  def embed(self, images: Float[Array, "b h w 3"], *, rng: jax.Array | None = None) -> Float[Array, "b d"]:
    """The last map, averaged over positions, after the final norm."""
    del rng
    return _norm(jnp.mean(self(images)[-1], axis=(1, 2)), stored.arrays(self.norm))

  def final_features(self, images: Float[Array, "b h w 3"]) -> base.FinalFeatures:
    """The last map, normed at each position."""
    return base.FinalFeatures(_norm(self(images)[-1], stored.arrays(self.norm)))


def fold(
  backbone: base.Backbone,
  *,
  storage: str | None,
  dtype: Any,
  scan: bool,
  read: Callable[[str, nnx.Module], nnx.Module] | None,
  shardings: FoldedConvNeXt | None,
) -> FoldedConvNeXt:
  """The program of a ConvNeXt; see `Backbone.fold`."""
  store, read = stored.choose(storage, dtype, backbone.dtype), stored.reader(read)
  leaf_shardings = stored.values(shardings)
  stages = []
  for index, stage in enumerate(backbone.stages):
    sharded = leaf_shardings and leaf_shardings.stages[index]

    def fold_block(number, index=index, blocks=stage.blocks):
      return _fold_block(read(f"stages/{index}/blocks/{number}", blocks[number]), store)

    down = read(f"stages/{index}/downsample", stage.downsample)
    down = dict(proj=store.module(down.proj), norm=stored.norm_leaves(down.norm))
    stages.append(
      dict(
        downsample=stored.put(down, sharded and sharded["downsample"]),
        **stored.fold_blocks(len(stage.blocks), fold_block, scan=scan, shardings=sharded),
      )
    )
  norm = stored.norm_leaves(read("norm", backbone.norm))
  folded = FoldedConvNeXt(
    stages=tuple(stages),
    norm=stored.put(norm, leaf_shardings and leaf_shardings.norm),
    **base.static_fields(backbone, dtype=store.dtype, storage=store.kind),
  )
  return stored.variables(folded)


def _fold_block(module: nnx.Module, store: stored.Storage) -> Tree:
  scale, fc2 = module.scale.scale[...], module.mlp.fc2
  return dict(
    depthwise=convolution.fold(module.depthwise, store),
    norm=stored.norm_leaves(module.norm),
    fc1=store.module(module.mlp.fc1),
    fc2=store.layer(fc2.kernel[...] * scale, fc2.bias[...] * scale),
  )


def _block(x: Float[Array, "b h w c"], leaves: Tree, spec: convolution.ConvSpec) -> Float[Array, "b h w c"]:
  y = _norm(convolution.run(x, leaves["depthwise"], spec, same=False), leaves["norm"])
  return x + stored.linear(gelu(stored.linear(y, leaves["fc1"])), leaves["fc2"])


def _norm(x: Float[Array, "... c"], leaves: Tree) -> Float[Array, "... c"]:
  return stored.norm(x, leaves, NORM_EPSILON)
