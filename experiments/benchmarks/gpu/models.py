"""Frozen backbones with random weights, drawn on the device: nothing is read and nothing is copied to it."""

import dataclasses
import functools
import math
from typing import Any
import zlib

from flax import nnx
import jax
import jax.numpy as jnp

from frozen_vision.backbones import families
from frozen_vision.files import trees

# What stands for every backbone of a family with --tiny.
_TOYS = {
  "swinv2": dict(embed_dim=8, depths=(2, 1, 1, 1), num_heads=(1, 2, 4, 8)),
  "vit": dict(embed_dim=32, depth=4, num_heads=2, mlp_dim=64),
  "resnet": dict(width=8, depths=(1, 1, 1, 1)),
}


@dataclasses.dataclass(frozen=True)
class Backbone:
  """A backbone as one measurement takes it.

  Attributes:
    name: row of the table of variants.
    options: what differs from the row.
  """

  name: str
  options: tuple[tuple[str, Any], ...] = ()

  def shapes(self, *, tiny: bool) -> Any:
    """The module with shapes in the place of weights; its matrix products are bfloat16."""
    options = dict(self.options)
    if tiny:
      options |= next(_TOYS[key] for key, row in families.FAMILIES.items() if self.name in row.variants)
    return families.abstract_backbone(self.name, dtype=jnp.bfloat16, **options)

  def folded(self, *, tiny: bool, storage: str = "bfloat16") -> Any:
    """The inference program, made block by block: float32 weights of one block exist at a time."""
    return self.shapes(tiny=tiny).fold(storage=storage, read=random_weights)

  def unfolded(self, *, tiny: bool) -> Any:
    """The module that trains, with float32 weights."""
    return random_weights("", self.shapes(tiny=tiny))


def swinv2(name: str, windows: tuple[int, ...], pretrained: tuple[int, ...] = (0, 0, 0, 0)) -> Backbone:
  """A SwinV2 whose blocks do something, unlike those of an untrained one.

  Args:
    windows: window side of every stage.
    pretrained: windows that position coordinates are normalised by; 0: the window in use.
  """
  options = dict(window_sizes=windows, pretrained_window_sizes=pretrained, residual_norm_init=1.0)
  return Backbone(name, tuple(options.items()))


def for_detection(name: str, *, tiny: bool) -> Backbone:
  """As `configs/coco_htc.py` has it: window 32, pretrained with 12 at 192 px."""
  return swinv2(name, (4, 4, 4, 2)) if tiny else swinv2(name, (32, 32, 32, 32), (12, 12, 12, 6))


def random_weights(path: str, module: nnx.Module) -> nnx.Module:
  """A module with shapes in the place of weights, as the same module with random float32 weights.

  Kernels are normal with the variance of one over their inputs, scales and variances one, other vectors zero:
  activations keep their size however deep the network is.
  """
  graphdef, state = nnx.split(module)
  flat = nnx.to_flat_state(state)
  shapes = tuple((trees.path_string(name), tuple(variable.get_value().shape)) for name, variable in flat)
  drawn = _drawer(shapes)(jax.random.key(zlib.crc32(path.encode())))
  filled = [(name, variable.replace(leaf)) for (name, variable), leaf in zip(flat, drawn, strict=True)]
  return nnx.merge(graphdef, nnx.from_flat_state(filled))


@functools.cache
def _drawer(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> Any:
  """One compiled program for all parts of a network that have these paths and shapes."""

  def draw(key: jax.Array) -> list[jax.Array]:
    leaves = []
    for index, (path, shape) in enumerate(shapes):
      if path.endswith("logit_scale"):
        leaves.append(jnp.full(shape, math.log(10.0)))
      elif len(shape) < 2:
        leaves.append(jnp.full(shape, float(path.endswith(("scale", "var")))))
      else:
        normal = jax.random.normal(jax.random.fold_in(key, index), shape)
        leaves.append(normal * math.prod(shape[:-1]) ** -0.5)
    return leaves

  return jax.jit(draw)


def initialised(make: Any) -> Any:
  """The module that `make()` builds, its weights initialised by one compiled program."""
  graphdef, _ = nnx.split(nnx.eval_shape(make))
  return nnx.merge(graphdef, jax.jit(lambda: nnx.split(make())[1])())


def image_shape(batch: int, side: int) -> jax.ShapeDtypeStruct:
  """Shape and dtype of `random_images`, to compile for."""
  return jax.ShapeDtypeStruct((batch, side, side, 3), jnp.bfloat16)


def random_images(batch: int, side: int) -> jax.Array:
  """[b, side, side, 3] of normal numbers, as images are after normalisation."""
  return jax.random.normal(jax.random.key(0), (batch, side, side, 3), jnp.bfloat16)
