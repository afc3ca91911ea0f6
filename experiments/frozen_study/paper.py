"""The grids at full scale, as commands: COCO, ADE20K, Kinetics-400, NYUv2, ImageNet-1K, LVIS; one seed.

None has been run here. Weights are expected under weights/, by the names in `_BACKBONES`; how the paper
pretrained each is not all known to us, so the names say only what they must have learnt from.
"""

from collections.abc import Iterator, Mapping
import pathlib
from typing import Any

from experiments.frozen_study import grids

# The backbone of a row at full scale: (variant, what its weights learnt from). Nothing stands for rows whose
# architecture has no recipe of detection and so on at full scale.
_BACKBONES = {
  "swinv2_nano": ("swinv2_b", "supervised_22k"),
  "swinv2_nano_supervised": ("swinv2_b", "supervised_1k"),
  "swinv2_nano_simmim": ("swinv2_b", "simmim"),
  "swinv2_nano_moco": ("swinv2_b", "moco"),
  "swinv2_nano_fd": ("swinv2_b", "fd"),
  "swinv2_nano_lite0": ("swinv2_b", "fd_of_another_family"),
  "swinv2_nano:random": ("swinv2_b", "random"),
}
_OTHER_BACKBONES: dict[str, dict[str, tuple[str, str]]] = {
  "size": {
    "swinv2_narrow_supervised": ("swinv2_b", "supervised_22k"),
    "swinv2_nano_supervised": ("swinv2_l", "supervised_22k"),
    "swinv2_wide_supervised": ("swinv2_g", "supervised_22k_ext"),
  },
  "shared": {"efficientnet_lite2": ("swinv2_g", "supervised_22k_ext")},
}
_CONFIGS = {
  "detection": "coco_htc:backbone={size}",
  "segmentation": "ade20k_mask2former:backbone={size}",
  "linear_segmentation": "ade20k_mask2former:backbone={size},head=linear",
  "action": "kinetics_video_swin:backbone={size}",
  "normals_depth": "depth_normals:recipe=nyuv2",
  "probes": "classification:recipe=files",
}
_IMAGENET = {"classification.train": "imagenet/train", "classification.validation": "imagenet/val"}
# Recipes of fine-tuning, which are of pretrained and of distilled weights.
_FINE_TUNED = (
  "simmim_swinv2_b",
  "fd_clip_vitb16_100",
  "fd_clip_vitb16",
  "fd_clip_vitl14",
  "fd_deit_vitb16",
  "fd_dino_vitb16",
  "fd_esvit_swinb",
)

Run = tuple[str, str, dict[str, Any], str]


def runs(name: str) -> Iterator[Run]:
  """(folder, config, options, mode) of every run of a grid at full scale."""
  if name.startswith("reuse_"):
    yield from _reuse(name)
    return
  if name == "pretraining_tuned":
    yield from ((recipe, f"fine_tuning:recipe={recipe}", {}, "train") for recipe in _FINE_TUNED)
    return
  grid = grids.GRIDS[name]
  backbones = _OTHER_BACKBONES.get(name, _BACKBONES)
  for variant in grid.variants:
    if variant.backbone not in backbones:
      continue
    size, weights = backbones[variant.backbone]
    for recipe in grid.rows:
      config = _CONFIGS[recipe].format(size=size)
      if recipe in variant.configs:
        config += "," + variant.configs[recipe].partition(":")[2]
      options = {
        "backbone.weights": weights if weights == "random" else f"weights/{size}_{weights}.safetensors"
      }
      if "{size}" not in _CONFIGS[recipe]:
        options["backbone.name"] = size
      if recipe == "probes":
        options |= _IMAGENET
      options |= _at_full_scale(variant.changes.get(recipe, {}))
      yield f"{variant.label}/{recipe}", config, options, "probe" if recipe == "probes" else "train"


def _at_full_scale(changes: Mapping[str, Any]) -> dict[str, Any]:
  """Options of a variant as the full recipes take them."""
  found = {key: value for key, value in changes.items() if key != "cache.path"}
  if "action.head.depths" in found:  # those heads read one level
    found["action.head.depths"] = found["action.head.depths"][:1]
  if "adapters.width" in found:
    found["adapters.width"] = 64
  return found


def _reuse(name: str) -> Iterator[Run]:
  """Proper Reuse, of ResNet-RS-101 and EfficientNet-B7 in the places of nano and Lite0."""
  backbone = "efficientnet_b7" if "lite0" in name else "resnet_rs101"
  data = "coco" if name.endswith("coco") else "lvis"
  for detector in ("fpn", "nas_fpn", "cascade"):
    for train in ("heads", "all", "adapters"):
      config = f"coco_proper_reuse:backbone={backbone},detector={detector},train={train},data={data}"
      yield f"{backbone}_{detector}_{train}_{data}", config, {}, "train"


def commands(name: str, workdir: pathlib.Path) -> list[list[str]]:
  """The command of every run of a grid at full scale."""
  found = []
  for folder, config, options, mode in runs(name):
    flags = [f"--config.{key}={value}" for key, value in options.items()]
    command = ["python", "-m", "frozen_vision.main", f"--mode={mode}", f"--config={config}"]
    found.append([*command, f"--workdir={workdir / 'paper' / folder}", *flags])
  return found
