"""Linear centred kernel alignment (CKA, arXiv 1905.00414) between the layers of two networks.

Summed over batches in the unbiased form of arXiv 2010.15327, whose expectation does not depend on the size of
the batches.
"""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from frozen_vision.ops.arrays import Array


def unbiased_hsic(first: Float[Array, "n n"], second: Float[Array, "n n"]) -> Float[Array, ""]:
  """The unbiased estimate of HSIC from two Gram matrices of the same n > 3 examples (Song et al. 2012)."""
  n = first.shape[0]
  if n < 4:
    raise ValueError(f"CKA needs batches of at least 4 examples, found {n}.")
  off_diagonal = 1.0 - jnp.eye(n)
  first, second = first * off_diagonal, second * off_diagonal
  product = jnp.sum(first * second)
  sums = first.sum() * second.sum() / ((n - 1) * (n - 2))
  mixed = 2.0 * jnp.sum(first.sum(0) * second.sum(0)) / (n - 2)
  return (product + sums - mixed) / (n * (n - 3))


def cka(
  batches: Iterable[tuple[Sequence[Float[Array, "n _d"]], Sequence[Float[Array, "n _e"]]]],
) -> Float[np.ndarray, "first second"]:
  """CKA of every layer of one network with every layer of another.

  Args:
    batches: (a vector of each example for every layer of the first network, likewise of the second); vectors
      are features averaged over positions, or all of them.

  Raises:
    ValueError: no batches, or one of fewer than four examples.
  """
  sums = [0.0, 0.0, 0.0]
  for first, second in batches:
    grams = [[_gram(x) for x in layers] for layers in (first, second)]
    sums[0] += np.array([[unbiased_hsic(a, b) for b in grams[1]] for a in grams[0]])
    for side in (0, 1):
      sums[1 + side] += np.array([unbiased_hsic(a, a) for a in grams[side]])
  if np.ndim(sums[0]) == 0:
    raise ValueError("There are no batches to measure CKA on.")
  scale = np.sqrt(np.maximum(np.outer(sums[1], sums[2]), np.finfo(np.float64).tiny))
  return sums[0] / scale


@jax.jit
def _gram(x: Float[Array, "n d"]) -> Float[Array, "n n"]:
  x = x.astype(jnp.float32)
  return x @ x.T
