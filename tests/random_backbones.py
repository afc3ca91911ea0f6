"""Small backbones with weights that NumPy draws: initialisers would compile a program for every shape."""

from typing import Any
import zlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from frozen_vision.backbones import base, families
from frozen_vision.files import trees


def build(name: str, *, seed: int = 0, **overrides: Any) -> base.Backbone:
  """A row of `families.variants` with fields replaced, and random weights."""
  return fill(families.abstract_backbone(name, **overrides), seed)


def fold(backbone: base.Backbone, **options: Any) -> base.FoldedBackbone:
  """`Backbone.fold` as one compiled program; eagerly every shape of a weight compiles programs of its own."""
  return jax.jit(lambda backbone: backbone.fold(**options))(backbone)


def fill(module: nnx.Module, seed: int = 0) -> nnx.Module:
  """A module of shapes with values for all its variables, each drawn by its path.

  Matrices keep the variance of what they multiply and kernels of convolutions double it (He et al. 2015),
  since half of it is lost after them; scales and variances are near 1, all others near 0.
  """
  graphdef, state = nnx.split(module)
  flat = [(path, leaf.replace(_draw(path, leaf, seed))) for path, leaf in nnx.to_flat_state(state)]
  return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _draw(path: tuple, leaf: nnx.Variable, seed: int) -> jnp.ndarray:
  rng = np.random.default_rng([seed, zlib.crc32(trees.path_string(path).encode())])
  values = rng.standard_normal(leaf.shape)
  if path[-1] == "kernel":
    gain = 2 if values.ndim == 4 else 1
    values *= np.sqrt(gain / np.prod(leaf.shape[:-1]))
  elif path[-1] in ("scale", "var"):
    values = np.exp(0.1 * values)
  else:
    values *= 0.1
  return jnp.asarray(values, leaf.dtype)
