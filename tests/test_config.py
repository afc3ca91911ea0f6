"""Configs: unknown and missing keys, and every variant that the repository ships."""

import importlib.util
import pathlib

import pytest

from frozen_vision import config as config_lib
from frozen_vision.backbones import build
from frozen_vision.heads.htc import config as htc_config
from frozen_vision.tasks import build as tasks_build
from frozen_vision.tasks import detection
from tests import tiny

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def _load(name):
  spec = importlib.util.spec_from_file_location(name, _ROOT / "configs" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _known(**sections):
  known = config_lib.base_config()
  known.update(sections)
  return known


def test_all_problems_are_listed_with_suggestions():
  config = _known()
  config.optimizer.learning_rat = 1.0
  config.stepps = 3
  config.optimizer.Nonsense = 1
  del config.batch_size
  with pytest.raises(ValueError) as caught:
    config_lib.check(config, _known())
  message = str(caught.value)
  assert "unknown optimizer.learning_rat (did you mean optimizer.learning_rate?)" in message
  assert "unknown stepps (did you mean steps?)" in message
  assert "unknown optimizer.Nonsense" in message and "missing batch_size" in message


def test_open_sections_take_any_key_and_nothing_else_does():
  config = _known()
  config.backbone.overrides = dict(window_sizes=(4, 4, 4, 2))
  config_lib.check(config, _known())
  config.backbone.overrides_too = 1
  with pytest.raises(ValueError, match="unknown backbone.overrides_too"):
    config_lib.check(config, _known())


def test_open_sections_are_checked_by_what_they_configure():
  config = tiny.detection()
  config.detection.head_options.roi_sample = 4
  with pytest.raises(ValueError, match="head_options.roi_sample is no option.*did you mean roi_samples"):
    tasks_build.build_task(config)
  config = tiny.detection()
  config.backbone.overrides.window_sise = 4
  with pytest.raises(ValueError, match="'window_sise'.*Did you mean 'window_sizes'"):
    tasks_build.build_task(config).build_model()


@pytest.mark.parametrize("key, value, message", [
    ("task", "detektion", "'detektion'; known: classification, detection"),
    ("detection.data", "coko", "'coko'; known: scenes, photos, coco, files, prepared"),
    ("detection.head", "rcnn", "'rcnn'; known: .*mask_rcnn"),
    ("backbone.name", "swinv2_x", "Unknown backbone 'swinv2_x'; known: .*swinv2_nano"),
])
def test_unknown_names_list_the_known_ones(key, value, message):
  config = tiny.detection()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=message):
    tasks_build.build_task(config).build_model()


def test_every_variant_is_a_config_that_is_read():
  module = _load("coco_htc")
  known = _known(task="detection", detection=detection.default_config())
  fields = {field: None for field in htc_config.HTCConfig.__dataclass_fields__}
  for variant in module.VARIANTS:
    config = module.get_config(variant)
    config_lib.check(config, known)
    backbone = build.backbone_config(config.backbone.name, **config.backbone.overrides)
    assert len(backbone.window_sizes) == 4
    assert set(config.detection.head_options) <= set(fields)
    is_demo = variant in ("", "photos")
    assert is_demo == (config.detection.data in ("scenes", "photos"))
    assert is_demo == (config.backbone.weights == "shipped")
    if not is_demo:
      assert config.backbone.name == variant and variant in config.backbone.weights
  assert module.get_config("").headline.startswith("DEMO")
  for name in module.VARIANTS[2:]:
    assert f":{name}" in module.get_config("").headline


def test_an_unknown_variant_lists_the_known_ones():
  with pytest.raises(ValueError, match="no variant 'swinv2_x'; known: .*:swinv2_b, .*:swinv2_g"):
    _load("coco_htc").get_config("swinv2_x")


def test_the_pretraining_is_a_config_that_is_read():
  config = _load("cifar10_swinv2_nano").get_config()
  known = _known(task="classification", classification=tiny.classification().classification)
  config_lib.check(config, known)
