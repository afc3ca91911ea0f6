"""Frozen pretrained backbones with trained heads, in JAX.

    import frozen_vision as fv

    backbone = fv.fold_backbone(fv.load_backbone("swinv2_nano"))
    features = backbone(fv.normalise(images))  # images [b, h, w, 3] uint8, of any size
    neck = fv.build_neck("fpn", backbone.feature_specs, rngs=rngs)
    head = fv.HTC(neck.feature_specs, fv.HTCConfig(num_classes=3), rngs=rngs)

What is listed here is what a program needs to use backbones and heads, and to run a config. Each name is
imported when it is first used, with the little that it needs: importing the package itself costs
milliseconds, and reading data imports no model. `run_training` and `run_evaluation` are `train` and
`evaluate` of `training.loop`.
"""

import importlib
import importlib.util
from typing import Any, TYPE_CHECKING

from frozen_vision import messages

if TYPE_CHECKING:
  from frozen_vision.backbones.base import FeatureSpec, normalise
  from frozen_vision.backbones.families import build_backbone, fold_backbone, load_backbone, save_backbone
  from frozen_vision.config_files import load_config
  from frozen_vision.freezing.partition import partition
  from frozen_vision.heads.htc.config import cascade_mask_rcnn, HTCConfig, mask_rcnn
  from frozen_vision.heads.htc.htc import HTC
  from frozen_vision.heads.linear import LinearConfig, LinearHead
  from frozen_vision.heads.mask2former.config import Mask2FormerConfig
  from frozen_vision.heads.mask2former.mask2former import Mask2Former
  from frozen_vision.heads.upernet import UPerNet, UPerNetConfig
  from frozen_vision.heads.video_swin import AttentiveHead, AverageHead, VideoSwinHead, VideoSwinHeadConfig
  from frozen_vision.necks.bifpn import BiFPN
  from frozen_vision.necks.build import build_neck
  from frozen_vision.necks.fpn import FPN
  from frozen_vision.prediction.predictor import Predictor
  from frozen_vision.training.loop import evaluate as run_evaluation
  from frozen_vision.training.loop import train as run_training

__all__ = [
  "AttentiveHead",
  "AverageHead",
  "BiFPN",
  "FPN",
  "FeatureSpec",
  "HTC",
  "HTCConfig",
  "LinearConfig",
  "LinearHead",
  "Mask2Former",
  "Mask2FormerConfig",
  "Predictor",
  "UPerNet",
  "UPerNetConfig",
  "VideoSwinHead",
  "VideoSwinHeadConfig",
  "build_backbone",
  "build_neck",
  "cascade_mask_rcnn",
  "fold_backbone",
  "load_backbone",
  "load_config",
  "mask_rcnn",
  "normalise",
  "partition",
  "run_evaluation",
  "run_training",
  "save_backbone",
]

# Where each name comes from; the imports above say the same to type checkers and editors.
_MODULES = {
  "backbones.families": ("build_backbone", "fold_backbone", "load_backbone", "save_backbone"),
  "backbones.base": ("FeatureSpec", "normalise"),
  "config_files": ("load_config",),
  "freezing.partition": ("partition",),
  "heads.htc.config": ("HTCConfig", "cascade_mask_rcnn", "mask_rcnn"),
  "heads.htc.htc": ("HTC",),
  "heads.linear": ("LinearConfig", "LinearHead"),
  "heads.mask2former.config": ("Mask2FormerConfig",),
  "heads.mask2former.mask2former": ("Mask2Former",),
  "heads.upernet": ("UPerNet", "UPerNetConfig"),
  "heads.video_swin": ("AttentiveHead", "AverageHead", "VideoSwinHead", "VideoSwinHeadConfig"),
  "necks.bifpn": ("BiFPN",),
  "necks.build": ("build_neck",),
  "necks.fpn": ("FPN",),
  "prediction.predictor": ("Predictor",),
}
_SOURCES = {name: (module, name) for module, names in _MODULES.items() for name in names} | {
  "run_evaluation": ("training.loop", "evaluate"),
  "run_training": ("training.loop", "train"),
}


def __getattr__(name: str) -> Any:
  if name in _SOURCES:
    module, attribute = _SOURCES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
  message = f"module {__name__!r} has no attribute {name!r}"
  if not name.startswith("_"):
    if importlib.util.find_spec(f"{__name__}.{name}"):
      message += f"; it is a module of its own: import {__name__}.{name}."
    else:
      message += f"; it has {', '.join(__all__)}.{messages.did_you_mean(name, __all__)}"
  raise AttributeError(message)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
