"""Weighted nearest neighbours among features, as DINO evaluates them (arXiv 2104.14294, section 4.1)."""

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int
import numpy as np

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
_SIMILARITIES = 2**25  # numbers that a chunk of queries may have at once: 128 MiB


def votes(
  queries: Float[np.ndarray, "q d"],
  features: Float[np.ndarray, "n d"],
  labels: Int[np.ndarray, "n"],
  *,
  num_classes: int,
  ks: Sequence[int] = KS,
  temperature: float = TEMPERATURE,
) -> dict[int, Float[np.ndarray, "q c"]]:
  """Votes of the nearest training features for each class.

  Features are scaled to length one. Each of the k training features of the largest cosine similarity s votes
  for its class with weight exp(s / temperature).

  Args:
    queries: features to classify.
    features, labels: of the training data.
    ks: numbers of neighbours.

  Returns:
    {k: votes}, which sum to one for every query.

  Raises:
    ValueError: a k below one or above the number of training features.
  """
  if not ks or min(ks) < 1 or max(ks) > len(features):
    raise ValueError(f"ks is {tuple(ks)}; expected numbers from 1 to {len(features)}, the training features.")
  size = min(max(1, _SIMILARITIES // len(features)), len(queries))
  train, classes = jnp.asarray(features, jnp.float32), jnp.asarray(labels)
  parts = []
  for start in range(0, len(queries), size):
    part = np.asarray(queries[start : start + size], np.float32)
    filled = np.concatenate([part, np.zeros((size - len(part), part.shape[1]), np.float32)])
    found = _votes(filled, train, classes, temperature, ks=tuple(ks), num_classes=num_classes)
    parts.append(np.asarray(found)[:, : len(part)])
  return dict(zip(ks, np.concatenate(parts, axis=1)))


def top1(
  queries: Float[np.ndarray, "q d"],
  query_labels: Int[np.ndarray, "q"],
  features: Float[np.ndarray, "n d"],
  labels: Int[np.ndarray, "n"],
  *,
  ks: Sequence[int] = KS,
  temperature: float = TEMPERATURE,
) -> dict[int, float]:
  """Fraction of queries whose label gets the most votes, in 0..1, for each k; see `votes`."""
  num_classes = 1 + int(max(np.max(labels), np.max(query_labels)))
  found = votes(queries, features, labels, num_classes=num_classes, ks=ks, temperature=temperature)
  return {k: float(np.mean(np.argmax(each, axis=1) == query_labels)) for k, each in found.items()}


@functools.partial(jax.jit, static_argnames=("ks", "num_classes"))
def _votes(queries, features, labels, temperature, *, ks, num_classes):
  """Votes [ks, q, c] of one chunk of queries."""
  queries, features = _unit(queries), _unit(features)
  similarity = jnp.matmul(queries, features.T, precision=jax.lax.Precision.HIGHEST)
  nearest, positions = jax.lax.top_k(similarity, max(ks))
  # Divided by the largest one, which all shares have in common, so that nothing overflows.
  weights = jnp.exp((nearest - nearest[:, :1]) / temperature)
  rows = jnp.arange(queries.shape[0])[:, None]
  found = []
  for k in ks:
    sums = jnp.zeros((queries.shape[0], num_classes)).at[rows, labels[positions[:, :k]]].add(weights[:, :k])
    found.append(sums / jnp.sum(sums, axis=1, keepdims=True))
  return jnp.stack(found)


def _unit(features):
  return features / jnp.maximum(jnp.linalg.norm(features, axis=1, keepdims=True), 1e-12)
