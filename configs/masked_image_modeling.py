"""Pretrains a backbone by predicting masked pixels: SimMIM (arXiv 2111.09886), for SwinV2 and plain ViTs.

  python -m frozen_vision.main --config=configs/masked_image_modeling.py --workdir=/tmp/simmim

| arguments | backbone | data | source of the values |
|---|---|---|---|
| recipe=demo, the default | swinv2_nano | generated shapes of 64 px | our own |
| recipe=nano | swinv2_nano | CIFAR-10 at 64 px | our own |
| recipe=swinv2_b | SwinV2-B, window 12, 192 px | ImageNet-1K | microsoft/Swin-Transformer, configs/simmim |
| recipe=vitb16 | ViT-B/16, shared relative positions | ImageNet-1K | microsoft/SimMIM, configs |
| recipe=swinv2_g | SwinV2-G, 192 px | 70 million images | SwinV2 (arXiv 2111.09883), appendix A2.2 |

Short names: :nano, :swinv2_b and so on. Data are images in folders or a tar archive of folders, as for
classification, whose names are not read:

  python -m frozen_vision.main --config=configs/masked_image_modeling.py:nano --workdir=/tmp/nano \
    --config.masked_image_modeling.train=DATA/train.tar.xz \
    --config.masked_image_modeling.validation=DATA/test.tar.xz

`experiments/export_backbone.py` writes the backbone as a weights file. Learning rates of swinv2_b and vitb16
are the released ones for a batch of 2,048, four times the configs' base. Positions of SwinV2 are normalised
by the windows that 192 pixels have: 6 cells in the last stage, not its window of 12.

Differences from the released code: warm-up begins at 0; images are resized bicubically; the mask token is cut
off at two standard deviations, not at one, and is not decayed; and SwinV2's patch embedding is drawn from a
truncated normal distribution, as its other layers are, not from PyTorch's uniform one.

SwinV2-G's images, ImageNet-22K-ext, were never published; that its images are masked and normalised as
SwinV2-B's are is our assumption, its stochastic depth is 0 because the paper gives none for this phase, and
the labels that its later phase mixes in are left out. None of the large recipes has been run.
"""

import ml_collections

from frozen_vision import config as config_lib
from frozen_vision.tasks import masked_image_modeling

_SMALL = ("demo", "nano")
ARGUMENTS = {"recipe": (*_SMALL, "swinv2_b", "vitb16", "swinv2_g")}
VARIANTS = {"": "recipe=demo"} | {name: f"recipe={name}" for name in ARGUMENTS["recipe"][1:]}

_BATCH = 2048
_EPOCH = 1_281_167 // _BATCH  # of ImageNet-1K; the last, smaller batch is dropped


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
  chosen = config_lib.parse_arguments(arguments, ARGUMENTS, "configs/masked_image_modeling.py", VARIANTS)
  recipe = chosen.get("recipe", "demo")
  config = masked_image_modeling.default_config()
  config.backbone.weights = "init"
  if recipe in _SMALL:
    _small(config, recipe)
  elif recipe == "swinv2_g":
    _giant(config)
  else:
    _released(config, recipe)
  return config


def _small(config: ml_collections.ConfigDict, recipe: str) -> None:
  """SwinV2-nano; positions are normalised by the windows that 64-pixel images have."""
  options = config.masked_image_modeling
  config.backbone.name = "swinv2_nano"
  config.backbone.overrides = dict(pretrained_window_sizes=(8, 8, 4, 2))
  config.optimizer.update(dict(learning_rate=1e-3, weight_decay=0.05, warmup_steps=200, clip_norm=5.0))
  # Of 64 pixels, patches of 32 would leave four; the target's window shrinks likewise.
  options.update(dict(mask_patch=16, target_window=15))
  if recipe == "demo":
    config.headline = (
      "DEMO on generated shapes: swinv2_nano from scratch predicts masked pixels. Your own images: "
      "--config=configs/masked_image_modeling.py:nano."
    )
    config.update(dict(steps=300, batch_size=32, eval_batch_size=60, log_every=20, eval_every=150))
    config.optimizer.warmup_steps = 30
    options.update(dict(data="shapes", image_size=64, target_window=0))
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
    )
  )


def _released(config: ml_collections.ConfigDict, recipe: str) -> None:
  """800 epochs of ImageNet-1K: 10 of warm-up, a tenth of the learning rate after 700."""
  options = config.masked_image_modeling
  if recipe == "swinv2_b":
    config.backbone.name = "swinv2_b"
    config.backbone.overrides = dict(
      window_sizes=(12, 12, 12, 12), pretrained_window_sizes=(12, 12, 12, 6), drop_path_rate=0.1
    )
  else:
    config.backbone.name = "fd_vitb16"  # SimMIM's ViT, which Feature Distillation took over
    config.backbone.overrides = dict(drop_path_rate=0.1)
    options.update(dict(image_size=224, target_window=0, initialisation="fixed"))
  options.update(dict(train="imagenet/train", validation="imagenet/val"))
  config.batch_size = _BATCH
  config.eval_batch_size = 256
  config.steps = 800 * _EPOCH
  config.eval_every = 20 * _EPOCH
  config.checkpoint_every = _EPOCH
  config.log_every = 100
  config.optimizer.update(
    dict(
      learning_rate=4e-4,
      weight_decay=0.05,
      clip_norm=5.0,  # the released code's default
      warmup_steps=10 * _EPOCH,
      schedule="steps",
      decay_at=(700 * _EPOCH,),
    )
  )


def _giant(config: ml_collections.ConfigDict) -> None:
  """20 epochs of 70 million images in batches of 9,216."""
  config.backbone.name = "swinv2_g"
  config.backbone.dtype = "bfloat16"
  config.backbone.overrides = dict(window_sizes=(12, 12, 12, 12), pretrained_window_sizes=(12, 12, 12, 6))
  config.batch_size = 9216
  config.eval_batch_size = 1024
  config.steps = 151_900
  config.eval_every = 7_595
  config.checkpoint_every = 1_000
  config.log_every = 100
  config.optimizer.update(
    dict(learning_rate=1.4e-3, weight_decay=0.1, clip_norm=100.0, warmup_steps=30_000, schedule="cosine")
  )
  config.masked_image_modeling.update(dict(train="imagenet22k_ext/train", validation="imagenet22k_ext/val"))
