"""Pretrains a backbone by contrast of two views: MoCo v3 (arXiv 2104.02057).

  python -m frozen_vision.main --config=configs/contrastive.py --workdir=/tmp/moco

| arguments | backbone | data | source of the values |
|---|---|---|---|
| recipe=demo, the default | swinv2_nano | generated shapes of 64 px | our own |
| recipe=nano | swinv2_nano | CIFAR-10 at 64 px | our own |
| recipe=vitb16 | ViT-B/16, patch embedding left as it is drawn | ImageNet-1K | facebookresearch/moco-v3 |

Short names: :nano, :vitb16. Data are images in folders of classes or a tar archive of them, as for
classification; evaluation alone reads the classes, for nearest neighbours within the validation images:

  python -m frozen_vision.main --config=configs/contrastive.py:nano --workdir=/tmp/nano \
    --config.contrastive.train=DATA/train.tar.xz --config.contrastive.validation=DATA/test.tar.xz

`experiments/export_backbone.py` writes the backbone as a weights file. In vitb16, momentum and learning rate
change at every step, as with moco-v3's --moco-m-cos. Differences from the released code: the ViT is
initialised as this package's are; biases, norms and tokens are not decayed, where torch's AdamW decays all
parameters; and images are resized bicubically. It has not been run.
"""

import ml_collections

from frozen_vision import config as config_lib
from frozen_vision.tasks import contrastive

ARGUMENTS = {"recipe": ("demo", "nano", "vitb16")}
VARIANTS = {"": "recipe=demo", "nano": "recipe=nano", "vitb16": "recipe=vitb16"}

_BATCH = 4096
_EPOCH = 1_281_167 // _BATCH


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
  chosen = config_lib.parse_arguments(arguments, ARGUMENTS, "configs/contrastive.py", VARIANTS)
  recipe = chosen.get("recipe", "demo")
  config = contrastive.default_config()
  config.backbone.weights = "init"
  (_vitb16 if recipe == "vitb16" else _small)(config, recipe)
  return config


def _small(config: ml_collections.ConfigDict, recipe: str) -> None:
  """SwinV2-nano; positions are normalised by the windows that 64-pixel images have."""
  options = config.contrastive
  config.backbone.name = "swinv2_nano"
  config.backbone.overrides = dict(pretrained_window_sizes=(8, 8, 4, 2))
  config.optimizer.update(dict(learning_rate=1e-3, weight_decay=0.05, warmup_steps=200, clip_norm=3.0))
  options.update(dict(hidden=1024, channels=128, crop_scale=(0.2, 1.0)))
  if recipe == "demo":
    config.headline = (
      "DEMO on generated shapes: swinv2_nano from scratch tells images apart. Your own images: "
      "--config=configs/contrastive.py:nano."
    )
    config.update(dict(steps=300, batch_size=32, eval_batch_size=60, log_every=20, eval_every=150))
    config.optimizer.warmup_steps = 30
    options.update(dict(data="shapes", image_size=64))
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
      blur=(0.0, 0.0),  # of 32 pixels little is left
    )
  )


def _vitb16(config: ml_collections.ConfigDict, recipe: str) -> None:
  """300 epochs of ImageNet-1K in batches of 4,096; 1.5e-4 for every 256 images of a batch."""
  del recipe
  config.backbone.name = "mae_vitb16"  # a ViT-B/16 with fixed sine positions
  config.trainable = (r"(?!backbone/patch_embed/).*",)
  config.update(dict(steps=300 * _EPOCH, batch_size=_BATCH, eval_batch_size=256, log_every=100))
  config.update(dict(eval_every=10 * _EPOCH, checkpoint_every=_EPOCH))
  config.optimizer.update(
    dict(learning_rate=1.5e-4 * _BATCH / 256, weight_decay=0.1, warmup_steps=40 * _EPOCH, schedule="cosine")
  )
  config.contrastive.update(dict(train="imagenet/train", validation="imagenet/val", image_size=224))
