"""Distils the features of a frozen teacher into a student (arXiv 2205.14141).

  python -m frozen_vision.main --config=configs/feature_distillation.py --workdir=/tmp/distillation

| arguments | student | teacher | data |
|---|---|---|---|
| recipe=demo, the default | swinv2_nano from scratch | shipped swinv2_nano | generated shapes of 64 px |
| recipe=nano | swinv2_nano from scratch | shipped swinv2_nano | CIFAR-10 |
| recipe=lite0 | swinv2_nano from scratch | EfficientNet-Lite0, ImageNet weights | CIFAR-10 |
| recipe=clip_vitb16_100 | ViT-B/16, shared relative positions | CLIP ViT-B/16 | ImageNet-1K |
| clip_vitb16, clip_vitl14, deit_vitb16, dino_vitb16 | the teacher's sizes | of that name | ImageNet-1K |
| recipe=esvit_swinb | SwinV2-B, window 14 | in the place of EsViT's: your weights | ImageNet-1K |

Short names: :nano, :lite0 and so on. Data are images in folders or a tar archive of folders, as for
classification, whose names are not read:

  python -m frozen_vision.main --config=configs/feature_distillation.py:nano --workdir=/tmp/nano \
    --config.feature_distillation.train=DATA/train.tar.xz \
    --config.feature_distillation.validation=DATA/test.tar.xz

`experiments/export_backbone.py` writes the student as a weights file. The values of the large recipes are
those of the configs in github.com/SwinTransformer/Feature-Distillation, for a batch of 2,048. Three things
differ here: warm-up begins at 0, not at 2e-6 (4e-6 for EsViT); images are resized bicubically, not
bilinearly; and 27 ImageNet files that the released code leaves out are read. None of these recipes has been
run. The recipes of SwinV2-nano are our own.
"""

import ml_collections

from frozen_vision import config as config_lib
from frozen_vision.tasks import feature_distillation

# (teacher, epochs, drop path, least area of a crop) of the released configs.
_RELEASED = {
  "clip_vitb16_100": ("clip_vitb16", 100, 0.1, 0.67),
  "clip_vitb16": ("clip_vitb16", 300, 0.2, 0.08),
  "clip_vitl14": ("clip_vitl14", 300, 0.3, 0.08),
  "deit_vitb16": ("deit_vitb16", 300, 0.3, 0.08),
  "dino_vitb16": ("dino_vitb16", 300, 0.3, 0.08),
}
_SMALL = ("demo", "nano", "lite0")
ARGUMENTS = {"recipe": (*_SMALL, *_RELEASED, "esvit_swinb")}
VARIANTS = {"": "recipe=demo"} | {name: f"recipe={name}" for name in ARGUMENTS["recipe"][1:]}

_IMAGENET, _BATCH = 1_281_167, 2048
_EPOCH = _IMAGENET // _BATCH  # the last, smaller batch is dropped


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
  chosen = config_lib.parse_arguments(arguments, ARGUMENTS, "configs/feature_distillation.py", VARIANTS)
  recipe = chosen.get("recipe", "demo")
  config = feature_distillation.default_config()
  if recipe in _SMALL:
    _small(config, recipe)
  else:
    _large(config, recipe)
  return config


def _small(config: ml_collections.ConfigDict, recipe: str) -> None:
  """SwinV2-nano; positions are normalised by the windows that 64-pixel images have."""
  options = config.feature_distillation
  config.backbone.update(dict(name="swinv2_nano", weights="init"))
  config.backbone.overrides = dict(
    pretrained_window_sizes=(8, 8, 4, 2), residual_norm_init=1e-5, drop_path_rate=0.1
  )
  if recipe == "lite0":
    options.teacher.update(dict(name="efficientnet_lite0", weights="efficientnet_lite0"))
    options.teacher_size = 128
  config.optimizer.update(dict(learning_rate=1e-3, weight_decay=0.05, warmup_steps=200, clip_norm=3.0))
  config.pictures = 8
  if recipe == "demo":
    config.headline = (
      "DEMO on generated shapes: swinv2_nano from scratch learns the features of the shipped one. Your own "
      "images: --config=configs/feature_distillation.py:nano."
    )
    config.update(dict(steps=300, batch_size=32, eval_batch_size=60, log_every=20, eval_every=150))
    config.optimizer.warmup_steps = 30
    options.update(dict(data="shapes", image_size=64, crop_scale=(0.5, 1.0)))
    return
  config.update(dict(steps=390 * 24, batch_size=128, eval_batch_size=500, log_every=50, eval_every=390 * 8))
  config.checkpoint_every = 390
  options.update(
    dict(
      train="cifar10_jpeg/train.tar.xz",
      validation="cifar10_jpeg/test.tar.xz",
      decoded_cache=True,
      image_size=32,
      resized_to=64,
      crop_padding=4,
    )
  )


def _large(config: ml_collections.ConfigDict, recipe: str) -> None:
  """The released recipes. Learning rates are theirs for a batch of 2,048, four times the configs' base."""
  options = config.feature_distillation
  rate, least = 1.2e-3, 2e-5
  if recipe == "esvit_swinb":
    epochs, drop_path, area = 300, 0.3, 0.08
    rate, least = 8e-4, 4e-5
    config.backbone.name = "swinv2_b"
    config.backbone.overrides = dict(
      window_sizes=(14, 14, 14, 7),
      pretrained_window_sizes=(14, 14, 14, 7),
      residual_norm_init=1e-5,
      drop_path_rate=drop_path,
    )
    # EsViT's teacher is a first-generation Swin, which this package does not have; another one stands in.
    options.teacher.update(dict(name="swinv2_b", weights="teacher.safetensors"))
  else:
    name, epochs, drop_path, area = _RELEASED[recipe]
    options.teacher.update(dict(name=name, weights=name))
    config.backbone.name = "fd_vitl14" if name.endswith("14") else "fd_vitb16"
    config.backbone.overrides = dict(drop_path_rate=drop_path)
  config.backbone.weights = "init"
  config.batch_size = _BATCH
  config.eval_batch_size = 256
  config.steps = epochs * _EPOCH
  config.eval_every = 10 * _EPOCH
  config.checkpoint_every = _EPOCH
  config.log_every = 100
  config.optimizer.update(
    dict(
      learning_rate=rate,
      final_fraction=least / rate,
      warmup_steps=10 * _EPOCH,
      weight_decay=0.05,
      clip_norm=3.0,
    )
  )
  options.update(dict(train="imagenet/train", validation="imagenet/val", image_size=224))
  options.crop_scale = (area, 1.0)
