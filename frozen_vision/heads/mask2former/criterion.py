"""Matching and losses of Mask2Former (Cheng et al. 2022, section 3.3), over all predictions of a pass.

Predictions are matched and scored one after the other, in loops whose body is computed again in the gradient,
and only masks with a segment are multiplied out: memory hardly depends on the number of predictions.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, PRNGKeyArray
import optax

from frozen_vision.heads.mask2former import points as point_ops
from frozen_vision.heads.mask2former.config import MaskLossConfig
from frozen_vision.ops.arrays import Array

_LARGE = 1e6  # stands for a cost that is no finite number


class Targets(NamedTuple):
  """The truth of a batch: segment i of an image covers the pixels `labels == segment_labels[i]`."""

  labels: Array  # int [b, H, W]
  segment_labels: Array  # int [b, s]
  segment_valid: Array  # bool [b, s]


@runtime_checkable
class MaskPredictions(Protocol):
  """Predictions of a pass, a pytree; masks may be kept as factors, of which only some are multiplied out.

  Attributes:
    class_logits: float32 [p, b, q, num_classes + 1]; the last class is "no object".
    factors: [p, b, q, ...], what the masks of the queries are made of.
  """

  class_logits: Array

  @property
  def factors(self) -> Array: ...

  def multiplied(self, factors: Array) -> Float[Array, "b n h w"]:
    """Mask logits, float32, of some factors of one prediction [b, n, ...]."""


class Points(NamedTuple):
  """Places at which masks are compared, (x, y) as shares of the image."""

  matching: Array  # [b, n, 2], shared by all masks of an image
  candidates: Array  # [b, s, c, 2]; each segment's loss takes those where its mask is least certain
  others: Array  # [b, s, o, 2]; it takes all of these


class Matches(NamedTuple):
  """The query of every segment."""

  query: Array  # int32 [..., s]; of no meaning where not matched
  matched: Array  # bool [..., s]


def draw_points(rng: PRNGKeyArray, batch: int, segments: int, config: MaskLossConfig) -> Points:
  """Uniform points for one prediction."""
  keys = jax.random.split(rng, 3)
  shapes = (
    (batch, config.num_points, 2),
    (batch, segments, config.num_candidates, 2),
    (batch, segments, config.num_points - config.num_important, 2),
  )
  return Points(*(jax.random.uniform(key, shape) for key, shape in zip(keys, shapes)))


def criterion(
  predictions: MaskPredictions,
  targets: Targets,
  config: MaskLossConfig,
  points: PRNGKeyArray | Points,
) -> tuple[dict[str, Float[Array, "p"]], Matches]:
  """Weighted losses of every prediction, and which query was matched to which segment.

  Pixels that belong to no segment, ignored and padded ones too, count as outside of every mask, as in the
  official code. The mask losses are sums over all segments of the whole batch over their number, at least 1;
  that is also what the official code amounts to, which divides by the mean number per process and averages
  over processes.

  Args:
    predictions: of p outputs.
    targets: segments whose label is no class count as invalid.
    config: weights and numbers of points.
    points: a key to draw them with, or the points themselves, each array with a leading axis p.

  Returns:
    {"class", "mask", "dice"} and the accuracy of the matched queries' classes, in percent; Matches with
    leading p.
  """
  labels = targets.segment_labels.astype(jnp.int32)
  valid = targets.segment_valid & (labels >= 0) & (labels < config.num_classes)
  targets = Targets(targets.labels, labels, valid)
  if isinstance(points, Points):

    def draw(drawn):
      return drawn
  else:
    points = jax.random.split(points, predictions.class_logits.shape[0])

    def draw(key):
      return draw_points(key, *labels.shape, config)

  fixed = jax.lax.stop_gradient(predictions)

  def cost(step):
    class_logits, factors, drawn = step
    masks = jnp.moveaxis(fixed.multiplied(factors), 1, -1)
    return matching_cost(class_logits, masks, targets, draw(drawn).matching, config)

  matches = match(jax.lax.map(cost, (fixed.class_logits, fixed.factors, points)), valid)

  @jax.checkpoint
  def losses(step):
    class_logits, factors, drawn, matches = step
    drawn = draw(drawn)
    found, accuracy = class_loss(class_logits, targets, matches, config)
    query = jnp.minimum(matches.query, factors.shape[1] - 1)
    query = query.reshape(*query.shape, *(1,) * (factors.ndim - 2))
    masks = predictions.multiplied(jnp.take_along_axis(factors, query, axis=1))
    bce, dice = mask_losses(masks, targets, matches, drawn.candidates, drawn.others, config)
    return {
      "class": config.class_weight * found,
      "mask": config.mask_weight * bce,
      "dice": config.dice_weight * dice,
      "accuracy": accuracy,
    }

  steps = (predictions.class_logits, predictions.factors, points, matches)
  return jax.lax.map(losses, steps), matches


def matching_cost(
  class_logits: Float[Array, "b q k"],
  masks: Float[Array, "b h w q"],
  targets: Targets,
  points: Float[Array, "b n 2"],
  config: MaskLossConfig,
) -> Float[Array, "b s q"]:
  """Costs of matching each segment to each query: class (minus its probability), cross-entropy and dice."""
  labels = jnp.clip(targets.segment_labels, 0, class_logits.shape[-1] - 1)
  probabilities = jnp.swapaxes(jax.nn.softmax(class_logits, axis=-1), 1, 2)
  class_cost = -jnp.take_along_axis(probabilities, labels[..., None], axis=1)
  logits = point_ops.sample_shared(masks, points)
  truth = point_ops.sample_segments(targets.labels, labels, points[:, None])

  def pairs(x):
    return jnp.einsum("bsn,bnq->bsq", truth, x, precision=jax.lax.Precision.HIGHEST)

  # Cross-entropy is softplus(x) - x t: one product serves positive and negative points.
  bce = (jax.nn.softplus(logits).sum(axis=1)[:, None] - pairs(logits)) / points.shape[1]
  inside = jax.nn.sigmoid(logits)
  size = inside.sum(axis=1)[:, None] + truth.sum(axis=-1)[..., None]
  dice = 1 - (2 * pairs(inside) + 1) / (size + 1)
  return config.class_weight * class_cost + config.mask_weight * bce + config.dice_weight * dice


def match(cost: Float[Array, "*p b s q"], valid: Bool[Array, "b s"]) -> Matches:
  """The assignment of least total cost: as many valid segments as there are queries get one of their own.

  Costs that are not finite count as very large.
  """
  segments, queries = cost.shape[-2:]
  cost = jnp.clip(jnp.nan_to_num(cost, nan=_LARGE, neginf=_LARGE), -_LARGE, _LARGE)
  valid = jnp.broadcast_to(valid, cost.shape[:-1])
  # All queries cost an invalid segment the same, so it takes one that the valid ones leave over.
  cost = jnp.where(valid[..., None], cost, 0.0)
  if segments > queries:
    # The rest stays without: places that a valid segment takes only if it must, and an invalid one as gladly
    # as any.
    none = jnp.where(valid, cost.max(axis=(-2, -1), keepdims=True)[..., 0] + 1, 0.0)
    none = jnp.broadcast_to(none[..., None], (*none.shape, segments - queries))
    cost = jnp.concatenate([cost, none], axis=-1)

  def assign(cost):
    rows, columns = optax.assignment.hungarian_algorithm(cost)
    return jnp.zeros(segments, jnp.int32).at[rows].set(columns.astype(jnp.int32))

  query = jnp.vectorize(assign, signature="(s,q)->(s)")(cost)
  return Matches(query, valid & (query < queries))


def class_loss(
  logits: Float[Array, "b q k"], targets: Targets, matches: Matches, config: MaskLossConfig
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Cross-entropy of all queries, those without a segment weighted less; accuracy of the matched (%)."""
  b, queries, classes = logits.shape
  place = jnp.where(matches.matched, matches.query, queries)  # out of range: dropped
  truth = jnp.full((b, queries), classes - 1, jnp.int32)
  truth = truth.at[jnp.arange(b)[:, None], place].set(targets.segment_labels, mode="drop")
  has_segment = truth < classes - 1
  weight = jnp.where(has_segment, 1.0, config.no_object_weight)
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, truth)
  right = has_segment & (logits.argmax(axis=-1) == truth)
  accuracy = 100.0 * right.sum() / jnp.maximum(has_segment.sum(), 1)
  return (loss * weight).sum() / jnp.maximum(weight.sum(), 1e-6), accuracy


def mask_losses(
  masks: Float[Array, "b s h w"],
  targets: Targets,
  matches: Matches,
  candidates: Float[Array, "b s c 2"],
  others: Float[Array, "b s o 2"],
  config: MaskLossConfig,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Cross-entropy and dice of the matched masks, at points most of which lie where they are least certain.

  Args:
    masks: logits of each segment's query.
    targets, matches: of the same segments.
    candidates, others: see Points.
    config: numbers of points.
  """
  places = point_ops.choose_points(jax.lax.stop_gradient(masks), candidates, others, config.num_important)
  logits = point_ops.sample_maps(masks, places)
  truth = point_ops.sample_segments(targets.labels, targets.segment_labels, places)
  bce = (jax.nn.softplus(logits) - logits * truth).mean(axis=-1)
  inside = jax.nn.sigmoid(logits)
  size = inside.sum(axis=-1) + truth.sum(axis=-1)
  dice = 1 - (2 * (inside * truth).sum(axis=-1) + 1) / (size + 1)
  count = jnp.maximum(targets.segment_valid.sum(), 1).astype(jnp.float32)

  def total(loss):
    return jnp.where(matches.matched, loss, 0.0).sum() / count

  return total(bce), total(dice)
