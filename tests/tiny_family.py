"""A convolutional family with BatchNorm that the package does not know: all that a new family costs."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from frozen_vision.backbones import base, families
from frozen_vision.layers import storage as stored


@dataclasses.dataclass(frozen=True)
class TinyConfig(base.BackboneConfig):
  channels: tuple[int, ...] = (8, 8, 16, 16)
  depth: int = 3  # layers per stage; the first one has the stage's stride
  slope: float = 0.1  # of the activation, for negative numbers
  weightless = ("slope",)
  feature_specs = property(lambda c: tuple(base.FeatureSpec(4 * 2**i, n) for i, n in enumerate(c.channels)))


def run(stages, layer, x, slope):
  maps = []
  for i, (first, *rest) in enumerate(stages):
    x = jax.nn.leaky_relu(layer(first, x, 2 if i else 4), slope)
    for one in rest:
      x = x + jax.nn.leaky_relu(layer(one, x, 1), slope)
    maps.append(x)
  return tuple(maps)


class Layer(nnx.Module):
  def __init__(self, inputs: int, outputs: int, strides: int, *, dtype, rngs: nnx.Rngs):
    self.conv = nnx.Conv(inputs, outputs, (3, 3), strides=strides, dtype=dtype, rngs=rngs)
    self.norm = nnx.BatchNorm(outputs, rngs=rngs)


class Tiny(base.Backbone):
  def __init__(self, config: TinyConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
    self.config, self.dtype = config, dtype
    self.stages = nnx.List()
    for i, (inputs, count) in enumerate(zip((3, *config.channels), config.channels)):
      sizes = [(inputs, 2 if i else 4)] + [(count, 1)] * (config.depth - 1)
      self.stages.append(nnx.List([Layer(n, count, s, dtype=dtype, rngs=rngs) for n, s in sizes]))

  num_depths = property(lambda self: len(self.config.channels))

  def __call__(self, images, *, rng=None):
    still, images = True if rng is None else None, images.astype(self.dtype)
    return run(self.stages, lambda y, x, _: y.norm(y.conv(x), still), images, self.config.slope)

  def depth_of(self, path):
    return int(path.split("/")[1])

  def feature_options(self):
    return dict(slope=self.config.slope)

  def fold(self, *, storage=None, dtype=None, scan=True, read=None, shardings=None):
    store, where = stored.choose(storage, dtype, self.dtype), stored.values(shardings)

    def fold_layer(i, n, layer):
      layer = stored.reader(read)(f"stages/{i}/{n}", layer)
      return stored.put(store.normed(layer.conv, layer.norm), where and where.stages[i][n])

    stages = [[fold_layer(i, n, x) for n, x in enumerate(layers)] for i, layers in enumerate(self.stages)]
    static = base.static_fields(self, dtype=store.dtype, storage=store.kind)
    return stored.variables(FoldedTiny(stages=stages, **static))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FoldedTiny(base.FoldedBackbone):
  stages: list

  def __call__(self, images, *, rng=None):
    stages, images = stored.arrays(self.stages), images.astype(self.dtype)
    return run(stages, lambda y, x, s: stored.convolution(x, y, strides=s), images, self.config.slope)


FAMILY = families.Family(variants={"tiny_conv": TinyConfig()}, config=TinyConfig, module=Tiny)
