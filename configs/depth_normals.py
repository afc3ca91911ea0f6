"""Surface normals and depth by a linear head on a frozen backbone.

  python -m frozen_vision.main --config=configs/depth_normals.py --workdir=/tmp/depth_normals

Generated rooms with exact normals and depth. Normals are classified among 40 directions, which k-means finds
in the training data, and decoded as the mean of them weighted by their probabilities; depth is the mean of 64
bins weighted likewise. `--config.dense_regression.head.name=upernet` puts UPerNet in the place of the linear
head, and `--config.dense_regression.targets="('depth',)"` learns depth alone.

| arguments | data |
|---|---|
| recipe=demo, the default | generated rooms of 128 px, 20,000 and 200 |
| recipe=nyuv2 | NYUv2 below config.dense_regression.root: normals as 2011.13377 has them |
| recipe=files | yours: config.dense_regression.train.images, .normals, .depth, .validation likewise |

Short names: :nyuv2, :files. Tags of the values: [ssl] the normals of 2011.13377, by the released code of
Goyal et al. (2019); [ours] our choice. The demo is ours: sizes that two CPU cores train in minutes.
recipe=nyuv2 was not run.
"""

import ml_collections

from frozen_vision import config as config_lib
from frozen_vision.tasks.dense_regression_options import DenseRegressionConfig

ARGUMENTS = {"recipe": ("demo", "nyuv2", "files")}
VARIANTS = {"": "recipe=demo", "nyuv2": "recipe=nyuv2", "files": "recipe=files"}


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
  chosen = config_lib.parse_arguments(arguments, ARGUMENTS, "configs/depth_normals.py", VARIANTS)
  config = config_lib.config_dict(DenseRegressionConfig())
  config.trainable = ("head/.*",)
  {"demo": _demo, "nyuv2": _nyuv2, "files": _files}[chosen.get("recipe", "demo")](config)
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


def _nyuv2(config: ml_collections.ConfigDict) -> None:
  config.headline = "NYUv2: surface normals on a frozen ResNet-50."
  config.backbone.update(dict(name="resnet50", weights="weights/resnet50.pth"))
  config.steps = 150 * 90  # [ssl]
  config.batch_size = 2  # [ssl]: of the released script; the paper's text says 4
  config.eval_batch_size = 2  # [ours]
  config.eval_every = config.checkpoint_every = 15 * 90  # [ours]
  config.loader.workers = 2  # [ours]
  config.optimizer.update(
    dict(
      name="sgd",
      momentum=0.9,  # [ssl]
      learning_rate=0.02,  # [ssl]
      weight_decay=1e-4,  # [ssl]; of kernels as there, but added after the momentum
      schedule="linear",  # [ours]: [ssl] decays by a polynomial of power 0.9
    )
  )
  options = config.dense_regression
  options.data = "nyuv2"
  options.targets = ("normals",)
  options.codewords = 40  # [ssl]
  options.short_sides = (300, 375, 450, 525, 600)  # [ssl]
  options.long_side = 1000  # [ssl]
  options.flip = 0.0  # [ssl]
  options.frame = (608, 800)  # [ours]: holds 600 x 800
  options.eval_frame = (480, 640)
  options.eval_short_side = 480
  options.test.scales = tuple(side / 480 for side in (480, 300, 375, 450, 525, 600))  # [ssl], and 480 [ours]
  # [ssl] has pyramid pooling, scales 1, 2, 3, 6 of 512 channels, on stride 8; UPerNet pools alike [ours].
  options.head.name = "upernet"


def _files(config: ml_collections.ConfigDict) -> None:
  """All [ours]: a first run at a size that a laptop trains; not tuned."""
  _demo(config)
  config.headline = "Your own normals and depth with an ImageNet-pretrained EfficientNet-Lite0."
  config.backbone.update(dict(name="efficientnet_lite0", weights="efficientnet_lite0"))
  config.eval_batch_size = 4
  options = config.dense_regression
  options.data = "files"
  options.root = "."
  options.frame = options.eval_frame = (320, 320)
  options.short_sides = (240,)
  options.long_side = 320
  options.eval_short_side = 240
