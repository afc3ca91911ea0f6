"""Options of Mask2Former."""

import dataclasses
from typing import Annotated, Literal

from frozen_vision.options import Count, Fraction, from_data, NonNegative, Range


@dataclasses.dataclass(frozen=True)
class MaskLossConfig:
  """Options that matching and losses read; the dataclass of a head's options inherits it.

  Attributes: see `Mask2FormerConfig`.
  """

  num_classes: int = from_data(150)
  class_weight: NonNegative = 2.0
  mask_weight: NonNegative = 5.0
  dice_weight: NonNegative = 5.0
  no_object_weight: NonNegative = 0.1
  num_points: Count = 12544
  oversample_ratio: Annotated[float, Range(1)] = 3.0
  importance_ratio: Fraction = 0.75

  @property
  def num_candidates(self) -> int:
    return int(self.num_points * self.oversample_ratio)

  @property
  def num_important(self) -> int:
    return int(self.num_points * self.importance_ratio)


@dataclasses.dataclass(frozen=True)
class Mask2FormerConfig(MaskLossConfig):
  """Defaults are those of the official ADE20K recipe.

  Sources: facebookresearch/Mask2Former, configs/ade20k/semantic-segmentation/maskformer2_R50_bs16_160k.yaml,
  and the code that it configures. `input_norm` is ours.

  Attributes:
    num_classes: classes without "no object".
    num_queries: queries, hence the most segments that an image can be given.
    hidden_dim: channels of both decoders.
    mask_dim: channels of the mask features and of the mask embeddings.
    num_heads: attention heads, in both decoders.
    encoder_layers: deformable attention layers of the pixel decoder.
    encoder_levels: coarsest backbone levels that these see; finer ones enter through an FPN step each. The
      transformer decoder visits them in turns, coarse to fine.
    encoder_points: points that a head of the deformable attention samples per level.
    encoder_ffn_dim: hidden width of the pixel decoder's feed-forward networks.
    decoder_layers: layers of the transformer decoder. Predictions are made before the first too: one more.
    decoder_ffn_dim: hidden width of its feed-forward networks.
    norm_groups: groups of the pixel decoder's group norms.
    input_norm: a trainable LayerNorm over the channels of every backbone level first. Our frozen backbones
      end without a norm per level, as public checkpoints do; this is that norm. Off for heads on backbones
      without one.
    class_weight, mask_weight, dice_weight: weights of the losses and of the matching's costs alike.
    no_object_weight: weight of the queries without a segment in the classification loss.
    num_points: points per mask at which masks are compared, in the matching and in the losses.
    oversample_ratio: uniform candidates per loss point.
    importance_ratio: fraction of the loss points that are the candidates where the mask is least certain; the
      others are uniform.
  """

  name: Literal["mask2former"] = "mask2former"
  num_queries: Count = 100
  hidden_dim: Count = 256
  mask_dim: Count = 256
  num_heads: Count = 8

  encoder_layers: Count = 6
  encoder_levels: Count = 3
  encoder_points: Count = 4
  encoder_ffn_dim: Count = 1024
  decoder_layers: Count = 9
  decoder_ffn_dim: Count = 2048
  norm_groups: Count = 32
  input_norm: bool = True

  def __post_init__(self):
    for name in (
      "num_classes",
      "num_queries",
      "hidden_dim",
      "mask_dim",
      "num_heads",
      "encoder_layers",
      "encoder_levels",
      "encoder_points",
      "encoder_ffn_dim",
      "decoder_layers",
      "decoder_ffn_dim",
      "norm_groups",
      "num_points",
    ):
      if getattr(self, name) < 1:
        raise ValueError(f"Mask2FormerConfig.{name} is {getattr(self, name)}; expected at least 1.")
    # The sine position embedding gives both axes equally many pairs of sine and cosine.
    divisors = {"num_heads": self.num_heads, "norm_groups": self.norm_groups, "4": 4}
    for name, divisor in divisors.items():
      if self.hidden_dim % divisor:
        raise ValueError(
          f"Mask2FormerConfig.hidden_dim is {self.hidden_dim}; expected a multiple of {name}"
          + (f" ({divisor})." if name != "4" else ".")
        )
    if self.oversample_ratio < 1 or not 0 <= self.importance_ratio <= 1:
      raise ValueError(
        f"Mask2FormerConfig: oversample_ratio is {self.oversample_ratio}, expected at least 1; "
        f"importance_ratio is {self.importance_ratio}, expected a fraction between 0 and 1."
      )

  @property
  def num_predictions(self) -> int:
    """Predictions with a loss: one per decoder layer, and one from the initial queries."""
    return self.decoder_layers + 1
