"""Heads that recognise actions on the features of a frozen image backbone, frame by frame.

What the frozen study (arXiv 2211.02043) calls its Video Swin head was not available to us in detail: where
the blocks stand, how many there are and how wide they are is our choice, and all of it is config.

Every head takes one feature map [b, t, h, w, c] per level and gives logits; the maps are raw outputs of a
backbone, so each head norms them first.
"""

import dataclasses
import functools
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.backbones.video_swin import model as video_swin
from frozen_vision.heads.base import ClipHead
from frozen_vision.layers import stages
from frozen_vision.layers.convolution import MapConv
from frozen_vision.layers.mlp import gelu, linear, Mlp
from frozen_vision.layers.norms import LayerNorm, level_norms
from frozen_vision.ops import self_similarity
from frozen_vision.ops.arrays import Array
from frozen_vision.options import Count, Fraction, Natural

Features = tuple[Float[Array, "b t _h _w _c"], ...]


@dataclasses.dataclass(frozen=True)
class VideoSwinHeadConfig:
  """Options of a head of Video Swin blocks on a frozen feature pyramid.

  Attributes:
    levels: which of the backbone's levels are read, fine to coarse; neighbours, such as (2, 3); -1 is
      the last.
    channels: width at each of these levels.
    depths: blocks at each of these levels.
    head_channels: channels per attention head.
    window_size: (frames, rows, columns).
    motion_radius: cells around it in later frames with which each cell is compared (`Motion`), in each
      direction, before the first block of a level; 0 leaves that out.
    motion_lags: these later frames, counted from the cell's own.
    drop_path_rate: stochastic depth of the last block, growing linearly from 0, in training.
    dropout: of the pooled vector, in training.
  """

  name: Literal["video_swin"] = "video_swin"
  levels: tuple[int, ...] = (-1,)
  channels: tuple[Count, ...] = (512,)
  depths: tuple[Count, ...] = (4,)
  head_channels: Count = 32
  window_size: tuple[Count, Count, Count] = (8, 7, 7)
  mlp_ratio: Count = 4
  motion_radius: Natural = 0
  motion_lags: tuple[Count, ...] = (1, 2, 4)
  drop_path_rate: Fraction = 0.1
  dropout: Fraction = 0.5

  def __post_init__(self):
    if not self.levels or not len(self.levels) == len(self.channels) == len(self.depths):
      raise ValueError(
        f"VideoSwinHeadConfig: levels = {self.levels}, channels = {self.channels} and depths = "
        f"{self.depths} must have one entry per level."
      )
    if self.motion_radius < 0 or not self.motion_lags or min(self.motion_lags) < 1:
      raise ValueError(
        f"VideoSwinHeadConfig.motion_radius = {self.motion_radius}, motion_lags = {self.motion_lags}; "
        "expected 0 or more, and frames ahead from 1."
      )
    if any(b - a != 1 for a, b in zip(self.levels, self.levels[1:])):
      raise ValueError(f"VideoSwinHeadConfig.levels = {self.levels}: expected neighbours, fine to coarse.")
    if any(width % self.head_channels for width in self.channels):
      raise ValueError(
        f"VideoSwinHeadConfig.head_channels = {self.head_channels} does not divide channels = "
        f"{self.channels}."
      )


@dataclasses.dataclass(frozen=True)
class AttentiveHeadConfig:
  """Options of an attentive probe.

  Attributes:
    levels: which of the backbone's levels are read.
    channels: width; a multiple of 2 x num_heads.
    num_heads: attention heads.
    dropout: of the pooled vector, in training.
  """

  name: Literal["attentive"] = "attentive"
  levels: tuple[int, ...] = (-1,)
  channels: Count = 512
  num_heads: Count = 8
  dropout: Fraction = 0.0


@dataclasses.dataclass(frozen=True)
class AverageHeadConfig:
  """Options of a head on averaged features.

  Attributes:
    levels: which of the backbone's levels are read.
    dropout: of the pooled vector, in training.
  """

  name: Literal["average"] = "average"
  levels: tuple[int, ...] = (-1,)
  dropout: Fraction = 0.0


class Classifier(nnx.Module):
  """Dropout and a linear layer, float32."""

  def __init__(self, channels: int, num_classes: int, dropout: float, *, rngs: nnx.Rngs):
    self.dropout = dropout
    self.linear = nnx.Linear(
      channels, num_classes, rngs=rngs, kernel_init=nnx.initializers.normal(0.01)
    )  # as released

  def __call__(self, pooled: Float[Array, "b c"], rng: Array | None) -> Float[Array, "b classes"]:
    x = pooled.astype(jnp.float32)
    if rng is not None and self.dropout:
      keep = jax.random.bernoulli(rng, 1 - self.dropout, x.shape)
      x = jnp.where(keep, x / (1 - self.dropout), 0)
    return self.linear(x)


