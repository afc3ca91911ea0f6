"""Freezing is a partition of the parameters, never a mask.

What is frozen is an argument of the train step that no gradient, optimizer slot, average or checkpoint can
see, because it is in another tree. `stop_gradient` and masked optimizers are not needed and not used.
"""

from collections.abc import Sequence
import re
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from frozen_vision.files import trees

# Modules of a model that never train, whatever the patterns say.
_ALWAYS_FROZEN = ("teacher/",)


def partition(model: nnx.Module, trainable: Sequence[str]) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
  """Splits a model into its structure, what trains, and what never changes.

  Modules in which nothing trains are put into inference mode (`inference_mode`).

  Args:
    model: its parameters are `nnx.Param`; anything else it holds stays with the frozen part (see
      `split_mutable`). A parameter below `teacher/` never trains.
    trainable: regular expressions; a parameter trains if one of them matches its whole path
      (`neck/.*`, `backbone/stages/3/.*`).

  Returns:
    (graphdef, trainable, frozen), for `nnx.merge(graphdef, trainable, frozen)`.

  Raises:
    ValueError: a pattern matches no parameter.
  """
  patterns = [re.compile(pattern) for pattern in trainable]
  names = [trees.path_string(path) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
  names = [name for name in names if not name.startswith(_ALWAYS_FROZEN)]
  for pattern in patterns:
    if not any(pattern.fullmatch(name) for name in names):
      tops = sorted({"/".join(name.split("/")[:2]) for name in names})
      raise ValueError(
        f"trainable pattern {pattern.pattern!r} matches no parameter; paths begin with {tops}."
      )

  chosen = {name for name in names if any(p.fullmatch(name) for p in patterns)}
  inference_mode(model, chosen)

  def trains(path, variable):
    return isinstance(variable, nnx.Param) and trees.path_string(path) in chosen

  return nnx.split(model, trains, ...)


def split(
  model: nnx.Module, trainable: Sequence[str]
) -> tuple[nnx.GraphDef, nnx.State, nnx.State, nnx.State]:
  """`partition`, with what the forward pass of trained modules changes apart (`split_mutable`).

  Returns:
    (graphdef, trainable, mutable, frozen), for `nnx.merge`.

  Raises:
    ValueError: a pattern matches no parameter.
  """
  graphdef, trained, rest = partition(model, trainable)
  return graphdef, trained, *split_mutable(trained, rest)


def inference_mode(model: nnx.Module, chosen: set[str]) -> None:
  """Switches stochastic depth, dropout and batch statistics of modules off in which nothing trains.

  A BatchNorm then normalises by its running statistics, so that the features of an image do not depend on its
  batch. A module without parameters, such as a dropout, belongs to the module that contains it.

  Args:
    model: its modules are changed.
    chosen: paths of the parameters that train.
  """
  names = [trees.path_string(path) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
  for path, module in nnx.iter_modules(model):
    prefix = trees.path_string((*path, ""))
    parameters = [name for name in names if name.startswith(prefix)]
    if parameters and chosen.isdisjoint(parameters):
      module.set_attributes(
        drop_path=0.0, deterministic=True, use_running_average=True, raise_if_not_found=False
      )


def split_mutable(trainable: nnx.State, frozen: nnx.State) -> tuple[nnx.State, nnx.State]:
  """Separates what the forward pass of trained modules changes from what nothing changes.

  Args:
    trainable, frozen: of `partition`.

  Returns:
    (mutable, frozen): BatchNorm's statistics in modules of which some parameter trains, and everything else.
  """
  flat = nnx.to_flat_state(frozen)
  trained = {path for path, _ in nnx.to_flat_state(trainable)}
  parameters = trained | {path for path, variable in flat if isinstance(variable, nnx.Param)}

  def is_mutable(path: tuple[Any, ...], variable: Any) -> bool:
    if not isinstance(variable, nnx.BatchStat):
      return False
    for length in range(len(path) - 1, -1, -1):  # the innermost module around it that has parameters
      around = {other for other in parameters if other[:length] == path[:length]}
      if around:
        return not around.isdisjoint(trained)
    return False

  mutable, rest = [], []
  for path, variable in flat:
    (mutable if is_mutable(path, variable) else rest).append((path, variable))
  return nnx.from_flat_state(mutable), nnx.from_flat_state(rest)


def cast(state: nnx.State, dtype: Any) -> nnx.State:
  """Floating leaves in another dtype; for the frozen part, which keeps no float32 copy."""
  return jax.tree.map(
    lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, state
  )


def num_bytes(state: Any) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
