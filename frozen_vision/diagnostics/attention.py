"""How far the heads of a backbone look, and how alike they look (Feature Distillation, arXiv 2205.14141).

Feature Distillation's code has no diagnostics; the distance is that of the ViT paper (arXiv 2010.11929,
figure 7): the mean over queries of the distances to all keys, weighted by the attention.
"""

from collections.abc import Iterable
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from frozen_vision.backbones.base import AttentionWeights, Backbone
from frozen_vision.ops.arrays import Array


@dataclasses.dataclass(frozen=True)
class Heads:
  """The heads of one block, over all images.

  Attributes:
    distances: mean distance in pixels of the image to what each head attends to.
    similarities: cosine similarity of the attention maps of two heads.
  """

  distances: Float[np.ndarray, "heads"]
  similarities: Float[np.ndarray, "heads heads"]

  @property
  def similarity(self) -> float:
    """The mean over all pairs of different heads; 1 of a single head."""
    count = len(self.similarities)
    return 1.0 if count == 1 else float((self.similarities.sum() - count) / (count * (count - 1)))


def distances(attention: AttentionWeights) -> Float[Array, "b heads"]:
  """Mean distance in pixels from a query to what it attends to, of every image and head.

  Tokens without a place neither count as queries nor as keys: the weights of the other keys are scaled to a
  sum of 1.
  """
  places = np.asarray(attention.positions)
  placed = np.isfinite(places).all(-1)
  places = np.where(placed[..., None], places, 0.0)
  apart = np.linalg.norm(places[:, :, None] - places[:, None, :], axis=-1)  # [groups, n, n]
  weights = attention.weights * placed[:, None, None, :]
  total = jnp.maximum(weights.sum(-1), 1e-12)
  means = (weights * apart[:, None]).sum(-1) / total  # [b, groups, heads, n]
  queries = jnp.asarray(placed[:, None, :], means.dtype)
  return (means * queries).sum((1, 3)) / queries.sum((0, 2))


def similarities(attention: AttentionWeights) -> Float[Array, "b heads heads"]:
  """Cosine similarity of two heads' maps, all queries and keys of an image as one vector."""
  maps = jnp.moveaxis(attention.weights, 2, 1)
  maps = maps.reshape(*maps.shape[:2], -1)
  maps /= jnp.linalg.norm(maps, axis=-1, keepdims=True)
  return jnp.einsum("bhx,bgx->bhg", maps, maps)


def mean_maps(attention: AttentionWeights) -> Float[Array, "groups heads n n"]:
  """Attention averaged over images: what heads attend to whatever is there."""
  return attention.weights.mean(axis=0)


def measure(backbone: Backbone, batches: Iterable[Float[Array, "b h w 3"]]) -> list[Heads]:
  """`Heads` of every block, over batches of normalised images of one size.

  Raises:
    ValueError: a backbone without self-attention, or no images.
  """

  graphdef, state = nnx.split(backbone)

  @jax.jit
  def sums(state, images):
    found = nnx.merge(graphdef, state).attention_weights(images)
    return [(distances(each).sum(0), similarities(each).sum(0)) for each in found]

  total, count = None, 0
  for images in batches:
    found = jax.device_get(sums(state, images))
    total = found if total is None else jax.tree.map(np.add, total, found)
    count += len(images)
  if total is None:
    raise ValueError("There are no images to measure attention on.")
  return [Heads(distance / count, similarity / count) for distance, similarity in total]
