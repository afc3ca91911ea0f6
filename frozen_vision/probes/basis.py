"""Principal axes of features, in which a penalised linear classifier stays the same and is found faster."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from frozen_vision.ops.arrays import Array

# Axes along which features spread by less than this fraction of the largest spread are left out: float32
# does not resolve them.
_SMALLEST = 1e-6


@dataclasses.dataclass(frozen=True)
class LinearClassifier:
  """Weights and intercepts on features.

  Attributes:
    weights: one column per class.
    bias: one intercept per class.
  """

  weights: Float[np.ndarray, "d k"]
  bias: Float[np.ndarray, "k"]

  def logits(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n k"]:
    """Scores of every class, float32."""
    return np.asarray(_affine(features, self.weights, self.bias))


@dataclasses.dataclass(frozen=True)
class Basis:
  """Orthonormal axes of centred features, r = min(n, d) or fewer.

  Weights of a classifier with a squared penalty lie in the span of its centred features, and the length of a
  vector does not depend on the axes that it is written in. The classifier in these coordinates is therefore
  that of the features: centring changes nothing but the intercepts, which are not penalised.

  Attributes:
    mean: of the features.
    axes: orthonormal columns, from the smallest to the largest spread.
  """

  mean: Float[np.ndarray, "d"]
  axes: Float[np.ndarray, "d r"]

  def coordinates(self, features: Float[np.ndarray, "n d"]) -> Float[jax.Array, "n _"]:
    """Coordinates of features, float32, and a last column of ones whose weights are intercepts."""
    return _coordinates(features, self.mean, self.axes)

  def classifier(self, weights: Float[Array, "_ k"]) -> LinearClassifier:
    """The classifier on features that has these weights on their coordinates."""
    weights = np.asarray(weights, np.float64)
    on_features = self.axes.astype(np.float64) @ weights[:-1]
    bias = weights[-1] - self.mean.astype(np.float64) @ on_features
    return LinearClassifier(on_features.astype(np.float32), bias.astype(np.float32))


def principal(features: Float[np.ndarray, "n d"]) -> Basis:
  """The principal axes of features.

  The smaller of the two Gram matrices is diagonalised in float64 on the host. With more features than
  dimensions it is computed on the device, in float32: any orthonormal axes will do, and those of a slightly
  different matrix are nearly as good.

  Raises:
    ValueError: fewer than two features, or some that are not finite.
  """
  count, size = features.shape
  if count < 2:
    raise ValueError(f"There are {count} features; expected at least two to find their axes.")
  mean = np.mean(features, axis=0, dtype=np.float64)
  if not np.isfinite(mean).all():
    raise ValueError("The features hold NaN or infinity; the backbone or its input is broken.")
  if count > size:
    gram = np.asarray(_gram(features, mean.astype(np.float32)), np.float64)
    return Basis(mean.astype(np.float32), np.linalg.eigh(gram)[1].astype(np.float32))
  centred = np.asarray(features, np.float64) - mean
  squares, vectors = np.linalg.eigh(centred @ centred.T)
  kept = squares > _SMALLEST**2 * max(squares[-1], 0)
  axes = centred.T @ (vectors[:, kept] / np.sqrt(squares[kept]))
  return Basis(mean.astype(np.float32), axes.astype(np.float32))


def scores(coordinates: Float[Array, "n r"], weights: Float[Array, "r k"]) -> Float[np.ndarray, "n k"]:
  """Scores of every class by weights on coordinates, float32."""
  return np.asarray(_affine(coordinates, weights, 0.0))


def _exactly(function):
  """Compiles a function whose matrix products are float32 also where the device would round their inputs."""

  @functools.wraps(function)
  def exact(*arguments):
    with jax.default_matmul_precision("highest"):
      return function(*arguments)

  return jax.jit(exact)


@_exactly
def _affine(features, weights, bias):
  return features @ weights + bias


@_exactly
def _coordinates(features, mean, axes):
  return jnp.concatenate([(features - mean) @ axes, jnp.ones((features.shape[0], 1))], axis=1)


@_exactly
def _gram(features, mean):
  centred = features - mean
  return centred.T @ centred
