"""Mirroring the content of padded images."""

import jax.numpy as jnp
from jaxtyping import Int, Num

from frozen_vision.ops.arrays import Array


def mirror(images: Num[Array, "b h w c"], image_size: Int[Array, "b 2"]) -> Num[Array, "b h w c"]:
  """Mirrors the content of padded images left to right; it stays at the left, and the padding where it is."""
  columns = jnp.arange(images.shape[2])
  source = image_size[:, 1:] - 1 - columns
  source = jnp.where(source >= 0, source, columns)
  return jnp.take_along_axis(images, source[:, None, :, None], axis=2)
