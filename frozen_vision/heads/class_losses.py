"""Class losses of rois for long-tailed and federated data (LVIS); the background is the last class."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, PRNGKeyArray
import optax

from frozen_vision.ops.arrays import Array


def sigmoid_loss(
  logits: Float[Array, "b n k"], labels: Int[Array, "b n"], looked_at: Bool[Array, "b n k"] | None = None
) -> Float[Array, "b n"]:
  """Binary cross-entropy of every class, summed over classes.

  Args:
    logits: of the k foreground classes.
    labels: 0 to k; k is the background, for which every class is absent.
    looked_at: the classes that count for each roi; all by default.
  """
  is_class = (labels[..., None] == jnp.arange(logits.shape[-1])).astype(jnp.float32)
  loss = optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), is_class)
  return (loss if looked_at is None else jnp.where(looked_at, loss, 0.0)).sum(-1)


def federated_classes(
  rng: PRNGKeyArray,
  labels: Int[Array, "b n"],
  valid: Bool[Array, "b n"],
  frequency: Float[Array, "k"],
  count: int,
) -> Bool[Array, "k"]:
  """The classes that the rois of a batch are classified by (CenterNet2's federated loss).

  Those that the rois have, and so many others that there are `count`, the background among them, drawn
  without replacement in proportion to `frequency`.

  Args:
    rng: for the draw.
    labels: 0 to k; k is the background.
    valid: which rois count.
    frequency: of every class, such as the square root of its number of images; a class of 0 is never drawn.
  """
  classes = frequency.shape[0]
  has = jnp.zeros(classes + 1, bool).at[jnp.where(valid, labels, classes)].set(True)
  has = has.at[-1].set(jnp.any(valid & (labels == classes)))
  present, missing = has[:-1], count - has.sum()
  # The largest of log weight + Gumbel noise are a draw without replacement (Kool et al., arXiv 1903.06059).
  keys = jnp.log(frequency.astype(jnp.float32)) + jax.random.gumbel(rng, (classes,))
  keys = jnp.where(present, -jnp.inf, keys)
  rank = jnp.argsort(jnp.argsort(-keys))
  return present | ((rank < missing) & jnp.isfinite(keys))


def searched_classes(
  drawn: Bool[Array, "k"],
  labels: Int[Array, "b n"],
  negative: Bool[Array, "b k"],
  not_exhaustive: Bool[Array, "b k"],
) -> Bool[Array, "b n k"]:
  """The classes that count for each roi, by what its image was searched for.

  Args:
    drawn: of `federated_classes`.
    labels: of the rois; a roi's own class counts in any case.
    negative: classes that an image is known not to show: they count for all its rois.
    not_exhaustive: classes of which an image marks some objects only: a roi that is none of these may be one
      that is not marked, so they count for no other roi.
  """
  own = labels[..., None] == jnp.arange(drawn.shape[0])
  return own | ((drawn | negative) & ~not_exhaustive)[:, None]


def balanced_weights(objects: Float[Array, "k"], beta: float) -> Float[Array, "k"]:
  """Class-balanced weights (Cui et al., arXiv 1901.05555, section 3), with a mean of one.

  Args:
    objects: of every class in the training data; a class without any has the weight 0.
    beta: 0 weighs all alike, towards 1 by the inverse of the number.
  """
  # 1 - beta^n of large n and beta near 1 keeps its digits.
  effective = -jnp.expm1(objects.astype(jnp.float32) * jnp.log(beta))
  weights = jnp.where(objects > 0, (1 - beta) / jnp.where(objects > 0, effective, 1.0), 0.0)
  return weights * (objects > 0).sum() / weights.sum()
