"""Choosing and ordering without sorting.

Where only the k best matter, or only few different values occur, a sort does more than is needed: compiling
one takes the TPU compiler 16 to 40 seconds whatever its length, and `lax.top_k` of many sorts everything.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from frozen_vision.ops.arrays import Array

# Of floats that are not negative, the bits are ordered as the numbers.
_MAX_BITS = 0x7FFFFFFF


def smallest(values: Float[Array, "*s n"], k: Int[Array, "*s"] | int) -> Bool[Array, "*s n"]:
  """Marks the min(k, n) smallest of n float32 values >= 0; of equal ones, the first."""
  return _smallest(_bits(values), k)


def largest(values: Float[Array, "*s n"], k: Int[Array, "*s"] | int) -> Bool[Array, "*s n"]:
  """Marks the min(k, n) largest of n float32 values >= 0; of equal ones, the first."""
  return _smallest(_MAX_BITS - _bits(values), k)


def indices(marked: Bool[Array, "*s n"], k: int) -> Int[Array, "*s k"]:
  """Positions of the first k marked values, in rising order; n where fewer are marked."""
  count = jnp.cumsum(marked, axis=-1).reshape(-1, marked.shape[-1])
  find = jax.vmap(lambda count: jnp.searchsorted(count, jnp.arange(1, k + 1)))
  return find(count).reshape(*marked.shape[:-1], k)


def falling_rank(values: Array) -> Int[Array, "*s n"]:
  """Place of each of n values [*s, n] among them by falling size; of equal ones, the first goes first.

  Compares all with all: for up to a few thousand.
  """
  here, other = values[..., :, None], values[..., None, :]
  index = jnp.arange(values.shape[-1])
  before = (other > here) | ((other == here) & (index[None, :] < index[:, None]))
  return jnp.sum(before, axis=-1, dtype=jnp.int32)


def inverse(permutation: Int[Array, "*s n"]) -> Int[Array, "*s n"]:
  """The permutation that undoes this one: of ranks, the order, and of an order, the ranks."""
  n = permutation.shape[-1]
  invert = jax.vmap(lambda row: jnp.zeros(n, jnp.int32).at[row].set(jnp.arange(n), unique_indices=True))
  return invert(permutation.reshape(-1, n)).reshape(permutation.shape)


def _bits(values: Float[Array, "*s n"]) -> Int[Array, "*s n"]:
  return jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)


def _smallest(keys: Int[Array, "*s n"], k: Int[Array, "*s"] | int) -> Bool[Array, "*s n"]:
  """Finds the k-th of integers >= 0 by bisection over its bits, in 31 passes."""

  def halve(step, threshold):
    candidate = threshold | (1 << (30 - step))
    below = jnp.sum(keys < candidate[..., None], axis=-1)
    return jnp.where(below < k, candidate, threshold)

  threshold = jax.lax.fori_loop(0, 31, halve, jnp.zeros(keys.shape[:-1], jnp.int32))[..., None]
  below, equal = keys < threshold, keys == threshold
  room = jnp.asarray(k)[..., None] - below.sum(axis=-1, keepdims=True)
  return below | (equal & (jnp.cumsum(equal, axis=-1) <= room))
