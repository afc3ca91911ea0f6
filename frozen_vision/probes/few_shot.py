"""Few-shot episodes classified by the nearest class mean (prototypical networks, arXiv 1703.05175).

The protocol of "How Well Do Self-Supervised Models Transfer?" (arXiv 2011.13377), also on the data sets of
CD-FSL (arXiv 1912.07200): an episode draws 5 classes, some images of each to learn from and 15 others to
classify; 600 episodes, and a 95% interval of their mean.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int
import numpy as np

WAYS = 5
SHOTS = (5, 20, 50)
QUERIES = 15
EPISODES = 600


@dataclasses.dataclass(frozen=True)
class FewShotResult:
  """Accuracy over episodes, in 0..1.

  Attributes:
    shots: images of each class that an episode learns from.
    mean: over episodes.
    half_width: of the 95% interval of the mean: 1.96 standard deviations over the root of the number of
      episodes.
    accuracies: of each episode.
    num_classes: how many classes have images enough to be drawn.
  """

  shots: int
  mean: float
  half_width: float
  accuracies: Float[np.ndarray, "e"]
  num_classes: int


def draw(
  labels: Int[np.ndarray, "n"],
  *,
  shots: int,
  ways: int = WAYS,
  queries: int = QUERIES,
  episodes: int = EPISODES,
  seed: int = 0,
) -> Int[np.ndarray, "e w i"]:
  """Positions of the images of episodes: of each class first those to learn from, then the queries.

  Classes with fewer than `shots + queries` images are never drawn. An episode is a function of the seed and
  its number.

  Raises:
    ValueError: fewer than `ways` classes have enough images.
  """
  per_class = shots + queries
  members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
  members = [positions for positions in members if len(positions) >= per_class]
  if len(members) < ways:
    raise ValueError(
      f"{len(members)} classes have the {per_class} images that {shots} shots and {queries} queries take; "
      f"expected {ways} or more."
    )
  drawn = []
  for episode in range(episodes):
    rng = np.random.default_rng([seed, episode])
    classes = rng.choice(len(members), ways, replace=False)
    drawn.append([rng.choice(members[index], per_class, replace=False) for index in classes])
  return np.asarray(drawn)


def evaluate(
  features: Float[np.ndarray, "n d"],
  labels: Int[np.ndarray, "n"],
  *,
  shots: int,
  ways: int = WAYS,
  queries: int = QUERIES,
  episodes: int = EPISODES,
  seed: int = 0,
) -> FewShotResult:
  """Classifies the queries of episodes by the mean, in Euclidean distance, that they are nearest to.

  Args:
    features, labels: of all images that episodes may draw; the paper takes those of all splits together.

  Raises:
    ValueError: as `draw` does.
  """
  options = dict(shots=shots, ways=ways, queries=queries, episodes=episodes, seed=seed)
  positions = draw(labels, **options)
  accuracies = np.asarray(_accuracies(jnp.asarray(features, jnp.float32), positions, shots=shots), np.float64)
  enough = int(np.sum(np.unique(labels, return_counts=True)[1] >= shots + queries))
  half_width = 1.96 * float(np.std(accuracies)) / math.sqrt(episodes)
  return FewShotResult(shots, float(np.mean(accuracies)), half_width, accuracies, enough)


def possible_shots(
  labels: Int[np.ndarray, "n"], shots: Sequence[int] = SHOTS, *, ways: int = WAYS, queries: int = QUERIES
) -> tuple[int, ...]:
  """Those numbers of shots for which enough classes have enough images."""
  counts = np.unique(labels, return_counts=True)[1]
  return tuple(count for count in shots if np.sum(counts >= count + queries) >= ways)


@functools.partial(jax.jit, static_argnames="shots")
def _accuracies(features, positions, *, shots):
  """Accuracy of each episode, one after the other, so that no more than one is gathered."""

  def one(episode):
    images = features[episode]  # [ways, shots + queries, d]
    means = jnp.mean(images[:, :shots], axis=1)
    distances = jnp.sum((images[:, shots:, None] - means) ** 2, axis=-1)
    return jnp.mean(jnp.argmin(distances, axis=-1) == jnp.arange(episode.shape[0])[:, None])

  return jax.lax.map(one, positions)
