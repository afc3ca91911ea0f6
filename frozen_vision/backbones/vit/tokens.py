"""Images to patch tokens and back to maps: what a ViT and its folded program do alike."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from frozen_vision.backbones.base import FinalFeatures
from frozen_vision.backbones.vit import positions
from frozen_vision.backbones.vit.config import ViTConfig
from frozen_vision.layers.patches import pad_to_multiple
from frozen_vision.ops.arrays import Array


def align_to_stride(images: Float[Array, "b h w 3"], config: ViTConfig) -> Float[Array, "b _ _ 3"]:
  """Resizes images by patch_size / stride, so that one patch is one cell of `stride` pixels of the frame."""
  stride = config.cell_size
  if stride == config.patch_size:
    return images
  x = pad_to_multiple(images, stride)
  height, width = (side // stride * config.patch_size for side in x.shape[1:3])
  return jax.image.resize(x, (x.shape[0], height, width, 3), "linear").astype(images.dtype)


def split_heads(x: Float[Array, "b n c"], heads: int) -> Float[Array, "b n heads d"]:
  return x.reshape(*x.shape[:2], heads, -1)


def with_prefix(x: Float[Array, "b n c"], prefix: Float[Array, "p c"]) -> Float[Array, "b _ c"]:
  """Puts tokens that are the same for every image before those of the patches."""
  prefix = jnp.broadcast_to(prefix.astype(x.dtype), (x.shape[0], *prefix.shape))
  return jnp.concatenate([prefix, x], axis=1)


def to_map(tokens: Float[Array, "b n c"], size: tuple[int, int], prefix: int) -> Float[Array, "b _h _w c"]:
  """The tokens of the patches as a map."""
  return tokens[:, prefix:].reshape(tokens.shape[0], *size, tokens.shape[-1])


def final_features(tokens: Float[Array, "b n c"], size: tuple[int, int], config: ViTConfig) -> FinalFeatures:
  """Normed tokens as a map and a class token."""
  class_token = tokens[:, 0] if config.class_token else None
  return FinalFeatures(to_map(tokens, size, config.prefix_tokens), class_token)


def relative_bias(
  table: Float[Array, "offsets heads"], size: tuple[int, int], config: ViTConfig
) -> Float[Array, "heads n n"]:
  """`positions.relative_bias` of a network for patches of `size` rows and columns."""
  return positions.relative_bias(
    table, config.position_grid, size, config.class_token, config.position_resize
  )
