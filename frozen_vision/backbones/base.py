"""The contract of backbones: what necks, heads, tasks, freezing and planning may count on."""

import abc
from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, ClassVar, NamedTuple, Self

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Num
import numpy as np

from frozen_vision import messages
from frozen_vision.devices import sharding
from frozen_vision.ops.arrays import Array

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

ShardingRules = sharding.Rules
# Matrices, kernels of convolutions, and vectors; what more a family has, it adds to these.
COMMON_SHARDING_RULES: ShardingRules = (
  (r"(.*/)?kernel(/values)?", (-1, -2)),  # [..., inputs, outputs]
  (r"(.*/)?(bias|scale|mean|var)", (-1,)),
)


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
  """The preprocessing of images that a backbone's weights expect.

  Attributes:
    mean, std: of RGB values in 0..1, subtracted and divided by.
    input_scale: factor by which the backbone resizes images before it cuts them into patches, such as 14/16
      for patches of 14 pixels whose grid is to have a stride of 16 in the pixels of the frame; 1 for none.
  """

  mean: tuple[float, float, float] = IMAGENET_MEAN
  std: tuple[float, float, float] = IMAGENET_STD
  input_scale: float = 1.0

  def denormalise(self, normalised: Float[Array, "... 3"]) -> Float[Array, "... 3"]:
    """Undoes `normalise`: RGB in 0..255, as far as the values are those of an image."""
    return (normalised * jnp.asarray(self.std) + jnp.asarray(self.mean)) * 255

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


def normalise(
  images: Num[Array, "b h w 3"], image_size: Int[Array, "b 2"] | None = None
) -> Float[Array, "b h w 3"]:
  """`Preprocessing.normalise` by ImageNet's statistics; a backbone's own are in `backbone.preprocessing`."""
  return Preprocessing().normalise(images, image_size)


@dataclasses.dataclass(frozen=True)
class BackboneConfig(abc.ABC):
  """Sizes of a backbone: one row of its family's table, and what a weights file remembers as JSON.

  Attributes:
    weightless: names of the fields that change neither the names nor the shapes of variables, so that weights
      fit whatever they are. In all others a weights file and the row that names it must agree.
    computational: those of them that say how a machine computes the same features; weights files leave them
      out.
  """

  weightless: ClassVar[tuple[str, ...]] = ()
  computational: ClassVar[tuple[str, ...]] = ()

  @property
  @abc.abstractmethod
  def feature_specs(self) -> tuple[FeatureSpec, ...]:
    """The levels of a backbone of these sizes, fine to coarse."""

  def replace(self, **overrides: Any) -> Self:
    """A copy with fields replaced; lists, as JSON and the command line have them, become tuples.

    Raises:
      ValueError: a field that does not exist; the message lists those that do.
    """
    fields = [field.name for field in dataclasses.fields(self)]
    for name in overrides:
      if name not in fields:
        raise ValueError(messages.unknown("backbone option", name, fields))
    return dataclasses.replace(self, **tuples(overrides))


class FinalFeatures(NamedTuple):
  """Last features of a backbone, after its final norm.

  Attributes:
    map: the last level.
    class_token: of a plain ViT that has one; None otherwise.
  """

  map: Float[Array, "b h w c"]
  class_token: Float[Array, "b c"] | None = None


class AttentionWeights(NamedTuple):
  """What one block attends to.

  Attributes:
    weights: of every query over all keys, sums of 1; groups are the windows of an image, one of a plain ViT.
    positions: (row, column) of each token's centre in pixels of the image, NaN of one without a place: class
      token, registers, and cells of padding.
  """

  weights: Float[Array, "b groups heads n n"]
  positions: Float[np.ndarray, "groups n 2"]


# Changes the map that enters the first block, [b, rows, columns, c]; its shape and dtype stay.
EditStem = Callable[[Float[Array, "b rows columns c"]], Float[Array, "b rows columns c"]]


