"""Leaves of a model by path, and the fingerprint that identifies weights."""

from collections.abc import Mapping, Sequence
import hashlib
from typing import Any

from flax import nnx
import numpy as np


def path_string(path: Sequence[Any]) -> str:
  """`backbone/stages/0/blocks/1/attn/qkv/kernel`: the name that patterns are matched against."""
  return "/".join(map(str, path))


def flatten(state: nnx.State) -> dict[str, Any]:
  """{path: array, or its shape in an abstract state} of every leaf of a state."""
  return {path_string(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def shapes(state: nnx.State) -> dict[str, tuple[int, ...]]:
  """{path: shape} of every leaf of a state, abstract or not."""
  return {path_string(path): tuple(variable.shape) for path, variable in nnx.to_flat_state(state)}


def weights(module: nnx.Module) -> nnx.State:
  """Every variable that a module's outputs depend on: parameters, batch statistics, tables; no keys."""
  return nnx.state(module, nnx.Not(nnx.RngState))


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
