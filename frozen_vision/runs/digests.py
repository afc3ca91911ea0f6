"""Checksums of arrays that do not depend on their sharding, so that any mesh can check any other's.

A leaf's checksum is two sums over the bit patterns of its numbers, modulo 2^64: plain, and weighted by an odd
factor that depends on the position. One number that differs always changes both; several cancel in both with
a probability of about 2^-64. Sums over shards add up, over devices and over processes.
"""

from collections.abc import Iterator, Mapping
import concurrent.futures
import hashlib
import json
import math
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

_BLOCK = 1 << 16  # numbers at a time: what a core's cache holds
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_STEPS = np.arange(_BLOCK, dtype=np.uint64) * _FACTOR
_THREADS = 4


def of_leaves(leaves: Mapping[str, Any]) -> dict[str, str]:
  """The checksum of every array leaf by path; the same in all processes, which all must ask.

  Args:
    leaves: jax arrays, also of keys, and NumPy arrays. A NumPy array is the same in every process.
  """
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    sums = list(pool.map(_sums, leaves.values()))
  table = np.array(sums, np.uint64).reshape(len(sums), 2)
  if jax.process_count() > 1:
    # Sent as 32-bit words: without x64, JAX would truncate 64 bits.
    parts = multihost_utils.process_allgather(np.ascontiguousarray(table).view(np.uint32))
    table = np.ascontiguousarray(parts).view(np.uint64).sum(axis=0, dtype=np.uint64)
  return {path: f"{plain:016x}{weighted:016x}" for path, (plain, weighted) in zip(leaves, table.tolist())}


def of_record(record: Mapping[str, Any]) -> str:
  """SHA-256 of what JSON holds, whatever the order of its keys."""
  return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _sums(leaf: Any) -> tuple[int, int]:
  """Both sums over this process's part of a leaf, each part of it counted in one process only."""
  if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  if not isinstance(leaf, jax.Array):
    host = np.asarray(leaf)
    if jax.process_index():
      return 0, 0
    return _sums_of_part(host, tuple(slice(0, n) for n in host.shape), host.shape)
  plain = weighted = 0
  for shard in leaf.addressable_shards:
    if shard.replica_id == 0:
      one = _sums_of_part(np.asarray(shard.data), shard.index, leaf.shape)
      plain, weighted = plain + one[0], weighted + one[1]
  return plain % (1 << 64), weighted % (1 << 64)


def _sums_of_part(part: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, int]:
  """Both sums over a part, which lies at `index` in an array of `shape`."""
  plain = weighted = np.uint64(0)
  bits = _bits(part)
  per_number = bits.size // max(1, part.size)
  with np.errstate(over="ignore"):
    for start, values in _runs(bits, index, shape, per_number):
      for first in range(0, len(values), _BLOCK):
        block = values[first : first + _BLOCK].astype(np.uint64)
        factors = (_STEPS[: len(block)] + np.uint64(start + first) * _FACTOR) | np.uint64(1)
        plain += np.sum(block, dtype=np.uint64)
        weighted += np.sum(block * factors, dtype=np.uint64)
  return int(plain), int(weighted)


def _bits(part: np.ndarray) -> np.ndarray:
  """The numbers as unsigned integers of at most 32 bits, in one row; so no factor can shift a bit out."""
  kind = {1: "u1", 2: "u2"}.get(part.dtype.itemsize, "u4")
  return np.ascontiguousarray(part).reshape(-1).view(kind)


def _runs(
  bits: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...], per_number: int
) -> Iterator[tuple[int, np.ndarray]]:
  """(position in the whole array, numbers) of the parts of a shard that lie in one run there."""
  starts = [piece.indices(n)[0] for piece, n in zip(index, shape)]
  sides = [len(range(*piece.indices(n))) for piece, n in zip(index, shape)]
  # Axes from `whole` on are complete: the numbers below one index of the axis before them follow each other.
  whole = len(shape)
  while whole and sides[whole - 1] == shape[whole - 1]:
    whole -= 1
  strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
  outer = sides[: max(0, whole - 1)]
  length = math.prod(sides[max(0, whole - 1) :])
  for row, outer_index in enumerate(np.ndindex(*outer)):
    position = sum((start + at) * stride for start, at, stride in zip(starts, outer_index, strides))
    position += sum(start * stride for start, stride in zip(starts[len(outer) :], strides[len(outer) :]))
    numbers = bits[row * length * per_number : (row + 1) * length * per_number]
    yield position * per_number, numbers