class Backbone(nnx.Module):
  """A pretrained image model without its classifier.

  A backbone holds what public checkpoints hold and no more: a norm per output level trains, so it belongs to
  the neck. All variables of a frozen backbone are frozen state (parameters, BatchNorm statistics, rotary
  periods): they are in its fingerprint, its file, its feature key and its folded program. What does not train
  is put into inference mode by attributes of its modules: `use_running_average`, `deterministic`, and
  `drop_path`, which is the rate of stochastic depth wherever a module has it (`freezing.partition`).

  The constructor of every family is `(config, *, dtype, rngs)`.

  Attributes:
    config: sizes, one row of the family's table.
    dtype: of the inputs of matrix products; norms, softmax and positions are computed in float32.
    preprocessing: what images must look like.
    sharding_rules: how large leaves are split over devices. A large leaf without a rule is an error
      (`devices.sharding`).
    no_weight_decay: patterns of whole parameter paths within the backbone that weight decay leaves out when
      the backbone trains, beside vectors.
  """

  config: BackboneConfig
  dtype: Any
  preprocessing: Preprocessing = Preprocessing()
  sharding_rules: ClassVar[ShardingRules] = COMMON_SHARDING_RULES
  no_weight_decay: ClassVar[tuple[str, ...]] = ()

  @property
  def feature_specs(self) -> tuple[FeatureSpec, ...]:
    """The levels of `__call__`, fine to coarse. A plain ViT has several levels of one stride."""
    return self.config.feature_specs

  @property
  def embed_dim(self) -> int:
    """Size of `embed`'s vectors; by default the channels of the last level."""
    return self.feature_specs[-1].channels

  @property
  def stem_channels(self) -> int | None:
    """Channels of the patch embedding that `final_features` lets one edit; None where there is none."""
    return None

  def attention_weights(self, images: Float[Array, "b h w 3"]) -> tuple[AttentionWeights, ...]:
    """What every block attends to, float32; all of it is in memory at once.

    Raises:
      ValueError: a backbone without self-attention.
    """
    raise ValueError(f"{type(self).__name__} has no self-attention; SwinV2 and plain ViTs have.")

  @abc.abstractmethod
  def __call__(
    self, images: Float[Array, "b h w 3"], *, rng: jax.Array | None = None
  ) -> tuple[Float[Array, "b _h _w _c"], ...]:
    """Features of every level.

    Args:
      images: normalised (`preprocessing.normalise`), any height and width.
      rng: key of stochastic depth while the backbone itself trains; None is deterministic: a BatchNorm then
        normalises by its running statistics, so that the features of an image do not depend on its batch.

    Returns:
      One map [b, ceil(h / stride), ceil(w / stride), channels] for each of `feature_specs`.
    """

  def embed(self, images: Float[Array, "b h w 3"], *, rng: jax.Array | None = None) -> Float[Array, "b d"]:
    """One vector per image, what classifiers, linear probes and nearest neighbours read.

    By default the mean of the last level over all positions.
    """
    return jnp.mean(self(images, rng=rng)[-1], axis=(1, 2))

  def final_features(
    self, images: Float[Array, "b h w 3"], *, rng: jax.Array | None = None, edit_stem: EditStem | None = None
  ) -> FinalFeatures:
    """The last map after the final norm, what pretraining and distillation predict from.

    By default the last level as it is.

    Args:
      images, rng: as for `__call__`.
      edit_stem: replaces cells of the stem's output by mask tokens, for instance.

    Raises:
      ValueError: `edit_stem` for a family whose stem is not a map of patches.
    """
    if edit_stem is not None:
      raise ValueError(
        f"A {type(self).__name__} has no patch embedding that could be masked; take a SwinV2 or a plain ViT."
      )
    return FinalFeatures(self(images, rng=rng)[-1])

  @property
  @abc.abstractmethod
  def num_depths(self) -> int:
    """Depths of layer-wise decay, stem and blocks; a head has depth `num_depths`."""

  @abc.abstractmethod
  def depth_of(self, path: str) -> int:
    """Depth of a variable for layer-wise decay: 0 for the stem, `num_depths` for what follows all blocks.

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
    read: Callable[[str, nnx.Module], nnx.Module] | None = None,
    shardings: Any = None,
  ) -> "FoldedBackbone":
    """The backbone's inference program. `layers.storage` has what families share of it.

    Args:
      storage: dtype of the stored matrices, "float32", "bfloat16" or "int8"; by default that of `dtype`.
      dtype: of the inputs of matrix products; the backbone's by default.
      scan: stack runs of equal blocks, so that they compile once.
      read: (path, part of the backbone) -> that part with its weights, where the backbone holds shapes only;
        one block is read, folded and stored before the next.
      shardings: of every leaf of the result.

    Raises:
      ValueError: an unknown `storage`.
    """

  def stacked(self, *, remat: bool = True) -> Any:
    """The backbone as a program that trains at the least cost, for plans: equal blocks scanned.

    It is called like the backbone, and its leaves are float32 `nnx.Param`s. The default, for families whose
    blocks are few, is the backbone itself.

    Args:
      remat: compute each block again on the way back.
    """
    del remat
    return self


class BlockShape(NamedTuple):
  """Channels that enter a block, and that leave it."""

  inputs: int
  outputs: int


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FoldedBackbone(abc.ABC):
  """A frozen backbone as an inference program: a pytree that is called like the backbone.

  A family's class is a frozen dataclass, registered with `jax.tree_util.register_dataclass`, whose fields
  hold trees of `layers.storage.Folded` leaves; the fields here are static. In the place of the backbone in a
  module (`module.backbone = nnx.data(folded)`) its leaves are part of the module's state. It is made from the
  canonical module, is never saved, and gives the same features.

  Attributes:
    config, preprocessing, feature_specs, embed_dim: of the backbone.
    dtype: of the inputs of matrix products.
    storage: how matrices are stored, one of `layers.storage.KINDS`; int8 has a scale per output channel.
    sharding_rules: of the backbone.
    remat: blocks are computed again on the way back, where gradients cross them: of a backbone that trains
      (`Backbone.stacked`), or that has adapters (`freezing.adapters`).
  """

  config: BackboneConfig = dataclasses.field(metadata=dict(static=True))
  preprocessing: Preprocessing = dataclasses.field(metadata=dict(static=True))
  embed_dim: int = dataclasses.field(metadata=dict(static=True))
  dtype: Any = dataclasses.field(metadata=dict(static=True))
  storage: str = dataclasses.field(metadata=dict(static=True))
  sharding_rules: ShardingRules = dataclasses.field(metadata=dict(static=True))
  remat: bool = dataclasses.field(default=False, metadata=dict(static=True))

  @property
  def feature_specs(self) -> tuple[FeatureSpec, ...]:
    return self.config.feature_specs

  def block_shape(self, stage: int, index: int) -> BlockShape:
    """The channels of a block, for the adapter in it.

    A family that takes adapters has a field `stages`: for each what `storage.fold_blocks` makes, and perhaps
    `first`, leaves of the block before. Its blocks end with `layers.adapters.adapted`.

    Args:
      index: 0 for the first block of the stage, 1 for every other.

    Raises:
      ValueError: a family that takes none.
    """
    raise ValueError(
      f"{type(self).__name__} takes no adapters; set --config.adapters.kind=none, or take a backbone of "
      "another family."
    )

  @abc.abstractmethod
  def __call__(
    self, images: Float[Array, "b h w 3"], *, rng: jax.Array | None = None
  ) -> tuple[Float[Array, "b _h _w _c"], ...]:
    """Features of every level; see `Backbone.__call__`. It is deterministic: `rng` has no effect."""

  def embed(self, images: Float[Array, "b h w 3"], *, rng: jax.Array | None = None) -> Float[Array, "b d"]:
    """One vector per image; see `Backbone.embed`."""
    return jnp.mean(self(images)[-1], axis=(1, 2))

  def final_features(self, images: Float[Array, "b h w 3"]) -> FinalFeatures:
    """The last map after the final norm; see `Backbone.final_features`."""
    return FinalFeatures(self(images)[-1])


class _OneKey(nnx.RngStream):
  """A stream whose every draw is the same key."""

  def __call__(self) -> jax.Array:
    return self.key[...]


def abstract(
  module: Callable[..., Backbone], config: BackboneConfig, *, dtype: Any = jnp.float32
) -> Backbone:
  """A backbone with shapes in the place of weights.

  Shapes do not depend on keys, so all parameters draw the same one. A stream that counts its draws makes
  tracing quadratic in the number of parameters: Flax asks the traced count for its sharding at every draw,
  and for its message that there is none JAX searches the whole program.

  Args:
    module: builds the backbone: `module(config, dtype=dtype, rngs=rngs)`.
  """

  def build() -> Backbone:
    rngs = nnx.Rngs(0)
    rngs.default = _OneKey(jax.random.key(0), tag="default")
    return module(config, dtype=dtype, rngs=rngs)

  return nnx.eval_shape(build)


def static_fields(backbone: Backbone, *, dtype: Any, storage: str) -> dict[str, Any]:
  """The static fields of a `FoldedBackbone`."""
  return dict(
    config=backbone.config,
    preprocessing=backbone.preprocessing,
    embed_dim=backbone.embed_dim,
    dtype=dtype,
    storage=storage,
    sharding_rules=backbone.sharding_rules,
  )


def tuples(options: Mapping[str, Any]) -> dict[str, Any]:
  """Options whose lists are tuples."""
  return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


def staged_depth(path: str, depths: Sequence[int], *, stem: str = "stem") -> int:
  """`Backbone.depth_of` of a network of a stem, `stages/S/blocks/B`, and what follows them.

  As SimMIM's finetuning: blocks count from 1, and a downsampling shares the depth of the block before it.

  Args:
    path: of a variable within the backbone.
    depths: blocks per stage.
    stem: the first part of the stem's paths.
  """
  parts = path.split("/")
  if parts[0] == stem:
    return 0
  if parts[0] != "stages":
    return sum(depths) + 1
  stage = int(parts[1])
  if parts[2] == "downsample":
    return sum(depths[: stage + 1])
  return sum(depths[:stage]) + int(parts[3]) + 1