class Motion(nnx.Module):
  """Motion of each cell to later frames, found by similarity, as `channels` numbers per cell.

  Blocks of attention move what cells hold. Which way something went is in no frozen frame's cell, only in
  which cell of a later frame resembles it, and that is what the similarities say; a convolution over
  neighbours tells what moves apart from what moves along. As in arXiv 2102.07092; the layers, and that a
  level adds the result to its projected features, are our choice.
  """

  def __init__(self, radius: int, lags: tuple[int, ...], channels: int, *, dtype: Any, rngs: nnx.Rngs):
    self.radius, self.lags = radius, tuple(lags)
    neighbours = len(self.lags) * (2 * radius + 1) ** 2
    # The default weights, which keep the variance, and not small ones as elsewhere: beside content the
    # similarities are faint, and blocks could not hear them.
    self.norm = LayerNorm(neighbours, rngs=rngs)
    self.fc1 = nnx.Linear(neighbours, channels, dtype=dtype, rngs=rngs)
    self.conv = MapConv(channels, channels, (3, 3), dtype=dtype, rngs=rngs)
    self.fc2 = nnx.Linear(channels, channels, dtype=dtype, rngs=rngs)

  def __call__(self, features: Float[Array, "b t h w c"]) -> Float[Array, "b t h w channels"]:
    x = self.norm(self_similarity.to_later_frames(features, self.radius, self.lags)).astype(features.dtype)
    x = gelu(self.fc1(x))
    b, t, h, w, channels = x.shape
    x = gelu(self.conv(x.reshape(b * t, h, w, channels)))
    return self.fc2(x).reshape(b, t, h, w, channels)


