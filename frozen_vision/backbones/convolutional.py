"""Shared base of backbones of a stem, stages of named convolutions, and perhaps a last convolution.

A config says which convolutions a stem and a block consist of, and what they compute; the canonical module
and its folded program are made from it alone. ResNet and EfficientNet are such configs.
"""

import abc
from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from frozen_vision.backbones import base
from frozen_vision.devices import sharding
from frozen_vision.layers import adapters, convolution
from frozen_vision.layers import storage as stored
from frozen_vision.layers.convolution import Convolutions, ConvSpec, Stage
from frozen_vision.layers.residual import drop_path
from frozen_vision.ops.arrays import Array

Tree = Any
# A convolution of a stem or a block by its name, as a function of a map.
Layers = Callable[[str, Array], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvConfig(base.BackboneConfig):
  """Shape of a convolutional backbone.

  Attributes:
    same_padding: pad as TensorFlow's "SAME" does, which at stride 2 is not symmetric; else by half the
      kernel on every side, as PyTorch's models do.
    norm_epsilon: of every BatchNorm.
    drop_path_rate: stochastic depth of the last block, growing linearly from 0; used only with `rng`.
    finest_stride: 4, or 2 to have the map at stride 2 as a level of its own.
    mean, std: of RGB values in 0..1 that the weights expect.
    norm_momentum: weight of a new batch in the running statistics, as PyTorch counts it.
  """

  same_padding: bool = False
  norm_epsilon: float = 1e-5
  drop_path_rate: float = 0.0
  finest_stride: int = 4
  mean: tuple[float, float, float] = base.IMAGENET_MEAN
  std: tuple[float, float, float] = base.IMAGENET_STD

  norm_momentum: ClassVar[float] = 0.1
  weightless: ClassVar[tuple[str, ...]] = (
    "same_padding",
    "norm_epsilon",
    "drop_path_rate",
    "finest_stride",
    "mean",
    "std",
  )

  def __post_init__(self):
    if self.finest_stride not in (2, 4):
      raise ValueError(f"{type(self).__name__}.finest_stride is {self.finest_stride}; expected 2 or 4.")

  @property
  @abc.abstractmethod
  def levels(self) -> tuple[int, ...]:
    """The stages whose outputs are feature levels."""

  @property
  def stem_is_a_level(self) -> bool:
    """Whether the stem's map is the finest level."""
    return False

  @abc.abstractmethod
  def stage_depths(self) -> tuple[int, ...]:
    """Blocks per stage."""

  @abc.abstractmethod
  def stem(self) -> dict[str, ConvSpec]:
    """The convolutions before the first stage by name."""

  @abc.abstractmethod
  def block(self, stage: int, index: int) -> dict[str, ConvSpec]:
    """The convolutions of a block by name; those from the second of a stage on are alike."""

  def head(self) -> dict[str, ConvSpec]:
    """The convolutions between the last map and the embedding by name."""
    return {}

  @abc.abstractmethod
  def run_stem(
    self, images: Float[Array, "b h w 3"], layers: Layers
  ) -> tuple[Float[Array, "b _h _w _c"], Float[Array, "b _h2 _w2 _c2"]]:
    """(the stem's map at stride 2, the map that the first stage starts from)."""

  @abc.abstractmethod
  def run_block(
    self,
    x: Float[Array, "b _h _w _c"],
    layers: Layers,
    specs: Mapping[str, ConvSpec],
    drop: Callable[[Array], Array],
  ) -> Float[Array, "b _h2 _w2 _c2"]:
    """A residual block.

    Args:
      specs: `block` of it.
      drop: what stochastic depth makes of the residual branch.
    """

  def run_head(self, x: Float[Array, "b h w _c"], layers: Layers) -> Float[Array, "b h w _d"]:
    """The map whose mean is the embedding."""
    del layers
    return x

  def run(
    self,
    images: Float[Array, "b h w 3"],
    stem: Layers,
    run_stage: Callable[[int, Array], Array],
  ) -> tuple[Float[Array, "b _h _w _c"], ...]:
    """Features of every level, given what runs a stage."""
    fine, x = self.run_stem(images, stem)
    features = [fine] if self.stem_is_a_level else []
    for index in range(len(self.stage_depths())):
      x = run_stage(index, x)
      if index in self.levels:
        features.append(x)
    return tuple(features)


class ConvBackbone(base.Backbone):
  """A convolutional backbone without its classifier; `embed` is the mean of the last map."""

  def __init__(self, config: ConvConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
    self.config = config
    self.dtype = dtype
    self.preprocessing = base.Preprocessing(config.mean, config.std)

    def convolutions(specs: Mapping[str, ConvSpec], drop_path: float = 0.0) -> Convolutions:
      return Convolutions(
        specs,
        same=config.same_padding,
        epsilon=config.norm_epsilon,
        momentum=config.norm_momentum,
        drop_path=drop_path,
        dtype=dtype,
        rngs=rngs,
      )

    depths = config.stage_depths()
    rates = iter(np.linspace(0, config.drop_path_rate, sum(depths)).tolist())
    self.stem = convolutions(config.stem())
    self.stages = nnx.List(
      [
        Stage([convolutions(config.block(stage, index), next(rates)) for index in range(depth)])
        for stage, depth in enumerate(depths)
      ]
    )
    self.head = convolutions(config.head())

  def __call__(
    self, images: Float[Array, "b h w 3"], *, rng: jax.Array | None = None
  ) -> tuple[Float[Array, "b _h _w _c"], ...]:
    """Features of every level; see `Backbone.__call__`."""
    config = self.config
    starts = np.cumsum((0, *config.stage_depths())).tolist()

    def run_stage(index: int, x: Array) -> Array:
      for position, block in enumerate(self.stages[index].blocks):
        key = None if rng is None else jax.random.fold_in(rng, starts[index] + position)

        def drop(y: Array, key=key, block=block) -> Array:
          return drop_path(y, block.drop_path, key)

        x = config.run_block(x, block.layers(rng is None), config.block(index, position), drop)
      return x

    return config.run(images.astype(self.dtype), self.stem.layers(rng is None), run_stage)

  def embed(self, images: Float[Array, "b h w 3"], *, rng: jax.Array | None = None) -> Float[Array, "b d"]:
    """The mean of the last map, or of what the head makes of it."""
    x = self.config.run_head(self(images, rng=rng)[-1], self.head.layers(rng is None))
    return jnp.mean(x, axis=(1, 2))

  @property
  def num_depths(self) -> int:
    return sum(self.config.stage_depths()) + 1

  def depth_of(self, path: str) -> int:
    return base.staged_depth(path, self.config.stage_depths())

  def feature_options(self) -> Mapping[str, Any]:
    config = self.config
    return dict(padding="SAME" if config.same_padding else "symmetric", norm_epsilon=config.norm_epsilon)

  def fold(
    self,
    *,
    storage: str | None = None,
    dtype: Any = None,
    scan: bool = True,
    read: Callable[[str, nnx.Module], nnx.Module] | None = None,
    shardings: Any = None,
  ) -> "FoldedConvBackbone":
    store, read = stored.choose(storage, dtype, self.dtype), stored.reader(read)
    sharded = stored.values(shardings)
    stem, head = read("stem", self.stem).fold(store), read("head", self.head).fold(store)
    folded = FoldedConvBackbone(
      stem=stored.put(stem, sharded and sharded.stem),
      stages=convolution.fold_stages(
        self.stages, store, scan=scan, read=read, shardings=sharded and sharded.stages
      ),
      head=stored.put(head, sharded and sharded.head),
      **base.static_fields(self, dtype=store.dtype, storage=store.kind),
    )
    return stored.variables(folded)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FoldedConvBackbone(base.FoldedBackbone):
  """The inference program: BatchNorm multiplied into the convolutions, equal blocks scanned.

  Attributes:
    stem, head: their convolutions; `head` is what `embed` uses.
    stages: for each `first`, and what `storage.fold_blocks` makes of the blocks after it.
  """

  stem: Tree
  stages: tuple[Tree, ...]
  head: Tree

  def __call__(
    self, images: Float[Array, "b h w 3"], *, rng: jax.Array | None = None
  ) -> tuple[Float[Array, "b _h _w _c"], ...]:
    """Features of every level; see `Backbone.__call__`."""
    del rng
    config = self.config
    stem, stages = stored.arrays((self.stem, self.stages))

    def run_stage(index: int, x: Array) -> Array:
      stage = stages[index]
      first = dict(repeated=None, blocks=(stage["first"],))
      for blocks, specs in ((first, config.block(index, 0)), (stage, config.block(index, 1))):

        def block(x: Array, leaves: Tree, _: int, specs=specs) -> Array:
          return self._block(x, leaves, specs)

        x = stored.run_blocks(x, blocks, block, remat=self.remat)
      return x

    layers = self._layers(sharding.gathered(stem), config.stem())
    return config.run(images.astype(self.dtype), layers, run_stage)

  def embed(self, images: Float[Array, "b h w 3"], *, rng: jax.Array | None = None) -> Float[Array, "b d"]:
    """The mean of the last map, or of what the head makes of it."""
    layers = self._layers(sharding.gathered(stored.arrays(self.head)), self.config.head())
    return jnp.mean(self.config.run_head(self(images)[-1], layers), axis=(1, 2))

  def _block(self, x: Array, leaves: Tree, specs: Mapping[str, ConvSpec]) -> Array:
    y = self.config.run_block(x, self._layers(leaves, specs), specs, lambda branch: branch)
    return adapters.adapted(x, y, leaves)

  def block_shape(self, stage: int, index: int) -> base.BlockShape:
    first, others = (next(iter(self.config.block(stage, number).values())) for number in (index, 1))
    return base.BlockShape(first.inputs, others.inputs)

  def _layers(self, leaves: Tree, specs: Mapping[str, ConvSpec]) -> Layers:
    return convolution.folded(leaves, specs, same=self.config.same_padding)
