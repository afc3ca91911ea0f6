"""Mixup and cutmix: training examples blended with others of their batch, on the device."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, PRNGKeyArray

from frozen_vision.ops.arrays import Array


def mixup_cutmix(
  images: Float[Array, "b h w c"],
  labels: Float[Array, "b k"],
  key: PRNGKeyArray,
  *,
  mixup_alpha: float = 0.8,
  cutmix_alpha: float = 1.0,
  switch_prob: float = 0.5,
  prob: float = 1.0,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b k"]]:
  """Blends a batch with itself in reverse order, by one draw per batch (timm's mode `batch`).

  Mixup (Zhang et al. 2018, arXiv:1710.09412) averages whole images; cutmix (Yun et al. 2019,
  arXiv:1905.04899) replaces one rectangle, and its labels follow the fraction of pixels that it
  really covers. The weight of the image itself is drawn from Beta(alpha, alpha).

  Args:
    images: in any linear scale.
    labels: one-hot, or smoothed: any rows that sum to 1.
    key: a new one for every batch.
    mixup_alpha: 0 switches mixup off.
    cutmix_alpha: 0 switches cutmix off.
    switch_prob: probability of cutmix where both are on.
    prob: probability of mixing at all.

  Returns:
    Images and labels of the same shapes and dtypes.
  """
  if mixup_alpha < 0 or cutmix_alpha < 0:
    raise ValueError(f"mixup_alpha is {mixup_alpha} and cutmix_alpha is {cutmix_alpha}; expected 0 or more.")
  if not mixup_alpha and not cutmix_alpha:
    return images, labels
  use_key, switch_key, mixup_key, cutmix_key, box_key = jax.random.split(key, 5)
  use = jax.random.bernoulli(use_key, prob)
  # Both are a weight of the image itself per pixel, so one expression serves both.
  weights = []
  if cutmix_alpha:
    own = jax.random.beta(cutmix_key, cutmix_alpha, cutmix_alpha, dtype=jnp.float32)
    inside = _random_box(box_key, images.shape[1:3], own)
    weights.append(1.0 - inside.astype(jnp.float32))
  if mixup_alpha:
    own = jax.random.beta(mixup_key, mixup_alpha, mixup_alpha, dtype=jnp.float32)
    weights.append(jnp.broadcast_to(own, images.shape[1:3]))
  use_cutmix = jax.random.bernoulli(switch_key, switch_prob)
  weight = weights[0] if len(weights) == 1 else jnp.where(use_cutmix, *weights)
  weight = jnp.where(use, weight, 1.0)
  label_weight = jnp.mean(weight)
  pixel_weight = weight[None, :, :, None]
  mixed = images * pixel_weight + images[::-1] * (1.0 - pixel_weight)
  mixed_labels = labels * label_weight + labels[::-1] * (1.0 - label_weight)
  return mixed.astype(images.dtype), mixed_labels.astype(labels.dtype)


def _random_box(key: PRNGKeyArray, size: tuple[int, int], weight: Float[Array, ""]) -> Bool[Array, "h w"]:
  """A rectangle of the area's fraction 1 - weight around a uniform centre, cut at the border."""
  inside = []
  for axis_key, length in zip(jax.random.split(key), size):
    half = jnp.floor(length * jnp.sqrt(1.0 - weight)).astype(jnp.int32) // 2
    centre = jax.random.randint(axis_key, (), 0, length)
    position = jnp.arange(length)
    inside.append((position >= centre - half) & (position < centre + half))
  return inside[0][:, None] & inside[1][None, :]
