"""Codewords of surface normals: a few directions, between which a head chooses at every pixel.

Wang, Fouhey and Gupta (Designing Deep Networks for Surface Normal Estimation, 2015), after Ladicky, Zeisl and
Pollefeys (2014): the normals of the training images are clustered by k-means, and the head classifies. The
benchmark of Goyal et al. (2019), which 2011.13377 uses, has 40 of them and decodes softly: the mean of the
codewords, weighted by their probabilities, brought to unit length.
"""

import math

from jaxtyping import Float
import numpy as np

from frozen_vision.data.dense import sources

_IMAGES = 200  # looked at, evenly spaced
_PIXELS = 200  # of each, evenly spaced among those that have a normal
_ITERATIONS = 50
_DIGITS = 6


def learn(source: sources.DenseSource, count: int) -> Float[np.ndarray, "count 3"]:
  """Codewords of a source's normals, by k-means over some pixels of some images; the same on every call.

  Raises:
    ValueError: no pixel has a normal.
  """
  chosen = np.unique(np.linspace(0, len(source) - 1, min(_IMAGES, len(source))).astype(int))
  found = []
  for index in chosen.tolist():
    normals = source.truth(index)["normals"].reshape(-1, 3).astype(np.float64)
    normals = normals[np.any(normals != 0, axis=1)]
    if len(normals):
      found.append(normals[np.linspace(0, len(normals) - 1, _PIXELS).astype(int)])
  if not found:
    raise ValueError(f"No pixel of {len(chosen)} images of {source!r} has a surface normal to learn from.")
  return cluster(np.concatenate(found), count)


def cluster(normals: Float[np.ndarray, "n 3"], count: int) -> Float[np.ndarray, "count 3"]:
  """Centres of unit vectors by k-means, themselves of unit length, rounded to six digits.

  The first centres are drawn by k-means++ from a fixed stream. A centre that no vector is nearest to stays.
  """
  # `random` alone: its stream is guaranteed (NEP 19).
  rng = np.random.Generator(np.random.PCG64(0))
  centres = np.empty((count, 3))
  distances = np.ones(len(normals))
  for i in range(count):
    cumulative = np.cumsum(distances)
    row = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    centres[i] = normals[min(row, len(normals) - 1)]
    # Where fewer directions than codewords occur, all distances become 0: any row is as good.
    distances = np.minimum(distances if i else np.inf, ((normals - centres[i]) ** 2).sum(axis=1))
    distances = distances if distances.any() else np.full(len(normals), 1e-12)
  for _ in range(_ITERATIONS):
    nearest = (normals @ centres.T).argmax(axis=1)
    sums = np.stack([np.bincount(nearest, normals[:, axis], count) for axis in range(3)], axis=1)
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    moved = np.where(lengths > 1e-9, sums / np.maximum(lengths, 1e-9), centres)
    if np.array_equal(moved, centres):
      break
    centres = moved
  return np.round(centres, _DIGITS)


def lattice(count: int) -> Float[np.ndarray, "count 3"]:
  """Directions spread evenly over the half of the sphere that faces the camera (a Fibonacci lattice)."""
  z = (np.arange(count) + 0.5) / count
  angle = np.arange(count) * math.pi * (3 - math.sqrt(5))
  radius = np.sqrt(1 - z**2)
  return np.round(np.stack([radius * np.cos(angle), radius * np.sin(angle), z], axis=1), _DIGITS)
