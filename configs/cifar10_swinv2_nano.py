"""Pretrains the backbone that ships with the package: SwinV2-nano on CIFAR-10.

  python -m frozen_vision.main --config=configs/cifar10_swinv2_nano.py --workdir=/tmp/nano \
    --config.classification.train=DATA/train.tar.xz --config.classification.validation=DATA/test.tar.xz

It made the shipped file, one run: 24 epochs in 112 minutes on two CPU cores (AMD EPYC) that small jobs
shared, test top-1 85.2% at 64 px, of the written file (frozen_vision/backbones/weights/swinv2_nano.md).
Positions are normalised by the windows that 64-pixel images have: 8, 8, 4 and 2.
"""

import ml_collections

from frozen_vision import config as config_lib
from frozen_vision.tasks.classification_options import ClassificationConfig


def get_config() -> ml_collections.ConfigDict:
  config = config_lib.config_dict(ClassificationConfig())
  config.trainable = (".*",)
  config.backbone.name = "swinv2_nano"
  config.backbone.weights = "init"
  config.backbone.overrides = dict(pretrained_window_sizes=(8, 8, 4, 2))
  # 128 images a step; 390 steps are an epoch.
  config.batch_size = 128
  config.eval_batch_size = 500
  config.steps = 390 * 24
  config.ema_decay = 0.999
  config.optimizer.update(
    dict(name="muon", learning_rate=4e-3, weight_decay=0.1, warmup_steps=200, clip_norm=1.0)
  )
  config.classification.update(
    dict(
      train="cifar10_jpeg/train.tar.xz",
      validation="cifar10_jpeg/test.tar.xz",
      decoded_cache=True,
      image_size=32,
      crop_padding=4,
      rand_augment=dict(num_ops=0),
      erasing=0.0,
      mixup=0.0,
      cutmix=0.0,
      label_smoothing=0.1,
      resolutions=((0, 64),),
    )
  )
  config.eval_every = 390 * 8
  config.checkpoint_every = 390
  config.log_every = 50
  config.pictures = 0
  return config
