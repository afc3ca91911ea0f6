"""Leaves of a training state by path; comparison of two states by path, shape and dtype."""

from collections.abc import Mapping
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def is_number(leaf: Any) -> bool:
  """A Python number. NumPy's float64 is one by inheritance, but is treated as an array."""
  return isinstance(leaf, (bool, int, float)) and not isinstance(leaf, np.generic)


def flatten(tree: PyTree) -> tuple[dict[str, Any], Any]:
  """Leaves by path, such as `trainable/head/kernel`, and the tree's structure.

  The box of an `nnx.Variable` is no part of the path, so paths are those of `nnx.to_flat_state`.
  """

  def name(keys):
    return [jax.tree_util.keystr((k,), simple=True) for k in keys]

  leaves, treedef = jax.tree.flatten(tree)

  def is_variable(x):
    return isinstance(x, nnx.Variable)

  paths = []
  for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_variable):
    boxed = is_variable(node)
    for inner, _ in jax.tree_util.tree_leaves_with_path(node):
      paths.append("/".join(name(path) + name(inner[1:] if boxed else inner)))
  if len(set(paths)) != len(leaves) or "" in paths:
    raise ValueError(
      "A state is a dict (or the like) in which every leaf has a path of its own; found the "
      f"repeated or empty paths {sorted({p for p in paths if paths.count(p) > 1 or not p})}."
    )
  return dict(zip(paths, leaves)), treedef


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Nested dicts from paths; `flatten` of them gives the paths again."""
  nested = {}
  for path, leaf in flat.items():
    *parents, last = path.split("/")
    node = nested
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return nested


def describe(leaves: Mapping[str, Any]) -> dict[str, str]:
  """Shape and dtype of leaves by path, such as `float32[3,4]`, `key<fry>[]`; `int` for a number."""
  return {path: _describe(path, leaf) for path, leaf in leaves.items()}


def has_bytes(leaf: Any) -> bool:
  """Whether the leaf is an array with elements."""
  return not is_number(leaf) and math.prod(leaf.shape) > 0


def abstract(leaf: Any) -> Any:
  """Shape, dtype and sharding of an array leaf; a NumPy array stands for itself."""
  if isinstance(leaf, (np.ndarray, np.generic)):
    return np.empty(leaf.shape, leaf.dtype)
  sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def empty(leaf: Any) -> Any:
  """An array without elements, like `leaf`; Orbax cannot save one, and there is nothing to save."""
  if isinstance(leaf, np.ndarray):
    return np.zeros(leaf.shape, leaf.dtype)
  return jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=abstract(leaf).sharding)()


def _describe(path: str, leaf: Any) -> str:
  if is_number(leaf):
    return type(leaf).__name__
  if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)):
    raise TypeError(f"{path} is a {type(leaf).__name__}; a checkpoint holds arrays and Python numbers.")
  if leaf.dtype == object:
    raise TypeError(f"{path} is a NumPy array of objects, which cannot be saved.")
  return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
