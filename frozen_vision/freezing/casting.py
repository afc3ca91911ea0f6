"""The storage dtype of frozen weights that are not folded, of arrays and of shapes."""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from frozen_vision.backbones import base
from frozen_vision.freezing import partition


def cast_module(module: base.Backbone, storage: str) -> base.Backbone:
  """A backbone with its floating variables in the dtype of the storage."""
  graphdef, state = nnx.split(module)
  return nnx.merge(graphdef, cast_state(state, storage))


def cast_state(state: nnx.State, storage: str) -> nnx.State:
  """Floating leaves in the dtype of the storage; of shapes, their shapes."""
  dtype = jnp.dtype(storage)
  if _are_shapes(state):
    return jax.eval_shape(lambda state: partition.cast(state, dtype), state)
  return partition.cast(state, dtype)


def cast_all_but_teacher(state: nnx.State, storage: str) -> nnx.State:
  """`cast_state` of what is frozen of a model; a teacher is stored already, its tables in float32."""
  flat = nnx.to_flat_state(state)
  teacher = [(path, leaf) for path, leaf in flat if path[0] == "teacher"]
  others = nnx.from_flat_state([(path, leaf) for path, leaf in flat if path[0] != "teacher"])
  return nnx.from_flat_state([*nnx.to_flat_state(cast_state(others, storage)), *teacher])


def holds_floats(trained: nnx.State, frozen: nnx.State) -> bool:
  """Whether something of a model is frozen that a storage dtype would cast."""
  _, rest = partition.split_mutable(trained, frozen)
  return any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(rest))


def has_shapes_only(module: nnx.Module) -> bool:
  """Whether a module is one of shapes, as `backbones.base.abstract` makes it."""
  return _are_shapes(nnx.state(module))


def _are_shapes(tree: Any) -> bool:
  return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))
