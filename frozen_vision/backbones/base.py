"""The one contract between backbones, necks and heads: what a feature level is."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
  """One feature level.

  Attributes:
    stride: input pixels per cell, along both axes.
    channels: size of the last axis.
  """

  stride: int
  channels: int
