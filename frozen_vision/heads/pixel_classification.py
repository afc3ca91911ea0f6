"""Loss and probabilities of heads that classify every pixel by itself."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Integer
import optax

from frozen_vision.devices import sharding
from frozen_vision.ops import resize
from frozen_vision.ops.arrays import Array

IGNORE = 255  # label of a pixel without a class


def cross_entropy(
  logits: Float[Array, "b h w k"], labels: Integer[Array, "b y x"], *, stride: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Mean cross entropy of the labelled pixels at full resolution, and the fraction of them that is right.

  Logits are brought to the labels' size as PyTorch implementations do, bilinearly, one image at a time: 150
  classes at 640 x 640 px are 0.25 GB an image, which the backward pass makes again instead of keeping them.

  Args:
    labels: class index, or `IGNORE`.
    stride: input pixels per cell of the logits.

  Returns:
    (loss, accuracy), float32; both 0 if no pixel is labelled.
  """

  @jax.checkpoint
  def sums(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    full = resize.upsample(logits[None].astype(jnp.float32), stride, labels.shape)[0]
    known = labels != IGNORE
    labels = jnp.where(known, labels, 0).astype(jnp.int32)
    losses = optax.softmax_cross_entropy_with_integer_labels(full, labels)
    right = jnp.argmax(full, axis=-1) == labels

    def count(x):
      return jnp.sum(jnp.where(known, x, 0).astype(jnp.float32))

    return count(losses), count(right), count(1)

  each = sharding.per_device(lambda *pair: jax.lax.map(lambda pair: sums(*pair), pair))
  loss, right, count = (jnp.sum(x) for x in each(logits, labels))
  count = jnp.maximum(count, 1.0)
  return loss / count, right / count


def probabilities(
  logits: Float[Array, "b h w k"], size: tuple[int, int], *, stride: int
) -> Float[Array, "b y x k"]:
  """Softmax of the logits brought to `size`, the padded input's (height, width)."""
  return jax.nn.softmax(resize.upsample(logits.astype(jnp.float32), stride, size), axis=-1)