class _Level(nnx.Module):
  """Frozen features into the head's width, what comes from the finer level, and blocks on both."""

  def __init__(
    self,
    inputs: int,
    finer: int | None,
    channels: int,
    config: VideoSwinHeadConfig,
    rates: list[float],
    *,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    self.norm = LayerNorm(inputs, rngs=rngs)
    self.proj = linear(inputs, channels, dtype=dtype, rngs=rngs)
    self.motion = (
      Motion(
        config.motion_radius,
        config.motion_lags,
        channels,
        dtype=dtype,
        rngs=rngs,
      )
      if config.motion_radius
      else None
    )
    self.merge = (
      None if finer is None else video_swin.PatchMerging(finer, outputs=channels, dtype=dtype, rngs=rngs)
    )
    heads = channels // config.head_channels
    self.blocks = video_swin.make_blocks(channels, heads, config, rates, dtype=dtype, rngs=rngs)

  def __call__(self, feature: Array, finer: Array | None, keys: list[Array | None]) -> Array:
    normed = self.norm(feature)
    x = self.proj(normed)
    if self.motion is not None:
      x = x + self.motion(normed)
    if self.merge is not None:
      x = x + self.merge(finer)
    for block, key in zip(self.blocks, keys, strict=True):
      x = block(x, key)
    return x


class VideoSwinHead(ClipHead):
  """Blocks of Video Swin mix the frames; then norm, mean over time and space, dropout, linear."""

  def __init__(
    self,
    feature_specs: tuple[FeatureSpec, ...],
    config: VideoSwinHeadConfig,
    num_classes: int,
    *,
    dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.dtype = dtype
    self.levels = check_levels(config.levels, feature_specs)
    rates = stages.drop_path_rates(config.drop_path_rate, config.depths)
    self.stages = nnx.List(
      [
        _Level(
          feature_specs[level].channels,
          config.channels[index - 1] if index else None,
          config.channels[index],
          config,
          rates[index],
          dtype=dtype,
          rngs=rngs,
        )
        for index, level in enumerate(self.levels)
      ]
    )
    self.norm = LayerNorm(config.channels[-1], rngs=rngs)
    self.classifier = Classifier(config.channels[-1], num_classes, config.dropout, rngs=rngs)

  def __call__(self, features: Features, rng: Array | None = None) -> Float[Array, "b classes"]:
    """Logits, float32.

    Args:
      features: a map for each of `levels`.
      rng: key of dropout and stochastic depth in training; None is deterministic.
    """
    x, index = None, 0
    for stage, feature in zip(self.stages, _checked(features, self.levels), strict=True):
      numbers = range(index, index + len(stage.blocks))
      keys = [None if rng is None else jax.random.fold_in(rng, number) for number in numbers]
      x = stage(feature.astype(self.dtype), x, keys)
      index += len(stage.blocks)
    pooled = jnp.mean(self.norm(x).astype(jnp.float32), axis=(1, 2, 3))
    return self.classifier(pooled, None if rng is None else jax.random.fold_in(rng, index))


class AverageHead(ClipHead):
  """Norm, mean over time and space, linear: what a video is worth as a bag of frames."""

  def __init__(
    self,
    feature_specs: tuple[FeatureSpec, ...],
    num_classes: int,
    *,
    levels: tuple[int, ...] = (-1,),
    dropout: float = 0.0,
    rngs: nnx.Rngs,
  ):
    self.levels = check_levels(levels, feature_specs)
    self.norms = _level_norms(feature_specs, self.levels, rngs)
    self.classifier = Classifier(
      sum(feature_specs[level].channels for level in self.levels), num_classes, dropout, rngs=rngs
    )

  def __call__(self, features: Features, rng: Array | None = None) -> Float[Array, "b classes"]:
    pooled = [
      jnp.mean(norm(feature).astype(jnp.float32), axis=(1, 2, 3))
      for norm, feature in zip(self.norms, _checked(features, self.levels), strict=True)
    ]
    return self.classifier(jnp.concatenate(pooled, axis=-1), rng)


class AttentiveHead(ClipHead):
  """A learned query attends to every cell of every frame; then MLP, norm, linear (an attentive probe).

  Frames pass an image backbone one by one, so nothing in their features says when they were: sines of the
  frame's number are added (our choice), or the probe would see a bag of frames.
  """

  def __init__(
    self,
    feature_specs: tuple[FeatureSpec, ...],
    num_classes: int,
    *,
    levels: tuple[int, ...] = (-1,),
    channels: int = 512,
    num_heads: int = 8,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    if channels % (2 * num_heads):
      raise ValueError(
        f"AttentiveHead: channels = {channels} must be a multiple of 2 x num_heads = {2 * num_heads}."
      )
    self.dtype = dtype
    self.num_heads = num_heads
    self.levels = check_levels(levels, feature_specs)
    self.norms = _level_norms(feature_specs, self.levels, rngs)
    self.projs = nnx.List(
      [linear(feature_specs[level].channels, channels, dtype=dtype, rngs=rngs) for level in self.levels]
    )
    self.query = nnx.Param(nnx.initializers.truncated_normal(0.02)(rngs.params(), (channels,)))
    self.norm_tokens = LayerNorm(channels, rngs=rngs)
    self.key_value = linear(channels, 2 * channels, dtype=dtype, rngs=rngs)
    self.proj = linear(channels, channels, dtype=dtype, rngs=rngs)
    self.norm_mlp = LayerNorm(channels, rngs=rngs)
    self.mlp = Mlp(channels, 4 * channels, dtype=dtype, rngs=rngs)
    self.norm = LayerNorm(channels, rngs=rngs)
    self.classifier = Classifier(channels, num_classes, dropout, rngs=rngs)

  def __call__(self, features: Features, rng: Array | None = None) -> Float[Array, "b classes"]:
    tokens = []
    for norm, proj, feature in zip(self.norms, self.projs, _checked(features, self.levels), strict=True):
      x = proj(norm(feature.astype(self.dtype)))
      x = x + _sines(x.shape[1], x.shape[-1]).astype(x.dtype)[:, None, None]
      tokens.append(x.reshape(x.shape[0], -1, x.shape[-1]))
    x = self.norm_tokens(jnp.concatenate(tokens, axis=1))
    b, n, channels = x.shape
    keys, values = jnp.unstack(self.key_value(x).reshape(b, n, 2, self.num_heads, -1), axis=2)
    query = self.query[...].reshape(self.num_heads, -1).astype(x.dtype)
    logits = jnp.einsum("hd,bnhd->bhn", query, keys, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * keys.shape[-1] ** -0.5, axis=-1).astype(x.dtype)
    pooled = self.query[...].astype(x.dtype) + self.proj(
      jnp.einsum("bhn,bnhd->bhd", weights, values).reshape(b, channels)
    )
    pooled = pooled + self.mlp(self.norm_mlp(pooled))
    return self.classifier(self.norm(pooled), rng)


def _level_norms(feature_specs: tuple[FeatureSpec, ...], levels: tuple[int, ...], rngs: nnx.Rngs) -> nnx.List:
  return level_norms(
    [feature_specs[level].channels for level in levels], functools.partial(LayerNorm, rngs=rngs)
  )


def _checked(features: Features, levels: tuple[int, ...]) -> Features:
  """The maps, if there is one [b, t, h, w, c] for each level; raises ValueError."""
  if len(features) != len(levels) or any(feature.ndim != 5 for feature in features):
    raise ValueError(
      f"Feature maps {[feature.shape for feature in features]}; expected one [b, t, h, w, c] for each of "
      f"the levels {levels}."
    )
  return features


def _sines(frames: int, channels: int) -> Float[Array, "t c"]:
  """Sines and cosines of the frame's number with wavelengths from 2 pi to 2 pi * 10000."""
  frequencies = 10000.0 ** (-np.arange(channels // 2) / (channels // 2))
  angles = np.arange(frames)[:, None] * frequencies
  return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), jnp.float32)


def check_levels(levels: tuple[int, ...], feature_specs: tuple[FeatureSpec, ...]) -> tuple[int, ...]:
  """The levels as numbers from 0, if the backbone has them; -1 is its last. Raises ValueError."""
  count = len(feature_specs)
  if not levels or not all(-count <= level < count for level in levels):
    raise ValueError(
      f"levels = {tuple(levels)} of a backbone with {count} levels; expected numbers from 0 to {count - 1}, "
      f"or from -{count} to -1 to count from the last."
    )
  return tuple(range(count)[level] for level in levels)
