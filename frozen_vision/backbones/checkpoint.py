"""Public checkpoints of a backbone as our variables: every key is used or named as ignored."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import pathlib
import re

from flax import nnx
import numpy as np

from frozen_vision.backbones import base
from frozen_vision.files import keys, trees
from frozen_vision.files import tensors as tensors_lib
from frozen_vision.files.tensors import LazyTensor

# Gives the name that a public checkpoint has for one of our variables, by its path.
Naming = Callable[[str], str]
# Kinds of keys that no variable is made of: (pattern of the whole name, why).
Ignored = Sequence[tuple[str, str]]

# {the last part of our path: the last part of PyTorch's name}
TORCH_LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A public checkpoint, mapped but not read.

  Attributes:
    path: where it lies.
    source: the layout of its names, such as "torchvision".
    name: the row of the family's table; None for sizes that are no row.
    config: sizes.
    leaves: {path of our variable: array in our layout}.
    used: names that variables are made of.
    ignored: {name: why}.
  """

  path: pathlib.Path
  source: str
  name: str | None
  config: base.BackboneConfig
  leaves: Mapping[str, LazyTensor]
  used: Sequence[str]
  ignored: Mapping[str, str]

  @property
  def num_weights(self) -> int:
    """How many numbers the variables hold."""
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in self.leaves.values())

  def summary(self) -> str:
    """A report of the use of every key."""
    return "\n".join(
      [
        f"{self.path}: {self.name}, as saved by {self.source}",
        f"  {len(self.used)} keys used for {len(self.leaves)} variables of {self.num_weights:,} numbers",
        *self.ignored_lines(),
      ]
    )

  def ignored_lines(self) -> list[str]:
    """The last lines of `summary`: how many keys of each kind are ignored, and why."""
    kinds = Counter(re.sub(r"\d+", "*", f"{key}: {why}") for key, why in self.ignored.items())
    return [
      f"  {len(self.ignored)} keys ignored",
      *(f"    {count} x {kind}" for kind, count in sorted(kinds.items())),
    ]


def read_classifier(leaves: Sequence[LazyTensor], path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """(kernel [channels, classes], bias [classes]) of a linear classifier in PyTorch's layout, float32.

  Raises:
    ValueError: numbers that are not finite.
  """
  kernel, bias = (
    tensors_lib.check_finite("the classifier", np.asarray(leaf.read(), np.float32), path) for leaf in leaves
  )
  return kernel.T, bias


def map_convolutional(
  module: nnx.Module,
  tensors: Mapping[str, LazyTensor],
  naming: Naming,
  ignored: Ignored,
  *,
  path: pathlib.Path,
  source: str,
  name: str,
) -> Checkpoint:
  """Maps the tensors of a convolutional network in PyTorch's layouts.

  Args:
    module: the backbone, with shapes in the place of weights.
    tensors: of the file, by the names that `naming` gives.
    naming: from our paths to theirs.
    ignored: which names may be left over.

  Raises:
    ValueError: keys that are missing, unexpected or of another shape; all are listed.
  """
  report, leaves, used, reasons = keys.KeyReport(), {}, set(), {}
  for ours, shape in trees.shapes(trees.weights(module)).items():
    theirs = naming(ours)
    if theirs not in tensors:
      report.add_missing(theirs, f"for {ours} {shape}")
      continue
    used.add(theirs)
    leaf = _in_our_layout(tensors[theirs], shape)
    if leaf is None:
      report.add_misshaped(theirs, f"{tensors[theirs].shape}", f"what fits {ours} {shape}")
    else:
      leaves[ours] = leaf
  for key, tensor in tensors.items():
    why = next((why for pattern, why in ignored if re.fullmatch(pattern, key)), None)
    if key not in used and why is None:
      report.add_unexpected(key, tensor.shape)
    elif key not in used:
      reasons[key] = why
  report.check(f"{path}, read as {name} saved by {source}, does not fit")
  return Checkpoint(path, source, name, module.config, leaves, tuple(sorted(used)), reasons)


def convolution_leaf(conv: str, norm: str, parts: Sequence[str]) -> str:
  """PyTorch's name of a variable of a convolution, or of the BatchNorm behind it.

  Args:
    conv, norm: PyTorch's names of the two.
    parts: the rest of our path below the convolution, such as `("norm", "scale")`.
  """
  match parts:
    case ["kernel" | "bias" as leaf]:
      return f"{conv}.{TORCH_LEAVES[leaf]}"
    case ["norm", leaf]:
      return f"{norm}.{TORCH_LEAVES[leaf]}"
  raise ValueError(f"{'/'.join(parts)} is no variable of a convolution or its BatchNorm.")


def _in_our_layout(tensor: LazyTensor, shape: tuple[int, ...]) -> LazyTensor | None:
  """A vector, a linear layer or a convolution in our layout and shape; None if it has none such.

  A convolution whose stride is its size is a linear layer on patches here ([rows, columns, channels] joined).
  """
  theirs = tensor.shape
  match len(theirs), len(shape):
    case (4, 4):
      found, axes = tuple(theirs[axis] for axis in (2, 3, 1, 0)), (2, 3, 1, 0)
    case (4, 2):
      found, axes = (theirs[2] * theirs[3] * theirs[1], theirs[0]), (2, 3, 1, 0)
    case (2, 2):
      found, axes = theirs[::-1], (1, 0)
    case (3, 1):  # torchvision's LayerScale, [channels, 1, 1]
      found, axes = (theirs[0] * theirs[1] * theirs[2],), (0, 1, 2)
    case (1, 1):
      found, axes = theirs, (0,)
    case _:
      return None
  if found != tuple(shape):
    return None

  def read() -> np.ndarray:
    return np.asarray(tensor.read()).transpose(axes).reshape(shape)

  return LazyTensor(tuple(shape), tensor.dtype, read)


def choose_row(
  variants: Mapping[str, base.BackboneConfig],
  fits: Callable[[base.BackboneConfig], bool],
  *,
  path: pathlib.Path,
  name: str | None,
) -> str:
  """The row of a family's table that a checkpoint's shapes fit.

  Args:
    fits: whether the file has the depths and widths of a row.
    name: the row that it must be; None takes the one that fits.

  Raises:
    ValueError: none fits, or several do; they are listed.
  """
  rows = [row for row, config in variants.items() if fits(config)]
  if name is not None:
    if name not in rows:
      raise ValueError(
        f"{path} does not have the sizes of {name}; they are those of {', '.join(rows) or 'no known row'}."
      )
    return name
  if len(rows) != 1:
    raise ValueError(
      f"{path} has the sizes of {', '.join(rows) or 'no known backbone'}; give the name of the one it is, "
      f"such as --config.backbone.name={(rows or list(variants))[0]}."
    )
  return rows[0]
