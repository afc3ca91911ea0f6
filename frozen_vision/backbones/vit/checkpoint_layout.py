"""The entries of a table of checkpoint names: transforms of arrays, and alternatives of names.

Every name of ours has one or more alternatives, each a tuple of names there and the transform of their
arrays. The first alternative that fits a checkpoint is taken; the others are of other families or years.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
import re

import numpy as np

from frozen_vision.backbones.vit.config import ViTConfig

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
  """How one of our arrays is made of the arrays of a checkpoint.

  Attributes:
    shapes: from our shape and the config to the shapes there.
    apply: from the arrays there to ours.
  """

  shapes: Callable[[Shape, ViTConfig], list[Shape]]
  apply: Callable[..., np.ndarray]


Alternative = tuple[tuple[str, ...], Transform]
Names = dict[str, tuple[Alternative, ...]]


def _reshaped(expected: Callable[[Shape], Shape], shape: Callable[[np.ndarray], Shape]) -> Transform:
  return Transform(lambda s, _: [expected(s)], lambda x: x.reshape(shape(x)))


SAME = Transform(lambda s, _: [s], lambda x: x)
LINEAR = Transform(lambda s, _: [s[::-1]], lambda x: x.T)  # PyTorch stores (out, in).
CONV = Transform(  # (c, 3, p, p), as the matrix product it is: rows ordered row, column, colour.
  lambda s, c: [(s[1], 3, c.patch_size, c.patch_size)],
  lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
)
CONV_HWIO = Transform(
  lambda s, c: [(c.patch_size, c.patch_size, 3, s[1])], lambda x: x.reshape(-1, x.shape[-1])
)
TOKEN = _reshaped(lambda s: (1, 1, *s), lambda x: (-1,))
TOKENS = _reshaped(lambda s: (1, *s), lambda x: x.shape[1:])
# timm's DINOv2 with registers has no position of the class token: it is added to the token.
PATCHES_ONLY = Transform(
  lambda s, _: [(1, s[0] - 1, s[1])], lambda x: np.pad(x[0], ((1, 0), (0, 0))).astype(x.dtype)
)
SPLIT_QKV = Transform(lambda s, _: [(s[0], s[0])] * 3, lambda *x: np.concatenate(x).T)


def third(index: int, *, of_matrix: bool = False) -> Transform:
  """One third of queries, keys and values that are stored as one."""
  if of_matrix:
    return Transform(lambda s, _: [(3 * s[1], s[0])], lambda x: np.split(x, 3)[index].T)
  return Transform(lambda s, _: [(3 * s[0],)], lambda x: np.split(x, 3)[index])


LAST_TWO_THIRDS = Transform(lambda s, _: [(3 * s[0], s[0])], lambda x: x[len(x) // 3 :].T)
LAST_TWO_THIRDS_BIAS = Transform(lambda s, _: [(3 * s[0] // 2,)], lambda x: x[len(x) // 3 :])


def half(index: int, *, of_matrix: bool) -> Transform:
  """One half of SwiGLU's two input layers that are stored as one."""
  if of_matrix:
    return Transform(lambda s, _: [(2 * s[1], s[0])], lambda x: np.split(x, 2)[index].T)
  return Transform(lambda s, _: [(2 * s[0],)], lambda x: np.split(x, 2)[index])


def merged(*tables: Names) -> Names:
  """Tables with the alternatives of equal names put one after the other."""
  result: Names = {}
  for table in tables:
    for name, alternatives in table.items():
      result[name] = result.get(name, ()) + alternatives
  return result


@dataclasses.dataclass(frozen=True)
class Layout:
  """Names of one kind of checkpoint.

  Attributes:
    marker: a name that only this layout has, below `prefix`.
    stem, block: our names, outside of the blocks and below a block.
    block_prefix: where block `{b}` lies.
    ignored: patterns of whole names (prefix included) that carry nothing a backbone needs.
    prefix: in front of all names of the image model.
  """

  name: str
  marker: str
  stem: Names
  block: Names
  block_prefix: str
  ignored: tuple[str, ...]
  prefix: str = ""

  def alternatives(self, ours: str) -> tuple[Alternative, ...]:
    """(their names, transform) of our leaf, preferred first; empty if the layout has no such leaf."""
    match = re.fullmatch(r"blocks/(\d+)/(.*)", ours)
    if match is None:
      names, place = self.stem.get(ours, ()), self.prefix
    else:
      names = self.block.get(match[2], ())
      place = self.prefix + self.block_prefix.format(b=match[1])
    return tuple((tuple(place + name for name in theirs), transform) for theirs, transform in names)

  def find(self, ours: str, keys: Mapping) -> Alternative | None:
    """The first alternative of which all names are in `keys`, or None."""
    return next((a for a in self.alternatives(ours) if all(name in keys for name in a[0])), None)


def num_blocks(layout: Layout, keys: Mapping) -> int:
  pattern = re.escape(layout.prefix + layout.block_prefix).replace(r"\{b\}", r"(\d+)")
  return 1 + max((int(found[1]) for found in (re.match(pattern, key) for key in keys) if found), default=-1)


def grid_of(positions: int, class_token: bool) -> int:
  """Cells per side of a table of so many positions, whether or not that of the class token is in it."""
  side = math.isqrt(positions - class_token)
  return side if side * side == positions - class_token else math.isqrt(positions)
