"""Sizes and kinds of plain vision transformers, one row per published architecture."""

import dataclasses
import math
from typing import Literal

from frozen_vision.backbones.base import BackboneConfig, FeatureSpec, IMAGENET_MEAN, IMAGENET_STD

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)

Resize = Literal["bicubic", "bicubic_scale", "bicubic_antialias"]


@dataclasses.dataclass(frozen=True)
class ViTConfig(BackboneConfig):
  """Shape and kind of a plain ViT.

  Attributes:
    embed_dim, depth, num_heads: channels of a token, blocks, attention heads per block.
    patch_size: side of a patch, in the pixels that the network sees.
    mlp_dim: hidden channels of the MLP; of SwiGLU, of each of its two halves.
    mlp: two linear layers with an activation between, or SwiGLU, `down(silu(gate(x)) * up(x))`.
    activation: of the two-layer MLPs; "gelu" is exact, "gelu_tanh" its tanh form, "quick_gelu" is
      x * sigmoid(1.702 x).
    positions: "learned" and "sine" (fixed, MAE's) are added to the tokens, "rotary" turns queries and keys,
      "relative" adds a bias for every offset and head to the scores of all blocks, zero at first: the shared
      relative position bias of feature distillation's students.
    position_grid: cells per side that learned, sine and relative positions are stored for.
    position_resize: how they are resized to other sizes: PyTorch's bicubic without antialiasing by size
      ("bicubic") or by the scale (n + 0.1) / grid ("bicubic_scale", DINO's and DINOv2's code), or with it
      ("bicubic_antialias").
    rotary_base: longest rotary period.
    class_token, registers: tokens before the patches, in this order; registers have no positions.
    pre_norm: a norm between positions and first block (CLIP).
    qkv_bias: which of queries, keys and values have a bias.
    patch_bias: the patch embedding has a bias.
    layer_scale: a factor per channel at the end of each residual branch.
    norm_epsilon: of every LayerNorm.
    pooling: what `embed` returns of the normed tokens: the class token, or what a learned query attends to
      (SigLIP).
    taps: blocks whose outputs are the feature maps; None for the ends of the four quarters.
    norm_taps: apply the final norm to every tap, as DINO's `get_intermediate_layers` does.
    stride: pixels of the frame per cell; None for the patch size. With patches of 14 and a stride of 16,
      images are resized by 14/16 first, so that cells are aligned to strides of 16.
    mean, std: of RGB in 0..1, what images are normalised by.
    layer_scale_init: initial LayerScale. The released code has 1e-5, so that a fresh block is nearly the
      identity; 1 makes a random backbone a real one.
    drop_path_rate: stochastic depth of the last block, growing linearly from 0; used only with `rng`.
  """

  # The grid and the biases are what a checkpoint says of itself: `checkpoints` takes them from it.
  weightless = (
    *("num_heads", "activation", "position_resize", "rotary_base", "norm_epsilon", "taps", "norm_taps"),
    *("stride", "mean", "std", "layer_scale_init", "drop_path_rate", "position_grid", "qkv_bias"),
  )

  embed_dim: int
  depth: int
  num_heads: int
  patch_size: int = 16
  mlp_dim: int = 0
  mlp: Literal["mlp", "swiglu"] = "mlp"
  activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
  positions: Literal["learned", "sine", "rotary", "relative"] = "learned"
  position_grid: int = 14
  position_resize: Resize = "bicubic"
  rotary_base: float = 100.0
  class_token: bool = True
  registers: int = 0
  pre_norm: bool = False
  qkv_bias: Literal["qkv", "qv", "none"] = "qkv"
  patch_bias: bool = True
  layer_scale: bool = False
  norm_epsilon: float = 1e-6
  pooling: Literal["class", "attention"] = "class"
  taps: tuple[int, ...] | None = None
  norm_taps: bool = False
  stride: int | None = None
  mean: tuple[float, float, float] = IMAGENET_MEAN
  std: tuple[float, float, float] = IMAGENET_STD
  layer_scale_init: float = 1e-5
  drop_path_rate: float = 0.0

  def __post_init__(self):
    if not self.mlp_dim:
      object.__setattr__(self, "mlp_dim", 4 * self.embed_dim)
    if self.embed_dim % self.num_heads:
      raise ValueError(
        f"ViTConfig.num_heads = {self.num_heads} does not divide embed_dim = {self.embed_dim}."
      )
    if self.positions == "rotary" and (self.embed_dim // self.num_heads) % 4:
      raise ValueError(
        f"Rotary positions turn pairs of channels by rows and by columns; {self.embed_dim} channels of "
        f"{self.num_heads} heads are {self.embed_dim // self.num_heads} each, expected a multiple of 4."
      )
    if self.positions == "relative" and self.registers:
      raise ValueError(
        f"ViTConfig.registers = {self.registers}: relative positions have no bias for registers; expected 0."
      )
    if self.pooling == "class" and not self.class_token:
      raise ValueError("ViTConfig.pooling = 'class' needs class_token = True.")
    if self.taps is not None and (
      not self.taps or list(self.taps) != sorted({tap for tap in self.taps if 0 <= tap < self.depth})
    ):
      raise ValueError(
        f"ViTConfig.taps = {self.taps}; expected ascending numbers of blocks, 0 to {self.depth - 1}."
      )

  @property
  def feature_specs(self) -> tuple[FeatureSpec, ...]:
    return (FeatureSpec(self.cell_size, self.embed_dim),) * len(self.tapped_blocks)

  @property
  def cell_size(self) -> int:
    """Pixels of the frame per cell: `stride`, or the patch size."""
    return self.stride or self.patch_size

  @property
  def tapped_blocks(self) -> tuple[int, ...]:
    """`taps`, or the last block of each of the four quarters.

    They are 2, 5, 8, 11 of 12; 5, 11, 17, 23 of 24, as in Meta's detector and PMT, where Meta's linear heads
    read 4, 11, 17, 23; 9, 19, 29, 39 of 40.
    """
    if self.taps is not None:
      return self.taps
    return tuple(sorted({self.depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)} - {-1}))

  @property
  def prefix_tokens(self) -> int:
    """Tokens before those of the patches."""
    return int(self.class_token) + self.registers

  @property
  def head_dim(self) -> int:
    return self.embed_dim // self.num_heads


