"""How backbones begin that SimMIM and feature distillation train from scratch, by their released code."""

import math
import re

from flax import nnx
import jax
import jax.numpy as jnp

from frozen_vision.backbones import base
from frozen_vision.backbones.vit import model as vit
from frozen_vision.files import trees

_STD = 0.02
_LAST_LAYERS = re.compile(r".*/(attn/proj|mlp/fc2|mlp/down)/kernel")


def rescaled(backbone: base.Backbone, seed: int) -> base.Backbone:
  """A backbone as the ViTs of SimMIM, and all students of feature distillation, begin.

  github.com/microsoft/SimMIM and github.com/SwinTransformer/Feature-Distillation; both follow BEiT. In every
  block the last matrices of attention and MLP are divided by sqrt(2 l), l = 1 for the first block of the
  network. What a plain ViT draws comes from a normal distribution of standard deviation 0.02 that is cut off
  at one standard deviation. Constants (biases, norms, LayerScale) stay.

  Args:
    backbone: with initial weights. It is not changed.
    seed: of the numbers that are drawn anew.
  """
  graphdef, parameters, rest = nnx.split(backbone, nnx.Param, ...)
  key = jax.random.key(seed)
  changed = []
  for number, (path, variable) in enumerate(nnx.to_flat_state(parameters)):
    name, value = trees.path_string(path), variable.get_value()
    if isinstance(backbone, vit.ViT) and _is_drawn(name):
      draw = jax.random.truncated_normal(jax.random.fold_in(key, number), -1.0, 1.0, value.shape)
      value = (_STD * draw).astype(value.dtype)
    if _LAST_LAYERS.fullmatch(name):
      value = value / math.sqrt(2 * backbone.depth_of(name))
    changed.append((path, variable.replace(jnp.asarray(value))))
  return nnx.merge(graphdef, nnx.from_flat_state(changed), rest)


def _is_drawn(name: str) -> bool:
  """Whether a plain ViT draws the parameter at random: matrices, tokens and tables of positions."""
  last = name.rpartition("/")[2]
  return last in ("kernel", "cls_token", "registers", "positions", "probe")
