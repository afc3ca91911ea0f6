"""Frozen pretrained backbones with trained heads, in JAX."""

from frozen_vision.backbones.build import build_backbone, load_backbone, save_backbone
from frozen_vision.backbones.features import FeatureSpec

__all__ = ["FeatureSpec", "build_backbone", "load_backbone", "save_backbone"]
