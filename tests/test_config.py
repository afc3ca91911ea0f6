"""Configs: unknown and missing keys, and every variant that the repository ships."""

import dataclasses
import importlib.util
import itertools
import pathlib
import re

from flax import nnx
import jax
import pytest

from frozen_vision import config_files
from frozen_vision.backbones import families
from frozen_vision.backbones.base import FeatureSpec
from frozen_vision.files import trees
from frozen_vision.freezing import partition as freeze
from frozen_vision.heads.htc import htc
from frozen_vision.necks import build as necks
from frozen_vision.tasks import base, detection
from frozen_vision.tasks import build as tasks_build
from tests import tiny

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def _load(name):
  spec = importlib.util.spec_from_file_location(name, _ROOT / "configs" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


class _Source:
  """Classes, and no data."""

  def __init__(self, categories):
    self.categories = categories

  def __len__(self):
    return 1


def test_all_problems_are_listed_with_suggestions():
  config = tiny.detection()
  config.optimizer.learning_rat = 1.0
  config.stepps = 3
  config.optimizer.Nonsense = 1
  config.batch_size = 0
  with pytest.raises(ValueError) as caught:
    tasks_build.read_config(config)
  lines = str(caught.value).splitlines()
  assert len(lines) == 4
  assert (
    "config.optimizer.learning_rat: there is no such option; did you mean config.optimizer.learning_rate?"
    in lines
  )
  assert "config.stepps: there is no such option; did you mean config.steps?" in lines
  assert "config.batch_size is 0; expected a whole number of at least 1." in lines
  assert any(
    "config.optimizer.Nonsense: there is no such option; config.optimizer has name, " in x for x in lines
  )


def test_options_that_are_not_given_have_their_defaults():
  config = tasks_build.read_config({"task": "classification", "steps": 7})
  assert config.steps == 7 and config.batch_size == 16 and config.classification.image_size == 224


def test_options_of_heads_and_backbones_are_checked():
  config = tiny.detection()
  config.detection.head.roi_sample = 4
  with pytest.raises(
    ValueError, match="config.detection.head.roi_sample: .* did you mean config.detection.head.roi_samples"
  ):
    tasks_build.build_task(config)
  config = tiny.detection()
  config.backbone.overrides.window_sise = 4
  with pytest.raises(ValueError, match="config.backbone: .*'window_sise'.*Did you mean 'window_sizes'"):
    tasks_build.build_task(config)


@pytest.mark.parametrize(
  "key, value, message",
  [
    (
      "task",
      "detektion",
      "config.task is 'detektion'; known: action, classification, contrastive, dense_regression, detection",
    ),
    ("detection.data", "coko", "'coko'; expected scenes, photos, coco, voc, files or prepared"),
    ("detection.head.name", "rcnn", "config.detection.head.name is 'rcnn'; known: .*mask_rcnn"),
    ("backbone.name", "swinv2_x", "Unknown backbone 'swinv2_x'; known: .*swinv2_nano"),
  ],
)
def test_unknown_names_list_the_known_ones(key, value, message):
  config = tiny.detection()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=message):
    tasks_build.build_task(config).build_model()


def test_every_variant_is_a_config_that_is_read():
  module = _load("coco_htc")
  for variant, arguments in module.VARIANTS.items():
    config = tasks_build.read_config(module.get_config(variant))
    assert config == tasks_build.read_config(module.get_config(arguments))
    backbone = families.backbone_config(config.backbone.name, **config.backbone.overrides)
    assert len(backbone.feature_specs) == 4
    is_small = variant in ("", "photos", "overfit", "files")
    assert (config.detection.data in ("scenes", "photos")) == (variant in ("", "photos", "overfit"))
    weights = config.backbone.weights
    assert is_small == (weights == ("efficientnet_lite0" if variant in ("photos", "files") else "shipped"))
    if not is_small:
      assert config.backbone.name in variant and config.backbone.name in config.backbone.weights
    if variant.startswith("dino"):
      assert {spec.stride for spec in backbone.feature_specs} == {16} and weights == variant
      for neck in ("simple_pyramid", "vit_adapter"):
        options = tasks_build.read_config(module.get_config(f"{arguments},neck={neck}")).detection.neck
        pyramid = nnx.eval_shape(
          lambda o=options, b=backbone: necks.from_options(
            o, b.feature_specs, dtype="bfloat16", rngs=nnx.Rngs(0)
          )
        )
        assert [spec.stride for spec in pyramid.feature_specs] == [4, 8, 16, 32, 64]
  assert module.get_config("").headline.startswith("DEMO")
  for name in list(module.VARIANTS)[2:]:
    assert f":{name}" in module.__doc__


