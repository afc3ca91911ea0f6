"""Choosing and ordering without a sort gives what numpy's stable sort gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.ops import select


@pytest.fixture(name="values")
def _values():
  rng = np.random.default_rng(0)
  values = rng.random((3, 2, 50), np.float32) * np.float32(10) ** rng.integers(-30, 30, (3, 2, 50))
  values[0, 0] = 0.0
  values[1] = np.float32(rng.integers(0, 4, (2, 50)))  # many are equal
  values[2, 0, :3] = np.inf
  return values


@pytest.mark.parametrize("k", (1, 7, 50))
def test_smallest_and_largest(values, k):
  for function, sign in ((select.smallest, 1), (select.largest, -1)):
    marked = function(values, k)
    expected = np.sort(np.argsort(sign * values, axis=-1, kind="stable")[..., :k], axis=-1)
    np.testing.assert_array_equal(select.indices(marked, k), expected)
    assert (marked.sum(-1) == k).all()


def test_each_row_may_ask_for_another_number(values):
  k = np.array([[0, 1], [3, 50], [60, 2]], np.int32)
  marked = jax.jit(select.smallest)(values, k)
  order = np.argsort(values, axis=-1, kind="stable")
  for row in np.ndindex(3, 2):
    np.testing.assert_array_equal(np.flatnonzero(marked[row]), np.sort(order[row][: k[row]]))


def test_indices_of_fewer_than_asked_for_end_with_the_length():
  marked = np.array([[0, 1, 0, 1], [0, 0, 0, 0]], bool)
  np.testing.assert_array_equal(select.indices(marked, 3), [[1, 3, 4], [4, 4, 4]])


def test_ranks_and_their_inverse_are_a_stable_sort(values):
  for x in (values, jnp.asarray(values[1], jnp.int32), values[1] > 1):
    rank = select.falling_rank(x)
    order = np.argsort(-np.asarray(x).astype(np.float32), axis=-1, kind="stable")
    np.testing.assert_array_equal(select.inverse(rank), order)
    np.testing.assert_array_equal(select.inverse(order), rank)