# Widths, depths and heads by which the families name their sizes.
_S, _B, _L = (384, 12, 6), (768, 12, 12), (1024, 24, 16)
_H = (1280, 32, 16)


def _augreg(size: tuple[int, int, int], **kind) -> ViTConfig:
  return ViTConfig(*size, position_resize="bicubic_antialias", mean=HALF, std=HALF, **kind)


def _dino(size: tuple[int, int, int], patch_size: int) -> ViTConfig:
  return ViTConfig(
    *size,
    patch_size=patch_size,
    position_grid=224 // patch_size,
    position_resize="bicubic_scale",
    norm_taps=True,
  )


def _mae(size: tuple[int, int, int], patch_size: int = 16) -> ViTConfig:
  return ViTConfig(*size, patch_size=patch_size, positions="sine", position_grid=224 // patch_size)


def _dinov2(size: tuple[int, int, int], registers: int = 0, **kind) -> ViTConfig:
  return ViTConfig(
    *size,
    patch_size=14,
    position_grid=37,
    position_resize="bicubic_antialias" if registers else "bicubic_scale",
    registers=registers,
    layer_scale=True,
    norm_taps=True,
    **kind,
  )


def _dinov3(size: tuple[int, int, int], swiglu_ratio: int = 0, align: int = 8, **kind) -> ViTConfig:
  """A DINOv3.

  Args:
    swiglu_ratio: of 3/2 of the SwiGLU's hidden channels to the width, before rounding; 0 for a plain MLP.
    align: what SwiGLU's hidden channels are rounded up to a multiple of.
  """
  options = dict(positions="rotary", registers=4, qkv_bias="qv", layer_scale=True)
  options |= dict(norm_epsilon=1e-5, norm_taps=True) | kind
  if swiglu_ratio:
    hidden = math.ceil(int(swiglu_ratio * size[0] * 2 / 3) / align) * align
    options |= dict(mlp="swiglu", mlp_dim=hidden)
  return ViTConfig(*size, **options)


def _clip(size: tuple[int, int, int], patch_size: int, activation: str) -> ViTConfig:
  return ViTConfig(
    *size,
    patch_size=patch_size,
    activation=activation,
    position_grid=224 // patch_size,
    position_resize="bicubic_antialias" if activation == "gelu" else "bicubic",
    pre_norm=True,
    patch_bias=False,
    norm_epsilon=1e-5,
    mean=CLIP_MEAN,
    std=CLIP_STD,
  )


def _siglip(size: tuple[int, int, int], patch_size: int, image_size: int, mlp_dim: int = 0) -> ViTConfig:
  return ViTConfig(
    *size,
    patch_size=patch_size,
    mlp_dim=mlp_dim,
    activation="gelu_tanh",
    position_grid=image_size // patch_size,
    class_token=False,
    pooling="attention",
    mean=HALF,
    std=HALF,
  )


def _distilled(size: tuple[int, int, int], patch_size: int = 16) -> ViTConfig:
  """A ViT of SimMIM's and Feature Distillation's code, which follows BEiT's."""
  return ViTConfig(
    *size,
    patch_size=patch_size,
    positions="relative",
    position_grid=224 // patch_size,
    qkv_bias="qv",
    layer_scale=True,
    layer_scale_init=0.1,
  )


_SO400M, _G_OPT = (1152, 27, 16), (1536, 40, 16)

# Sources: the hub entries of facebookresearch/{dino,dinov2,dinov3}, models_mae.py of facebookresearch/mae,
# models.py of facebookresearch/deit, the model table of open_clip, big_vision's models/vit.py, and
# models/vision_transformer.py of SwinTransformer/Feature-Distillation, whose B/16 is SimMIM's too.
# DINO has no L; `dino_vitl16` is iBOT's, in DINO's code. SigLIP 1 has no g.
VARIANTS: dict[str, ViTConfig] = {
  "deit_vits16": ViTConfig(*_S),
  "deit_vitb16": ViTConfig(*_B),
  "deit_vitl16": ViTConfig(*_L),
  "augreg_vits16": _augreg(_S),
  "augreg_vitb16": _augreg(_B),
  "augreg_vitb8": _augreg(_B, patch_size=8, position_grid=28),
  "augreg_vitl16": _augreg(_L),
  "dino_vits16": _dino(_S, 16),
  "dino_vits8": _dino(_S, 8),
  "dino_vitb16": _dino(_B, 16),
  "dino_vitb8": _dino(_B, 8),
  "dino_vitl16": _dino(_L, 16),
  "mae_vitb16": _mae(_B),
  "mae_vitl16": _mae(_L),
  "mae_vith14": _mae(_H, 14),
  "fd_vitb16": _distilled(_B),
  "fd_vitl14": _distilled(_L, 14),
  "dinov2_vits14": _dinov2(_S),
  "dinov2_vitb14": _dinov2(_B),
  "dinov2_vitl14": _dinov2(_L),
  "dinov2_vitg14": _dinov2((1536, 40, 24), mlp="swiglu", mlp_dim=4096),
  "dinov2_vits14_reg4": _dinov2(_S, 4),
  "dinov2_vitb14_reg4": _dinov2(_B, 4),
  "dinov2_vitl14_reg4": _dinov2(_L, 4),
  "dinov2_vitg14_reg4": _dinov2((1536, 40, 24), 4, mlp="swiglu", mlp_dim=4096),
  "dinov3_vits16": _dinov3(_S),
  "dinov3_vits16plus": _dinov3(_S, 6),
  "dinov3_vitb16": _dinov3(_B),
  "dinov3_vitl16": _dinov3(_L),
  "dinov3_vitl16plus": _dinov3(_L, 6),
  "dinov3_vith16plus": _dinov3((1280, 32, 20), 6),
  "dinov3_vit7b16": _dinov3((4096, 40, 32), 3, 64, qkv_bias="none"),
  "clip_vitb32": _clip(_B, 32, "quick_gelu"),
  "clip_vitb16": _clip(_B, 16, "quick_gelu"),
  "clip_vitl14": _clip(_L, 14, "quick_gelu"),
  "openclip_vitb32": _clip(_B, 32, "gelu"),
  "openclip_vitb16": _clip(_B, 16, "gelu"),
  "openclip_vitl14": _clip(_L, 14, "gelu"),
  "siglip_vitb16": _siglip(_B, 16, 224),
  "siglip_vitl16": _siglip(_L, 16, 256),
  "siglip_vitso400m14": _siglip(_SO400M, 14, 224, 4304),
  "siglip2_vitb16": _siglip(_B, 16, 224),
  "siglip2_vitl16": _siglip(_L, 16, 256),
  "siglip2_vitso400m14": _siglip(_SO400M, 14, 224, 4304),
  "siglip2_vitso400m16": _siglip(_SO400M, 16, 256, 4304),
  "siglip2_vitg16": _siglip(_G_OPT, 16, 256),
}