@pytest.mark.parametrize("variant", ["swinv2_g", "objects365_swinv2_g", "swinv2_g_finetune"])
def test_the_models_of_the_giant_recipes(variant, monkeypatch):
  """Traced at full size, with nothing in memory: what trains, and a step's losses."""
  config = tasks_build.read_config(_load("coco_htc").get_config(variant))
  config = config.replace({"backbone.weights": "random"})  # the paper's weights were never published
  categories = [dict(id=i + 1, name=str(i)) for i in range(365 if "objects" in variant else 80)]
  monkeypatch.setattr(detection, "_open_sources", lambda *_, **__: [_Source(categories)] * 2)
  task = detection.DetectionTask(config)
  graphdef, trainable, frozen = freeze.partition(nnx.eval_shape(task.build_model), tuple(config.trainable))

  def count(state):
    return sum(leaf.size for leaf in jax.tree.leaves(state)) / 1e6

  if variant.endswith("finetune"):
    assert count(trainable) > 3000 and not count(frozen)
    assert trees.flatten(trainable)["neck/attention/qkv/kernel"].shape == (4096, 3 * 4096)
    assert config.backbone.overrides["drop_path_rate"] == 0.4
  else:
    assert count(frozen) > 2900 and count(trainable) < 100
    assert set(trainable) == {"neck", "head"}
  names = trees.flatten(trainable)
  assert any(name.startswith("head/mask_heads/") for name in names) == (not variant.startswith("objects"))
  height, width = config.detection.frame
  n = config.detection.max_objects
  shape = jax.ShapeDtypeStruct
  batch = dict(
    image_size=shape((1, 2), "int32"),
    boxes=shape((1, n, 4), "float32"),
    labels=shape((1, n), "int32"),
    valid=shape((1, n), "bool"),
    masks=shape((1, n, height, width // 8), "uint8"),
  )
  features = tuple(
    shape((1, height // stride, width // stride, 128 * stride), "bfloat16") for stride in (4, 8, 16, 32)
  )
  if variant.startswith("objects"):
    del batch["masks"]

  def loss(*state):
    return task.loss(nnx.merge(graphdef, *state[:2]), *state[2:], jax.random.key(0), None)

  terms = jax.eval_shape(loss, trainable, frozen, batch, features).terms
  assert all(value.shape == () for value in terms.values())
  assert ("stage2_mask" in terms) == ("masks" in batch)


def test_objects365_and_coco_share_what_a_head_may_start_from():
  """What the second stage takes from the first, by names and shapes; the classes differ, and the masks are
  new."""
  module = _load("coco_htc")
  leaves = []
  for variant, classes in (("objects365_swinv2_g", 365), ("swinv2_g", 80)):
    options = tasks_build.read_config(module.get_config(variant)).detection
    head_config = dataclasses.replace(options.head, num_classes=classes)
    specs = tuple(FeatureSpec(4 * 2**i, 256) for i in range(5))
    head = nnx.eval_shape(lambda c=head_config: htc.HTC(specs, c, rngs=nnx.Rngs(0)))
    leaves.append({f"head/{name}": leaf.shape for name, leaf in trees.flatten(nnx.state(head)).items()})
  first, second = leaves
  fresh = {name for name in second if any(re.fullmatch(pattern, name) for pattern in options.init.keep)}
  assert {name for name in second if first.get(name) != second[name]} == fresh


def test_recipes_of_proper_reuse():
  """Every combination is read; what trains has the paper's size (table 3), as far as the config says."""
  module = _load("coco_proper_reuse")
  trained = {}
  for backbone, detector, masks in itertools.product(
    *(module.ARGUMENTS[x] for x in ("backbone", "detector", "masks"))
  ):
    arguments = f"backbone={backbone},detector={detector},masks={masks}"
    if (detector, masks) == ("retinanet", "on"):
      with pytest.raises(ValueError, match="RetinaNet has no masks"):
        module.get_config(arguments)
      continue
    config = tasks_build.read_config(module.get_config(f"{arguments},data=lvis"))
    assert config.detection.data == "files" and config.detection.head.max_detections == 300
    config = tasks_build.read_config(module.get_config(arguments))
    assert bool(config.detection.copy_paste) == (backbone == "efficientnet_b7" and masks == "on")
    specs = families.backbone_config(config.backbone.name).feature_specs
    neck = nnx.eval_shape(
      lambda o=config.detection.neck, s=specs: necks.from_options(o, s, dtype="bfloat16", rngs=nnx.Rngs(0))
    )
    head = nnx.eval_shape(
      lambda o=config.detection.head, s=neck.feature_specs: detection.HEADS[o.name](
        s, dataclasses.replace(o, num_classes=90), dtype="bfloat16", rngs=nnx.Rngs(0)
      )
    )
    leaves = jax.tree.leaves(nnx.state((neck, head), nnx.Param))
    trained[backbone, detector, masks] = sum(leaf.size for leaf in leaves) / 1e6
  found = [trained["resnet_rs101", detector, "off"] for detector in ("fpn", "nas_fpn", "cascade")]
  assert found == pytest.approx([20.7, 38.9, 71.3], abs=0.06)
  long = module.get_config("detector=retinanet,epochs=600,train=all")
  assert long.steps == 277_200 and long.trainable == (".*",) and long.optimizer.decay_at == (265_650, 272_580)


def test_lvis_and_adapters_in_proper_reuse():
  module = _load("coco_proper_reuse")
  first = tasks_build.read_config(module.get_config("data=lvis,train=adapters,loss=federated,epochs=600"))
  assert first.adapters.kind == "bottleneck" and first.detection.repeat_threshold == 0.001
  head = first.detection.head
  assert (head.class_loss, head.federated_classes, head.class_balance) == ("sigmoid", 50, 0)
  second = tasks_build.read_config(module.get_config("data=lvis,backbone=efficientnet_b7,masks=on,stage=2"))
  assert second.detection.head.class_balance == 0.999 and second.detection.head.class_loss == "softmax"
  [pattern] = second.trainable
  second, names = second.replace({"backbone.weights": "init"}), base.named_classes("ab")
  with pytest.raises(FileNotFoundError, match="init.path: .*stage1_head.safetensors does not exist"):
    nnx.eval_shape(detection.DetectionTask(second, names).build_model)
  task = detection.DetectionTask(second.replace({"detection.init.path": ""}), names)
  state = nnx.state(nnx.eval_shape(task.build_model), nnx.Param)
  trained = [path for path in trees.flatten(state) if re.fullmatch(pattern, path)]
  assert trained == [f"head/box_heads/0/classes/{name}" for name in ("bias", "kernel")]
  with pytest.raises(ValueError, match="adapters of stage 1 are not carried over"):
    module.get_config("data=lvis,train=adapters,stage=2")
  with pytest.raises(ValueError, match="loss=federated and stage=2 are of Faster R-CNN"):
    module.get_config("detector=retinanet,loss=federated")


def test_an_unknown_variant_lists_the_known_ones():
  with pytest.raises(ValueError, match="no variant 'swinv2_x'; known: .*:swinv2_b, .*:swinv2_g"):
    _load("coco_htc").get_config("swinv2_x")


def test_the_pretraining_is_a_config_that_is_read():
  config = _load("cifar10_swinv2_nano").get_config()
  assert tasks_build.read_config(config).classification.resolutions == ((0, 64),)


def test_every_recipe_of_feature_distillation_is_a_config_that_is_read():
  module = _load("feature_distillation")
  released = dict(clip_vitb16_100=100, clip_vitb16=300, clip_vitl14=300, deit_vitb16=300, dino_vitb16=300)
  for variant in module.VARIANTS:
    config = tasks_build.read_config(module.get_config(variant))
    assert config.trainable == (".*",) and config.backbone.weights == "init"
    student = families.backbone_config(config.backbone.name, **config.backbone.overrides)
    teacher = config.feature_distillation.teacher
    assert families.backbone_config(teacher.name, **teacher.overrides).feature_specs
    if variant in released:
      assert config.steps == released[variant] * 625 and config.optimizer.learning_rate == 1.2e-3
      assert student.positions == "relative" and student.mean == (0.485, 0.456, 0.406)
      assert student.position_grid == 224 // student.patch_size
    else:
      assert student.residual_norm_init == 1e-5
  overrides = {"feature_distillation.teacher.overrides.window_sise": 4}
  with pytest.raises(ValueError, match="config.feature_distillation.teacher.*'window_sise'"):
    tasks_build.check(tasks_build.read_config(module.get_config()).replace(overrides))


@pytest.mark.parametrize(
  "task", ["feature_distillation", "masked_image_modeling", "contrastive", "self_distillation"]
)
def test_positions_of_pretrained_swins_are_normalised_by_their_windows(task):
  """At larger images, which have other windows, positions stay those of the pretraining."""
  module, swins = _load(task), 0
  for variant in module.VARIANTS:
    config = tasks_build.read_config(module.get_config(variant))
    if config.backbone.name.startswith("swinv2"):
      swins += 1
      sizes = families.backbone_config(config.backbone.name, **config.backbone.overrides)
      maps = [config.section.side // spec.stride for spec in sizes.feature_specs]
      windows = tuple(min(window, side) for window, side in zip(sizes.window_sizes, maps))
      assert sizes.pretrained_window_sizes == windows, variant
  assert swins > 1


def test_every_recipe_of_masked_image_modeling_is_a_config_that_is_read():
  module = _load("masked_image_modeling")
  for variant in module.VARIANTS:
    config = tasks_build.read_config(module.get_config(variant))
    assert config.trainable == (".*",) and config.backbone.weights == "init"
    backbone = families.backbone_config(config.backbone.name, **config.backbone.overrides)
    options = config.masked_image_modeling
    # A masked patch is whole cells of the last map or the other way round, and images are whole patches.
    assert options.side % options.mask_patch == options.side % backbone.feature_specs[-1].stride == 0
    if variant in ("swinv2_b", "vitb16"):
      assert config.steps == 800 * 625 and config.optimizer.decay_at == (700 * 625,)
  giant = tasks_build.read_config(module.get_config("swinv2_g"))
  assert giant.steps == pytest.approx(20 * 70e6 / giant.batch_size, rel=1e-3)
  assert giant.optimizer.clip_norm == 100 and giant.masked_image_modeling.crop_scale == (0.67, 1.0)


def test_every_recipe_of_contrastive_pretraining_is_a_config_that_is_read():
  module = _load("contrastive")
  for variant in module.VARIANTS:
    config = tasks_build.read_config(module.get_config(variant))
    assert config.backbone.weights == "init" and config.accumulate == 1
  assert config.optimizer.learning_rate == pytest.approx(2.4e-3)  # moco-v3's for ViT-B
  [pattern] = config.trainable
  assert re.fullmatch(pattern, "backbone/blocks/0/mlp/fc1/kernel") and re.fullmatch(pattern, "predictor/x")
  assert not re.fullmatch(pattern, "backbone/patch_embed/proj/kernel")


def test_every_recipe_of_self_distillation_is_a_config_that_is_read():
  module = _load("self_distillation")
  for variant in module.VARIANTS:
    config = tasks_build.read_config(module.get_config(variant))
    options = config.self_distillation
    assert config.backbone.weights == "init" and config.optimizer.delay_steps > 0
    strides = [spec.stride for spec in families.backbone_config(config.backbone.name).feature_specs]
    assert options.local_size % strides[-1] == options.side % strides[-1] == 0
  assert config.optimizer.learning_rate == 2e-3 and config.ema_decay == 0.996  # of vits16, the last one
  assert config.steps == 300 * 1251 and options.temperature_steps == 30 * 1251
  assert (options.prototypes, options.local_crops, options.local_size) == (65536, 8, 96)


def test_a_config_file_is_read_as_by_the_command_line():
  path = _ROOT / "configs" / "coco_htc.py"
  assert config_files.load_config(path) == tasks_build.read_config(_load("coco_htc").get_config())
  changes = {
    "optimizer.learning_rate": 5e-4,
    "detection.frame": (64, 96),
    "detection.neck": dict(channels=16),
    "detection.head.with_masks": False,
  }
  config = config_files.load_config(f"{path}:photos", changes)
  assert config.detection.data == "photos" and config.optimizer.learning_rate == 5e-4
  assert tuple(config.detection.frame) == (64, 96) and config.detection.head.with_masks is False
  assert config.detection.neck.channels == 16 and config.detection.neck.levels == 5
  with pytest.raises(AttributeError):
    config.steps = 3


@pytest.mark.parametrize(
  "source, changes, error, message",
  [
    ("absent.py", {}, FileNotFoundError, "absent.py: no such file"),
    ("/absent/configs/coco_htc.py", {}, FileNotFoundError, "/absent/configs/coco_htc.py: no such file"),
    ("configs/cifar10_swinv2_nano.py:large", {}, ValueError, "takes no arguments; found 'large'"),
    ("README.md", {}, ValueError, "README.md: expected a Python file"),
    ("frozen_vision/ops/mirror.py", {}, ValueError, "expected a function get_config"),
    ("configs/coco_htc.py:photo", {}, ValueError, "no variant 'photo'"),
    ("configs/coco_htc.py", {"stpes": 3}, ValueError, "no such option; did you mean config.steps"),
    ("configs/coco_htc.py", {"detection.frme": (1, 1)}, ValueError, "did you mean config.detection.frame"),
    ("configs/coco_htc.py", {"steps.more": 3}, ValueError, "config.steps.more: there is no such option"),
    (
      "configs/coco_htc.py",
      {"steps": "many"},
      ValueError,
      "config.steps is 'many'; expected a whole number of at least 1",
    ),
  ],
)
def test_what_load_config_refuses(source, changes, error, message):
  with pytest.raises(error, match=message):
    config_files.load_config(_ROOT / source, changes)
