"""Surface normals and depth by a linear head on a frozen backbone.

  python -m frozen_vision.main --config=configs/depth_normals.py --workdir=/tmp/depth_normals

Generated rooms with exact normals and depth. Normals are classified among 40 directions, which k-means finds
in the training data, and decoded as the mean of them weighted by their probabilities; depth is the mean of 64
bins weighted likewise. `--config.dense_regression.head.name=upernet` puts UPerNet in the place of the linear
head, and `--config.dense_regression.targets="('depth',)"` learns depth alone.

All values are our choice: sizes that two CPU cores train in minutes.
"""

import ml_collections

from frozen_vision import config as config_lib
from frozen_vision.tasks.dense_regression_options import DenseRegressionConfig

ARGUMENTS = {"recipe": ("demo",)}
VARIANTS = {"": "recipe=demo"}


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
  config_lib.parse_arguments(arguments, ARGUMENTS, "configs/depth_normals.py", VARIANTS)
  config = config_lib.config_dict(DenseRegressionConfig())
  config.trainable = ("head/.*",)
  _demo(config)
  return config


def _demo(config: ml_collections.ConfigDict) -> None:
  config.headline = "DEMO on generated rooms with the shipped swinv2_nano."
  config.steps = 600
  config.batch_size = 8
  config.eval_batch_size = 20
  config.ema_decay = 0.99
  config.log_every = 50
  config.eval_every = 300
  config.checkpoint_every = 300
  config.optimizer.update(dict(learning_rate=3e-3, weight_decay=0.0, warmup_steps=50, clip_norm=1.0))
  options = config.dense_regression
  options.frame = options.eval_frame = (128, 128)
  options.short_sides = (128,)
  options.long_side = 128
  config_lib.set_for(options.head, "upernet", channels=64, norm_groups=8)
