"""Plain mask decoder (PMT, tue-mps/pmt): queries and patches of a frozen ViT in a few blocks of one sequence.

Nothing is multi-scale: taps of one stride are summed, and masks come from the patches themselves, upsampled.
Matching, losses and prediction are Mask2Former's. Of PMT's decoder this leaves out the ViT's class token and
registers, which take part in its sequence: feature maps do not have them.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Literal, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, PRNGKeyArray
import numpy as np

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.backbones.vit import positions
from frozen_vision.heads.mask2former.config import MaskLossConfig
from frozen_vision.heads.mask2former.layers import default_linear
from frozen_vision.heads.mask2former.mask_head import Features, MaskHead
from frozen_vision.heads.mask2former.transformer_decoder import mask_logits
from frozen_vision.layers.attention import attention
from frozen_vision.layers.convolution import BatchNorm
from frozen_vision.layers.mlp import gelu
from frozen_vision.layers.norms import LayerNorm
from frozen_vision.layers.residual import LayerScale
from frozen_vision.layers.upsampling import Deconv2x
from frozen_vision.ops import convolution
from frozen_vision.ops.arrays import Array
from frozen_vision.ops.resize import resize_bilinear
from frozen_vision.options import Count, Natural

_ROTARY_BASE = 100.0  # of DINOv3, which PMT's blocks share
_ANNEALING_POWER = 0.9
_HEAD_CHANNELS = 64


@dataclasses.dataclass(frozen=True)
class PlainMaskConfig(MaskLossConfig):
  """Defaults are those of PMT's ADE20K recipes (image/configs/ade20k/semantic/pmt_l.yaml), without annealing.

  Attributes:
    num_classes: classes without "no object".
    num_queries: queries, hence the most segments that an image can be given (COCO's recipes: 200).
    blocks: blocks; predictions are made before the first too.
    num_heads: attention heads; 0 for one for every 64 channels, as DINOv3's S, B and L have.
    mlp_dim: hidden channels of the blocks' MLPs; 0 for the ViT's width.
    anneal_starts, anneal_ends: batches of training, for each block, between which fewer and fewer queries are
      confined to their masks, none in the end; then prediction needs no masks before the last block. Empty:
      all are, always. With gradient accumulation each part counts as a batch.
    class_weight, mask_weight, dice_weight, no_object_weight, num_points, oversample_ratio, importance_ratio:
      see `Mask2FormerConfig`.
  """

  name: Literal["plain_mask"] = "plain_mask"
  num_queries: Count = 100
  blocks: Count = 6
  num_heads: Natural = 0
  mlp_dim: Natural = 0
  anneal_starts: tuple[Natural, ...] = ()
  anneal_ends: tuple[Natural, ...] = ()

  def __post_init__(self):
    pairs = list(zip(self.anneal_starts, self.anneal_ends))
    counts = {len(self.anneal_starts), len(self.anneal_ends)}
    if counts not in ({0}, {self.blocks}) or any(start >= end for start, end in pairs):
      raise ValueError(
        f"PlainMaskConfig: anneal_starts is {self.anneal_starts}, anneal_ends is {self.anneal_ends}; "
        f"expected none of either, or one of each for the {self.blocks} blocks, starts before ends."
      )


class BatchCount(nnx.BatchStat):
  """Batches of training that went through a module: state that its forward pass changes."""


class PlainPredictions(NamedTuple):
  """Predictions of one pass; see `criterion.MaskPredictions`."""

  class_logits: Array  # float32 [p, b, q, num_classes + 1]
  masks: Array  # float32 [p, b, q, h, w]

  @property
  def factors(self) -> Array:
    return self.masks

  def multiplied(self, factors: Float[Array, "b n h w"]) -> Float[Array, "b n h w"]:
    return factors

  def mask_logits(self, index: int) -> Float[Array, "b q h w"]:
    return self.masks[index]


class _Mlp(nnx.Module):
  """Linear layers with GELU between them, PyTorch's initial values."""

  def __init__(self, *sizes: int, dtype: DTypeLike, rngs: nnx.Rngs):
    self.layers = nnx.List(
      [default_linear(i, o, dtype=dtype, rngs=rngs) for i, o in zip(sizes[:-1], sizes[1:])]
    )

  def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... d"]:
    for layer in self.layers[:-1]:
      x = gelu(layer(x))
    return self.layers[-1](x)


class _Lateral(nnx.Module):
  """A tap after BatchNorm, plus an MLP of it, times a scale per channel."""

  def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    self.norm = BatchNorm(width, epsilon=1e-5, momentum=0.1, rngs=rngs)
    self.mlp = _Mlp(width, width // 2, width, dtype=dtype, rngs=rngs)
    self.scale = LayerScale(width, 1.0)

  def __call__(self, x: Float[Array, "b h w c"], *, inference: bool) -> Float[Array, "b h w c"]:
    x = self.norm(x, inference=inference)
    return self.scale(x + self.mlp(x))


class _Block(nnx.Module):
  """DINOv3's block over queries and patches, in which queries may be confined to some patches."""

  def __init__(self, width: int, num_heads: int, mlp_dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    def linear():
      return default_linear(width, width, dtype=dtype, rngs=rngs)

    self.num_heads = num_heads
    self.norm1, self.norm2 = LayerNorm(width, rngs=rngs), LayerNorm(width, rngs=rngs)
    self.query, self.value, self.output = linear(), linear(), linear()
    self.key = nnx.Linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)
    self.scale1, self.scale2 = LayerScale(width, 1.0), LayerScale(width, 1.0)
    self.mlp = _Mlp(width, mlp_dim, width, dtype=dtype, rngs=rngs)

  def __call__(
    self, x: Float[Array, "b n c"], rotary: tuple[Array, Array], allowed: Bool[Array, "b q s"]
  ) -> Float[Array, "b n c"]:
    """One block.

    Args:
      x: queries, then patches.
      rotary: cosines and sines of the patches; queries have no position.
      allowed: patches that each query attends to, beside all queries.
    """
    b, count, _ = allowed.shape
    y = self.norm1(x)
    query, key, value = (
      part(y).reshape(*y.shape[:2], self.num_heads, -1) for part in (self.query, self.key, self.value)
    )
    query, key = positions.rotate(query, *rotary), positions.rotate(key, *rotary)
    mask = jnp.concatenate([jnp.ones((b, count, count), bool), allowed], axis=-1)
    of_queries = jax.nn.dot_product_attention(query[:, :count], key, value, mask=mask[:, None])
    of_patches = attention(query[:, count:], key, value)
    attended = jnp.concatenate([of_queries, of_patches], axis=1).reshape(y.shape)
    x = x + self.scale1(self.output(attended))
    return x + self.scale2(self.mlp(self.norm2(x)))


class _Upscale(nnx.Module):
  """Twice as many rows and columns: transposed convolution, GELU, depthwise 3x3, LayerNorm."""

  def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    self.deconvolution = Deconv2x(width, width, dtype=dtype, rngs=rngs)
    self.kernel = nnx.Param(jax.random.uniform(rngs.params(), (3, 3, 1, width), minval=-1 / 3, maxval=1 / 3))
    self.norm = LayerNorm(width, epsilon=1e-6, rngs=rngs)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h*2 w*2 c"]:
    x = gelu(self.deconvolution(x))
    return self.norm(convolution.convolve(x, self.kernel[...].astype(x.dtype), groups=x.shape[-1]))


class PlainMaskDecoder(MaskHead):
  """Sum of taps, queries before the patches, blocks, one class and one mask per query."""

  def __init__(
    self,
    feature_specs: Sequence[FeatureSpec],
    config: PlainMaskConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Builds the head.

    Args:
      feature_specs: of the taps of a plain ViT, all of one stride and width. The head has the ViT's width.
      config: see PlainMaskConfig.
      dtype: of convolutions and matrix products. Parameters, norms, softmax, matching and losses are float32.
      rngs: for the weights.

    Raises:
      ValueError: maps of several strides or widths, a stride that is no power of two of at least 8, or heads
        that do not divide the channels into multiples of four.
    """
    specs = tuple(feature_specs)
    stride, width = specs[0].stride, specs[0].channels
    if len(set(specs)) != 1 or stride < 8 or stride & (stride - 1):
      raise ValueError(
        f"PlainMaskDecoder: got maps {[(spec.stride, spec.channels) for spec in specs]} (stride, channels); "
        "expected those of a plain ViT, all alike, of a stride that is a power of two and at least 8. For "
        "patches of 14 pixels, build the backbone with stride=16; it needs no neck."
      )
    heads = config.num_heads or max(width // _HEAD_CHANNELS, 1)
    if width % (4 * heads):
      raise ValueError(
        f"PlainMaskDecoder: {width} channels and {heads} heads; expected a multiple of four channels each."
      )
    self.config, self.dtype, self.head_channels = config, dtype, width // heads
    self.feature_specs = specs
    self.laterals = nnx.List([_Lateral(width, dtype=dtype, rngs=rngs) for _ in specs])
    self.query_features = nnx.Param(jax.random.normal(rngs.params(), (config.num_queries, width)))
    mlp_dim = config.mlp_dim or width
    self.blocks = nnx.List(
      [_Block(width, heads, mlp_dim, dtype=dtype, rngs=rngs) for _ in range(config.blocks)]
    )
    self.norm = LayerNorm(width, rngs=rngs)
    self.upscale = nnx.List(
      [_Upscale(width, dtype=dtype, rngs=rngs) for _ in range(int(math.log2(stride)) - 2)]
    )
    self.mask_mlp = _Mlp(width, width, width, width, dtype=dtype, rngs=rngs)
    self.classes = default_linear(width, config.num_classes + 1, dtype=dtype, rngs=rngs)
    self.batches = BatchCount(jnp.zeros((), jnp.int32)) if config.anneal_ends else None

  def __call__(self, features: Features, *, rng: PRNGKeyArray | None = None) -> PlainPredictions:
    """Taps of a ViT -> predictions: from the initial queries and after every block, or only the last.

    Args:
      features: one map for each of `feature_specs`.
      rng: key of which queries are confined to their masks in training, where all predictions are made and
        BatchNorm uses the batch's statistics. None gives the last prediction alone; while training anneals,
        queries of a block are then confined if more than half of them are in training.

    Raises:
      ValueError: other maps than `feature_specs` announced.
    """
    found, expected = [x.shape[-1] for x in features], [spec.channels for spec in self.feature_specs]
    if found != expected:
      raise ValueError(f"PlainMaskDecoder: got maps with channels {found}, was built for {expected}.")
    maps = [jnp.asarray(x, self.dtype) for x in features]
    summed = sum(lateral(x, inference=rng is None) for lateral, x in zip(self.laterals, maps))
    b, height, width, _ = summed.shape
    size = (height, width)
    queries = jnp.asarray(self.query_features[...], self.dtype)
    x = jnp.concatenate(
      [jnp.broadcast_to(queries, (b, *queries.shape)), summed.reshape(b, height * width, -1)], 1
    )
    angles = positions.rotary_angles(positions.rotary_periods(_ROTARY_BASE, self.head_channels), size)
    rotary = (jnp.cos(angles), jnp.sin(angles))
    predict = jax.checkpoint(lambda x: self._predict(x, size))  # maps of stride 4 are much larger than x
    confined = self._confined(training=rng is not None)
    predictions = []
    for index, block in enumerate(self.blocks):
      if rng is None:
        allowed = self._allowed_in_prediction(x, size, confined[index])
      else:
        predictions.append(predict(x))
        draw = jax.random.bernoulli(jax.random.fold_in(rng, index), confined[index], (b, queries.shape[0], 1))
        allowed = _inside(predictions[-1][1], size) | ~draw
      x = jax.checkpoint(block.__call__)(x, rotary, allowed)
    predictions.append(predict(x))
    return PlainPredictions(*map(jnp.stack, zip(*predictions)))

  def _confined(self, *, training: bool) -> Float[Array, "blocks"]:
    """The fraction of queries that are confined to their masks, by block; counts the batch in training."""
    if self.batches is None:
      return jnp.ones(self.config.blocks)
    count = self.batches[...]
    if training:
      self.batches[...] = count + 1
    start, end = (
      np.asarray(steps, np.float32) for steps in (self.config.anneal_starts, self.config.anneal_ends)
    )
    return (1 - jnp.clip((count - start) / (end - start), 0, 1)) ** _ANNEALING_POWER

  def _allowed_in_prediction(
    self, x: Float[Array, "b n c"], size: tuple[int, int], confined: Float[Array, ""]
  ) -> Bool[Array, "b q s"]:
    def inside():
      return _inside(self._predict(x, size)[1], size)

    def everywhere():
      return jnp.ones((x.shape[0], self.config.num_queries, size[0] * size[1]), bool)

    return inside() if self.batches is None else jax.lax.cond(confined > 0.5, inside, everywhere)

  def _predict(
    self, x: Float[Array, "b n c"], size: tuple[int, int]
  ) -> tuple[Float[Array, "b q k"], Float[Array, "b q h w"]]:
    """(class logits, mask logits), float32, of a sequence of queries and patches."""
    x = self.norm(x)
    queries, patches = x[:, : self.config.num_queries], x[:, self.config.num_queries :]
    maps = patches.reshape(x.shape[0], *size, -1)
    for upscale in self.upscale:
      maps = upscale(maps)
    return self.classes(queries).astype(jnp.float32), mask_logits(self.mask_mlp(queries), maps)


def _inside(masks: Float[Array, "b q h w"], size: tuple[int, int]) -> Bool[Array, "b q s"]:
  """The patches that lie within each query's mask; an empty mask leaves the query the other queries."""
  resized = resize_bilinear(jnp.moveaxis(jax.lax.stop_gradient(masks), 1, -1), size)
  return jnp.moveaxis(resized > 0, -1, 1).reshape(*masks.shape[:2], -1)
