"""Losses around trained weights, under noise of the size of each filter (Li et al., arXiv 1712.09913)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, PRNGKeyArray
import numpy as np

Tree = Any


def direction(parameters: Tree, key: PRNGKeyArray) -> Tree:
  """Gaussian noise in which every filter has the l2 norm of the filter it is added to.

  A filter is what one output channel, the last axis, is computed from. Vectors, which are biases, scales and
  single tokens, get none, as in the paper.
  """
  leaves, structure = jax.tree.flatten(parameters)
  keys = jax.random.split(key, len(leaves))

  def noise(leaf, key):
    if leaf.ndim < 2:
      return jnp.zeros_like(leaf)
    drawn, axes = jax.random.normal(key, leaf.shape), tuple(range(leaf.ndim - 1))

    def norm(x):
      return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes, keepdims=True))

    return (drawn * (norm(leaf) / jnp.maximum(norm(drawn), 1e-12))).astype(leaf.dtype)

  return jax.tree.unflatten(structure, [noise(*pair) for pair in zip(leaves, keys)])


def along(
  measure: Callable[[Tree], Float[Any, ""]],
  parameters: Tree,
  key: PRNGKeyArray,
  *,
  distances: Sequence[float] = (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0),
  directions: int = 5,
) -> Float[np.ndarray, "directions distances"]:
  """A loss or an accuracy at points on lines through trained weights.

  Args:
    measure: the number at some parameters, such as the mean loss over test data; it is compiled.
    distances: in units of the direction: at 1 the noise of each filter is as large as the filter.
    directions: how many lines, drawn of `key`.
  """

  @jax.jit
  def at(noise, distance):
    return measure(jax.tree.map(lambda leaf, step: leaf + distance * step, parameters, noise))

  rows = []
  for each in jax.random.split(key, directions):
    noise = direction(parameters, each)
    rows.append([float(at(noise, distance)) for distance in distances])
  return np.array(rows)
