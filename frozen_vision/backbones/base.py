"""The contract of backbones: what necks, heads, tasks, freezing and planning may count on."""

import abc
from collections.abc import Mapping
import dataclasses
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
  """One feature level.

  Attributes:
    stride: input pixels per cell, along both axes.
    channels: size of the last axis.
  """

  stride: int
  channels: int


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """What images must look like for a backbone's weights.

  Attributes:
    mean, std: of RGB values in 0..1, subtracted and divided by.
    input_scale: factor by which the backbone resizes images before it cuts them into patches, such as 14/16
      for patches of 14 pixels whose grid is to have a stride of 16 in the pixels of the frame; 1 for none.
  """

  mean: tuple[float, float, float] = IMAGENET_MEAN
  std: tuple[float, float, float] = IMAGENET_STD
  input_scale: float = 1.0

  def normalise(
    self, images: Num[Array, "b h w 3"], image_size: Int[Array, "b 2"] | None = None
  ) -> Float[Array, "b h w 3"]:
    """RGB 0..255 to what the backbone was trained on; padding becomes 0, the mean colour.

    Args:
      images: RGB in 0..255, uint8 as a rule.
      image_size: (height, width) of each image's content at the top left; None if all is content.

    Returns:
      float32, of the same size.
    """
    x = (images.astype(jnp.float32) / 255 - jnp.asarray(self.mean)) / jnp.asarray(self.std)
    if image_size is None:
      return x
    rows = jnp.arange(images.shape[1])[None, :] < image_size[:, :1]
    columns = jnp.arange(images.shape[2])[None, :] < image_size[:, 1:]
    return jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], x, 0)


class Backbone(nnx.Module):
  """A pretrained image model without its classifier.

  A backbone holds what public checkpoints hold and no more: a norm per output level trains, so it belongs to
  the neck. All variables of a frozen backbone are frozen state (parameters, BatchNorm statistics, rotary
  periods): they are in its fingerprint, its file, its feature key and its folded program.

  Attributes:
    config: a frozen dataclass of sizes, one row of the family's table.
    dtype: of the inputs of matrix products; norms, softmax and positions are computed in float32.
    preprocessing: what images must look like.
    sharding_rules: for each pattern of a leaf's whole path, canonical or folded, the axes along which it may
      be sharded, the preferred one first, counted from the end (-1: the last). A large leaf without a rule is
      an error (`devices.sharding`).
    no_weight_decay: patterns of whole parameter paths that weight decay leaves out when the backbone trains,
      beside vectors.
  """

  config: Any
  dtype: Any
  preprocessing: Preprocessing = Preprocessing()
  sharding_rules: ClassVar[tuple[tuple[str, tuple[int, ...]], ...]] = ()
  no_weight_decay: ClassVar[tuple[str, ...]] = ()

  @property
  @abc.abstractmethod
  def feature_specs(self) -> tuple[FeatureSpec, ...]:
    """The levels of `__call__`, fine to coarse. A plain ViT has several levels of one stride."""

  @property
  @abc.abstractmethod
  def embed_dim(self) -> int:
    """Size of `embed`'s vectors."""

  @abc.abstractmethod
  def __call__(
    self, images: Float[Array, "b h w 3"], *, rng: jax.Array | None = None
  ) -> tuple[Float[Array, "b _h _w _c"], ...]:
    """Features of every level.

    Args:
      images: normalised (`preprocessing.normalise`), any height and width.
      rng: key of stochastic depth while the backbone itself trains; None is deterministic.

    Returns:
      One map [b, ceil(h / stride), ceil(w / stride), channels] for each of `feature_specs`.
    """

  @abc.abstractmethod
  def embed(self, images: Float[Array, "b h w 3"], *, rng: jax.Array | None = None) -> Float[Array, "b d"]:
    """One vector per image, what classifiers, linear probes and nearest neighbours read."""

  @property
  @abc.abstractmethod
  def num_depths(self) -> int:
    """Depths of layer-wise decay, stem and blocks; a head has depth `num_depths`."""

  @abc.abstractmethod
  def depth_of(self, path: str) -> int:
    """Depth of a variable for layer-wise decay: 0 for the stem, growing to `num_depths - 1`.

    Args:
      path: of the variable within the backbone, such as `stages/2/blocks/0/mlp/fc1/kernel`.
    """

  @abc.abstractmethod
  def feature_options(self) -> Mapping[str, Any]:
    """Every setting beside weights, dtype and preprocessing that changes features, as JSON."""

  @abc.abstractmethod
  def fold(
    self,
    *,
    storage: str | None = None,
    dtype: Any = None,
    scan: bool = True,
    read: Any = None,
    shardings: Any = None,
  ) -> Any:
    """The backbone's inference program: a pytree that is called like it.

    Args:
      storage: dtype of the stored matrices, "float32", "bfloat16" or "int8"; by default that of `dtype`.
      dtype: of the inputs of matrix products; the backbone's by default.
      scan: stack runs of equal blocks, so that they compile once.
      read: (path, part of the backbone) -> that part with its weights, where the backbone holds shapes only;
        one block is read, folded and stored before the next.
      shardings: of every leaf of the result.
    """
