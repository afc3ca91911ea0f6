"""ConvNeXt as Flax NNX modules."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float

from frozen_vision.backbones import base
from frozen_vision.backbones.convnext import architecture, folded
from frozen_vision.backbones.convnext.architecture import ConvNeXtConfig, NORM_EPSILON
from frozen_vision.layers import patches, stages
from frozen_vision.layers.convolution import Conv, ConvSpec
from frozen_vision.layers.mlp import linear, Mlp
from frozen_vision.layers.norms import LayerNorm
from frozen_vision.layers.residual import drop_path, LayerScale
from frozen_vision.ops.arrays import Array


class Block(nnx.Module):
  """x + LayerScale(MLP(LayerNorm(depthwise 7 x 7)))."""

  def __init__(self, config: ConvNeXtConfig, spec: ConvSpec, drop_path: float, *, dtype: Any, rngs: nnx.Rngs):
    self.drop_path = drop_path
    self.depthwise = Conv(spec, same=False, dtype=dtype, rngs=rngs)
    self.norm = LayerNorm(spec.outputs, epsilon=NORM_EPSILON, rngs=rngs)
    self.mlp = Mlp(spec.outputs, 4 * spec.outputs, dtype=dtype, rngs=rngs)
    self.scale = LayerScale(spec.outputs, config.layer_scale)

  def __call__(self, x: Float[Array, "b h w c"], rng: Array | None = None) -> Float[Array, "b h w c"]:
    y = self.scale(self.mlp(self.norm(self.depthwise(x))))
    return x + drop_path(y, self.drop_path, rng)


class Downsample(nnx.Module):
  """A LayerNorm and a 2 x 2 convolution of stride 2; in the stem a 4 x 4 convolution and a LayerNorm."""

  def __init__(self, size: int, inputs: int, outputs: int, *, stem: bool, dtype: Any, rngs: nnx.Rngs):
    self.size = size
    self.stem = stem
    self.norm = LayerNorm(outputs if stem else inputs, epsilon=NORM_EPSILON, rngs=rngs)
    self.proj = linear(size * size * inputs, outputs, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    if self.stem:
      return self.norm(self.proj(patches.patches(x, self.size)))
    return self.proj(patches.patches(self.norm(x), self.size))


class Stage(nnx.Module):
  """A downsampling layer, and the blocks after it."""

  def __init__(
    self, config: ConvNeXtConfig, stage: int, drop_paths: list[float], *, dtype: Any, rngs: nnx.Rngs
  ):
    channels = config.channels[stage]
    self.downsample = (
      Downsample(2, config.channels[stage - 1], channels, stem=False, dtype=dtype, rngs=rngs)
      if stage
      else Downsample(4, 3, channels, stem=True, dtype=dtype, rngs=rngs)
    )
    self.blocks = nnx.List(
      [Block(config, config.depthwise(stage), rate, dtype=dtype, rngs=rngs) for rate in drop_paths]
    )


class ConvNeXt(base.Backbone):
  """A ConvNeXt without its classifier; calling it gives the output of every stage, without a norm.

  Images are padded with zeros at the bottom and the right to whole cells of the coarsest level, and the maps
  are cropped back.
  """

  def __init__(self, config: ConvNeXtConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
    self.config = config
    self.dtype = dtype
    self.preprocessing = base.Preprocessing(config.mean, config.std)
    self.stages = stages.build(Stage, config, dtype=dtype, rngs=rngs)
    self.norm = LayerNorm(config.channels[-1], epsilon=NORM_EPSILON, rngs=rngs)

  @property
  def embed_dim(self) -> int:
    return self.config.channels[-1]

  def __call__(
    self, images: Float[Array, "b h w 3"], *, rng: jax.Array | None = None
  ) -> tuple[Float[Array, "b _h _w _c"], ...]:
    """Features of every stage; see `Backbone.__call__`."""
    specs = self.feature_specs
    x = patches.pad_to_multiple(images.astype(self.dtype), specs[-1].stride)
    features, number = [], 0
    for stage in self.stages:
      x = stage.downsample(x)
      for block in stage.blocks:
        x = block(x, None if rng is None else jax.random.fold_in(rng, number))
        number += 1
      features.append(x)
    return architecture.cropped(features, images.shape[1:3], specs)

  def embed(self, images: Float[Array, "b h w 3"], *, rng: jax.Array | None = None) -> Float[Array, "b d"]:
    """The last map, averaged over positions, after the final norm."""
    return self.norm(jnp.mean(self(images, rng=rng)[-1], axis=(1, 2)))

  def final_features(
    self,
    images: Float[Array, "b h w 3"],
    *,
    rng: jax.Array | None = None,
    edit_stem: base.EditStem | None = None,
  ) -> base.FinalFeatures:
    """The last map, normed at each position; classifiers norm its mean. See `Backbone.final_features`."""
    last = super().final_features(images, rng=rng, edit_stem=edit_stem)
    return base.FinalFeatures(self.norm(last.map))

  @property
  def num_depths(self) -> int:
    return sum(self.config.depths) + 1

  def depth_of(self, path: str) -> int:
    """As for SwinV2: a downsampling shares the depth of the block before it; that of stage 0 is the stem."""
    match path.split("/"):
      case ["stages", stage, "downsample", *_]:
        return sum(self.config.depths[: int(stage)])
    return base.staged_depth(path, self.config.depths)

  def feature_options(self) -> Mapping[str, Any]:
    return dict(padding="bottom-right zeros to whole cells of the coarsest level")

  def fold(
    self,
    *,
    storage: str | None = None,
    dtype: Any = None,
    scan: bool = True,
    read: Callable[[str, nnx.Module], nnx.Module] | None = None,
    shardings: folded.FoldedConvNeXt | None = None,
  ) -> folded.FoldedConvNeXt:
    return folded.fold(self, storage=storage, dtype=dtype, scan=scan, read=read, shardings=shardings)
