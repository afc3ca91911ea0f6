"""The backbones whose weights need no download of their own: shipped, from packages, or random."""

from frozen_vision.config import BackboneOptions, Config
from frozen_vision.freezing import prepare

# By the name on the command line: (variant, weights, what tables call it).
BACKBONES = {
  "random": ("swinv2_nano", "random", "SwinV2-nano, random weights"),
  "swinv2_nano": ("swinv2_nano", "shipped", "SwinV2-nano (CIFAR-10, shipped)"),
} | {
  f"efficientnet_lite{i}": (f"efficientnet_lite{i}",) * 2 + (f"EfficientNet-Lite{i} (ImageNet)",)
  for i in range(3)
}


def frozen(name: str, seed: int = 0) -> prepare.FrozenBackbone:
  """A backbone of `BACKBONES`; `seed` draws random weights."""
  variant, weights, _ = BACKBONES[name]
  return prepare.Backbones().of(Config(backbone=BackboneOptions(name=variant, weights=weights), seed=seed))
