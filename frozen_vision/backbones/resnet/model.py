"""ResNet as Flax NNX modules; `architecture` has its sizes and what its blocks compute."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from frozen_vision.backbones import base
from frozen_vision.backbones.resnet import architecture, folded
from frozen_vision.backbones.resnet.architecture import ResNetConfig
from frozen_vision.layers.convolution import Convolutions, ConvSpec, Stage
from frozen_vision.layers.residual import drop_path
from frozen_vision.ops.arrays import Array


class ResNet(base.Backbone):
  """A ResNet without its classifier; calling it gives the output of every stage."""

  def __init__(self, config: ResNetConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
    self.config = config
    self.dtype = dtype
    self.preprocessing = base.Preprocessing(config.mean, config.std)

    def convolutions(specs: Mapping[str, ConvSpec], drop_path: float = 0.0) -> Convolutions:
      return Convolutions(
        specs,
        same=config.same_padding,
        epsilon=config.norm_epsilon,
        drop_path=drop_path,
        dtype=dtype,
        rngs=rngs,
      )

    self.stem = convolutions(config.stem())
    rates = iter(np.linspace(0, config.drop_path_rate, sum(config.depths)).tolist())
    self.stages = nnx.List(
      [
        Stage([convolutions(config.block(stage, index), next(rates)) for index in range(depth)])
        for stage, depth in enumerate(config.depths)
      ]
    )

  @property
  def embed_dim(self) -> int:
    return self.config.stage_channels(len(self.config.depths) - 1)

  def __call__(
    self, images: Float[Array, "b h w 3"], *, rng: jax.Array | None = None
  ) -> tuple[Float[Array, "b _h _w _c"], ...]:
    """Features of every level; see `Backbone.__call__`."""
    fine, x = architecture.run_stem(images.astype(self.dtype), self.stem.run, self.config)
    features = [fine] if self.config.finest_stride == 2 else []
    number = 0
    for index, stage in enumerate(self.stages):
      for position, block in enumerate(stage.blocks):
        key = None if rng is None else jax.random.fold_in(rng, number)
        x = architecture.run_block(
          x,
          block.run,
          self.config,
          self.config.block(index, position),
          lambda y, key=key, block=block: drop_path(y, block.drop_path, key),
        )
        number += 1
      features.append(x)
    return tuple(features)

  def embed(self, images: Float[Array, "b h w 3"], *, rng: jax.Array | None = None) -> Float[Array, "b d"]:
    """The last map, averaged over positions."""
    return jnp.mean(self(images, rng=rng)[-1], axis=(1, 2))

  @property
  def num_depths(self) -> int:
    return sum(self.config.depths) + 1

  def depth_of(self, path: str) -> int:
    return base.staged_depth(path, self.config.depths)

  def feature_options(self) -> Mapping[str, Any]:
    config = self.config
    return dict(
      padding="SAME" if config.same_padding else "symmetric",
      activation=config.activation,
      norm_epsilon=config.norm_epsilon,
    )

  def fold(
    self,
    *,
    storage: str | None = None,
    dtype: Any = None,
    scan: bool = True,
    read: Callable[[str, nnx.Module], nnx.Module] | None = None,
    shardings: folded.FoldedResNet | None = None,
  ) -> folded.FoldedResNet:
    return folded.fold(self, storage=storage, dtype=dtype, scan=scan, read=read, shardings=shardings)
