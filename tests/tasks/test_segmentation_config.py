"""Every variant of configs/ade20k_mask2former.py is a config that is read."""

import dataclasses
import importlib.util
import pathlib

import pytest

from frozen_vision.backbones import families
from frozen_vision.tasks import build as tasks_build
from frozen_vision.tasks import segmentation
from tests import samples

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def _load():
  spec = importlib.util.spec_from_file_location("ade20k_mask2former", _ROOT / "configs/ade20k_mask2former.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


_PLAIN = [variant for variant in _load().VARIANTS if variant.startswith("dino")]


@pytest.mark.parametrize("variant", [name for name in _load().VARIANTS if name not in _PLAIN])
def test_every_variant_and_head(variant):
  config = tasks_build.read_config(_load().get_config(variant))
  assert config.trainable == ("head/.*",)
  options = config.segmentation
  for head in ("mask2former", "upernet", "linear"):
    chosen = tasks_build.read_config(_load().get_config(f"{_load().VARIANTS[variant]},head={head}"))
    assert chosen.segmentation.head.name == head
    assert dataclasses.is_dataclass(chosen.segmentation.head) and head in segmentation.HEADS
  weights = {"": "shipped", "camvid": "shipped", "files": "efficientnet_lite0"}
  assert config.backbone.weights == weights.get(variant, f"weights/{variant}.safetensors")
  assert (variant in weights) == (options.data != "ade20k")
  assert config.headline.startswith("DEMO") == (variant == "")
  backbone = families.backbone_config(config.backbone.name, **config.backbone.overrides)
  assert len(backbone.feature_specs) == 4
  for frame in (options.frame, options.eval_frame):
    assert all(side % 32 == 0 for side in frame), "a multiple of the coarsest stride"
  if variant not in weights:
    assert config.backbone.name == variant
    assert max(options.short_sides) == 2 * options.frame[0] == 4 * min(options.short_sides)
    assert options.max_segments <= options.head.num_queries
    assert f":{variant}" in _load().get_config("").headline


@pytest.mark.parametrize("variant", _PLAIN)
def test_plain_vision_transformers_and_every_head(variant):
  # What stands between backbone and head, and the side of a crop.
  wanted = dict(
    mask2former=("vit_adapter", 896),
    upernet=("vit_adapter", 896),
    linear=("none", 512),
    plain_mask=("none", 512),
  )
  assert wanted.keys() == segmentation.HEADS.keys()
  for head, (neck, side) in wanted.items():
    config = tasks_build.read_config(_load().get_config(f"backbone={variant},head={head}"))
    options = config.segmentation
    assert (options.head.name, options.neck.name, options.frame) == (head, neck, (side, side))
    assert config.trainable == (("head/.*",) if neck == "none" else ("neck/.*", "head/.*"))
    assert config.backbone.name == config.backbone.weights == variant
    assert options.eval_frame[0] % 32 == 0 and options.eval_frame[0] >= 1.6 * side
  chosen = _load().get_config(f"backbone={variant},head=linear,neck=simple_pyramid")
  assert chosen.segmentation.neck.name == "simple_pyramid" and chosen.trainable == ("neck/.*", "head/.*")
  with pytest.raises(ValueError, match="neck= and head=plain_mask need a plain vision transformer"):
    _load().get_config("backbone=swinv2_b,head=plain_mask")


@pytest.mark.parametrize("size, steps", [("t", 160_000), ("b", 40_000), ("l", 40_000), ("g", 80_000)])
def test_fine_tuning_trains_everything(size, steps):
  config = tasks_build.read_config(
    _load().get_config(f"backbone=swinv2_{size},head=upernet,training=everything")
  )
  assert config.trainable == (".*",) and config.segmentation.head.name == "upernet"
  assert config.steps == steps and config.steps * config.batch_size == 2_560_000
  assert config.optimizer.clip_norm == 0 and config.backbone.overrides["drop_path_rate"] >= 0.3
  with pytest.raises(ValueError, match="training=everything is a recipe of UPerNet on a SwinV2"):
    _load().get_config(f"backbone=swinv2_{size},training=everything")


def test_camvid_opens_files_of_its_layout(tmp_path):
  config = _load().get_config("camvid")
  config.segmentation.root = str(samples.segmentation_root(tmp_path))
  task = tasks_build.build_task(config)
  assert task.headline == "Segmentation: 6 training and 4 validation images, 7 classes."
  config.segmentation.root = "absent"
  with pytest.raises(
    FileNotFoundError, match="segmentation.classes: .*absent/meta.json does not exist.*root=FOLDER"
  ):
    tasks_build.build_task(config)


def test_an_unknown_variant_lists_the_known_ones():
  with pytest.raises(ValueError, match="no variant 'cityscapes'; known: .*:camvid, .*:swinv2_g"):
    _load().get_config("cityscapes")
