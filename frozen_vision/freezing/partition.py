"""Freezing is a partition of the parameters, never a mask.

What is frozen is an argument of the train step that no gradient, optimizer slot, average or checkpoint can
see, because it is in another tree. `stop_gradient` and masked optimizers are not needed and not used.
"""

from collections.abc import Mapping, Sequence
import hashlib
import re
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np


def path_string(path: Sequence[Any]) -> str:
  """`backbone/stages/0/blocks/1/attn/qkv/kernel`: the name that patterns are matched against."""
  return "/".join(map(str, path))


def flatten(state: nnx.State) -> dict[str, jax.Array]:
  """{path: array, or its shape in an abstract state} of every leaf of a state."""
  return {path_string(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def partition(model: nnx.Module, trainable: Sequence[str]) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
  """Splits a model into its structure, what trains, and what never changes.

  Stochastic depth and dropout of modules in which nothing trains are switched off.

  Args:
    model: its parameters are `nnx.Param`; anything else it holds stays with the frozen part.
    trainable: regular expressions; a parameter trains if one of them matches its whole path
      (`neck/.*`, `backbone/stages/3/.*`).

  Returns:
    (graphdef, trainable, frozen), for `nnx.merge(graphdef, trainable, frozen)`.

  Raises:
    ValueError: a pattern matches no parameter.
  """
  patterns = [re.compile(pattern) for pattern in trainable]
  names = [path_string(path) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
  for pattern in patterns:
    if not any(pattern.fullmatch(name) for name in names):
      tops = sorted({"/".join(name.split("/")[:2]) for name in names})
      raise ValueError(
        f"trainable pattern {pattern.pattern!r} matches no parameter; paths begin with {tops}."
      )

  chosen = {name for name in names if any(p.fullmatch(name) for p in patterns)}
  for path, module in nnx.iter_modules(model):
    prefix = path_string((*path, ""))
    if not any(name.startswith(prefix) for name in chosen):
      module.set_attributes(drop_path=0.0, deterministic=True, raise_if_not_found=False)

  def trains(path, variable):
    return isinstance(variable, nnx.Param) and path_string(path) in chosen

  return nnx.split(model, trains, ...)


def cast(state: nnx.State, dtype: Any) -> nnx.State:
  """Floating leaves in another dtype; for the frozen part, which keeps no float32 copy."""
  return jax.tree.map(
    lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, state
  )


def num_bytes(state: Any) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def fingerprint(state: nnx.State) -> str:
  """SHA-256 over path, shape and float32 bytes of every leaf: what weights these are.

  Independent of sharding and of the order of the leaves. Compute it on the weights as they were loaded,
  before any cast.
  """
  return combine_digests(
    {path: (tuple(leaf.shape), leaf_digest(np.asarray(leaf))) for path, leaf in flatten(state).items()}
  )


def leaf_digest(leaf: np.ndarray) -> str:
  """SHA-256 of a leaf's float32 bytes."""
  return hashlib.sha256(np.ascontiguousarray(leaf, np.float32).tobytes()).hexdigest()


def combine_digests(digests: Mapping[str, tuple[tuple[int, ...], str]]) -> str:
  """`fingerprint` from {path: (shape, leaf_digest)}, for weights that are never whole in memory."""
  digest = hashlib.sha256()
  for path, (shape, leaf) in sorted(digests.items()):
    digest.update(f"{path} {shape} {leaf}\n".encode())
  return digest.hexdigest()
