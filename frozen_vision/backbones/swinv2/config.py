"""Sizes of Swin Transformer V2, and which images they take."""

import dataclasses
from typing import Any, Self

from frozen_vision.backbones import base

PATCH_SIZE = 4
CPB_HIDDEN = 512  # of the MLP that makes the position bias


@dataclasses.dataclass(frozen=True)
class SwinV2Config(base.BackboneConfig):
  """Shape of a SwinV2.

  Attributes:
    embed_dim: channels at stride 4; they double at each of the three mergings.
    depths: blocks per stage.
    num_heads: attention heads per stage.
    window_sizes: window side per stage, in cells of that stage. A map smaller than its window is one
      window, without a shift.
    pretrained_window_sizes: per stage, the window that position coordinates are normalised by; 0 means
      the window in use. Set it to the windows of the pretraining wherever a backbone is used at another
      window or image size than it was trained at.
    extra_norm_interval: a further LayerNorm on the main branch after every so many blocks of a stage
      (6 in SwinV2-H and G, section 3.2); 0 for none.
    drop_path_rate: stochastic depth of the last block, growing linearly from 0; used only with `rng`.
    residual_norm_init: initial scale of the norms that end the residual branches. The released code
      uses 0, so that a fresh network is the identity in each block; 1 makes a random backbone a real one.
    whole_windows: refuse maps smaller than their window and images of no whole patches. Set for weights of
      torchvision, whose features are others there.
    attention: `xla`, or `pallas` for a kernel that keeps the scores of a window on the chip: on TPUs only,
      heads of 16, 32, 64 or 128 channels (`windows.attention_on_chip`). The features are the same but for
      the order of sums.
  """

  weightless = (
    "window_sizes",
    "pretrained_window_sizes",
    "drop_path_rate",
    "residual_norm_init",
    "whole_windows",
    "attention",
  )
  computational = ("attention",)

  embed_dim: int
  depths: tuple[int, ...]
  num_heads: tuple[int, ...]
  window_sizes: tuple[int, ...] = (8, 8, 8, 8)
  pretrained_window_sizes: tuple[int, ...] = (0, 0, 0, 0)
  extra_norm_interval: int = 0
  mlp_ratio: int = 4
  drop_path_rate: float = 0.0
  residual_norm_init: float = 0.0
  whole_windows: bool = False
  attention: str = "xla"

  def __post_init__(self):
    for name in ("num_heads", "window_sizes", "pretrained_window_sizes"):
      if len(getattr(self, name)) != len(self.depths):
        raise ValueError(
          f"SwinV2Config.{name} = {getattr(self, name)} has {len(getattr(self, name))} entries; "
          f"depths = {self.depths} asks for one per stage."
        )
    if self.attention not in ("xla", "pallas"):
      raise ValueError(f"SwinV2Config.attention is {self.attention!r}; known: xla, pallas.")
    for stage, heads in enumerate(self.num_heads):
      if self.stage_channels(stage) % heads:
        raise ValueError(
          f"SwinV2Config.num_heads[{stage}] = {heads} does not divide the stage's "
          f"{self.stage_channels(stage)} channels."
        )

  @property
  def feature_specs(self) -> tuple[base.FeatureSpec, ...]:
    return tuple(
      base.FeatureSpec(PATCH_SIZE * 2**stage, self.stage_channels(stage)) for stage in range(len(self.depths))
    )

  def stage_channels(self, stage: int) -> int:
    return self.embed_dim * 2**stage

  def replace(self, **overrides: Any) -> Self:
    """See `BackboneConfig.replace`; `window_size=24` stands for that window in every stage."""
    if isinstance(overrides.get("window_size"), int):
      stages = len(overrides.get("depths", self.depths))
      overrides["window_sizes"] = (overrides.pop("window_size"),) * stages
    return super().replace(**overrides)


# Widths, depths and heads: T to L from the released configs; H and G from section 3.6 of the paper, H's heads
# from SwinTransformer/MIM-Depth-Estimation, G's heads by their common size of 32 (the paper gives none).
# nano is ours, for 8 MB of weights: a third of T's width, and one block at stride 4, where a block costs as
# much as three at stride 16 on small images.
# Then windows, and the windows of the pretraining: 12 at 192 px; T and S were trained at 256 px only, with
# window 8 or 16. What a weights file says of its windows goes before its row.
_WINDOWS, _AT_192, _AT_256 = (8, 8, 8, 8), (12, 12, 12, 6), (16, 16, 16, 8)
VARIANTS: dict[str, SwinV2Config] = {
  "swinv2_nano": SwinV2Config(32, (1, 2, 6, 2), (1, 2, 4, 8)),
  "swinv2_t": SwinV2Config(96, (2, 2, 6, 2), (3, 6, 12, 24), _WINDOWS, _AT_256, drop_path_rate=0.2),
  "swinv2_s": SwinV2Config(96, (2, 2, 18, 2), (3, 6, 12, 24), _WINDOWS, _AT_256, drop_path_rate=0.3),
  "swinv2_b": SwinV2Config(128, (2, 2, 18, 2), (4, 8, 16, 32), _WINDOWS, _AT_192, drop_path_rate=0.5),
  "swinv2_l": SwinV2Config(192, (2, 2, 18, 2), (6, 12, 24, 48), _WINDOWS, _AT_192, drop_path_rate=0.2),
  "swinv2_h": SwinV2Config(352, (2, 2, 18, 2), (11, 22, 44, 88), _WINDOWS, _AT_192, extra_norm_interval=6),
  "swinv2_g": SwinV2Config(512, (2, 2, 42, 4), (16, 32, 64, 128), _WINDOWS, _AT_192, extra_norm_interval=6),
}


def check_map(size: tuple[int, int], window_size: int) -> None:
  """Refuses, with `whole_windows`, a map smaller than its window."""
  if min(size) < window_size:
    raise ValueError(
      f"A map of {size[0]} x {size[1]} is smaller than its window of {window_size}; torchvision, whose "
      "weights these are, computes something else there. Give larger images, or load the weights with "
      "whole_windows=False to use them as SwinV2's."
    )


def check_patches(size: tuple[int, int]) -> None:
  """Refuses, with `whole_windows`, images of no whole patches."""
  if any(side % PATCH_SIZE for side in size):
    raise ValueError(
      f"Images of {size}: torchvision, whose weights these are, cuts what is no whole patch of "
      "4 x 4. Pad the images, or load the weights with whole_windows=False to have them padded here."
    )
