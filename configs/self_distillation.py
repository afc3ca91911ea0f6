"""Pretrains a backbone by self-distillation: DINO (arXiv 2104.14294).

  python -m frozen_vision.main --config=configs/self_distillation.py --workdir=/tmp/dino

| arguments | backbone | data | source of the values |
|---|---|---|---|
| recipe=demo, the default | swinv2_nano | generated shapes of 64 px | our own |
| recipe=nano | swinv2_nano | CIFAR-10 at 64 px, local crops of 32 px | our own |
| recipe=vits16 | ViT-S/16 | ImageNet-1K | facebookresearch/dino, README, "Boosting DINO performance" |

Short names: :nano, :vits16. Data are images in folders of classes or a tar archive of them, as for
classification; evaluation alone reads the classes, for nearest neighbours within the validation images:

  python -m frozen_vision.main --config=configs/self_distillation.py:nano --workdir=/tmp/nano \
    --config.self_distillation.train=DATA/train.tar.xz \
    --config.self_distillation.validation=DATA/test.tar.xz

`experiments/export_backbone.py` writes the teacher as a weights file.

vits16 is the command of that README for 16 GPUs of 64 images: 300 epochs, teacher temperature 0.07 within 30
epochs, prototypes of trained lengths; its authors report 73.3% of nearest neighbours and 76.0% of a linear
probe on ImageNet. The other values are the defaults of main_dino.py. Differences from it: the teacher's
temperature grows at every step, not at every epoch; and tokens and positions are not decayed, where the
released code leaves out biases and norms alone. It has not been run.
"""

import ml_collections

from frozen_vision import config as config_lib
from frozen_vision.tasks import self_distillation

ARGUMENTS = {"recipe": ("demo", "nano", "vits16")}
VARIANTS = {"": "recipe=demo", "nano": "recipe=nano", "vits16": "recipe=vits16"}

_BATCH = 1024
_EPOCH = 1_281_167 // _BATCH  # the last, smaller batch is dropped


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
  chosen = config_lib.parse_arguments(arguments, ARGUMENTS, "configs/self_distillation.py", VARIANTS)
  recipe = chosen.get("recipe", "demo")
  config = self_distillation.default_config()
  config.backbone.weights = "init"
  config.optimizer.delayed = ("head/prototypes/.*",)
  (_vits16 if recipe == "vits16" else _small)(config, recipe)
  return config


def _small(config: ml_collections.ConfigDict, recipe: str) -> None:
  """SwinV2-nano; positions are normalised by the windows that 64-pixel images have."""
  options = config.self_distillation
  config.backbone.name = "swinv2_nano"
  config.backbone.overrides = dict(pretrained_window_sizes=(8, 8, 4, 2))
  config.optimizer.update(
    dict(learning_rate=1e-3, weight_decay=0.04, final_weight_decay=0.4, warmup_steps=200, clip_norm=3.0)
  )
  options.update(dict(prototypes=2048, hidden=512, bottleneck=128, local_size=32, local_crops=4))
  if recipe == "demo":
    config.headline = (
      "DEMO on generated shapes: swinv2_nano from scratch agrees with its own average. Your own images: "
      "--config=configs/self_distillation.py:nano."
    )
    config.update(dict(steps=300, batch_size=32, eval_batch_size=60, log_every=20, eval_every=150))
    config.ema_decay = 0.99  # of so few steps
    config.optimizer.update(dict(warmup_steps=30, delay_steps=30))
    options.update(dict(data="shapes", image_size=64, local_crops=2))
    return
  config.update(dict(steps=390 * 24, batch_size=128, eval_batch_size=500, log_every=50, eval_every=390 * 8))
  config.checkpoint_every = 390
  config.optimizer.delay_steps = 390
  options.update(
    dict(
      train="cifar10_jpeg/train.tar.xz",
      validation="cifar10_jpeg/test.tar.xz",
      decoded_cache=True,
      image_size=32,
      resized_to=64,
      blur=(0.0, 0.0),  # of 32 pixels little is left
      local_blur=0.0,
    )
  )


def _vits16(config: ml_collections.ConfigDict, recipe: str) -> None:
  """300 epochs of ImageNet-1K in batches of 1,024; 5e-4 for every 256 images of a batch."""
  del recipe
  config.backbone.name = "dino_vits16"
  config.backbone.overrides = dict(drop_path_rate=0.1)
  config.update(dict(steps=300 * _EPOCH, batch_size=_BATCH, eval_batch_size=256, log_every=100))
  config.update(dict(eval_every=10 * _EPOCH, checkpoint_every=_EPOCH))
  rate = 5e-4 * _BATCH / 256
  config.optimizer.update(
    dict(
      learning_rate=rate,
      final_fraction=1e-6 / rate,
      weight_decay=0.04,
      final_weight_decay=0.4,
      warmup_steps=10 * _EPOCH,
      clip_norm=3.0,
      clip_each=True,
      delay_steps=_EPOCH,
    )
  )
  config.self_distillation.update(
    dict(
      train="imagenet/train",
      validation="imagenet/val",
      fixed_norm=False,
      teacher_temperature=0.07,
      temperature_steps=30 * _EPOCH,
    )
  )
