"""Classification by a linear head on a frozen backbone, and probes of its embeddings.

  python -m frozen_vision.main --mode=probe --config=configs/classification.py --workdir=/tmp/probe
  python -m frozen_vision.main --config=configs/classification.py --workdir=/tmp/classification

The first says what the embeddings know without training anything: a linear classifier selected over 45 weight
decays, nearest neighbours, few-shot episodes, calibration; `probe.md` and `probe.json` in the workdir. The
second trains a linear head by gradient steps on augmented images.

| arguments | data |
|---|---|
| recipe=demo, the default | generated shapes of 64 px, 1,200 + 300 + 300 for test |
| recipe=files | yours, at classification.train and classification.validation, perhaps .test |

A folder of class folders or a tar archive of them, such as CIFAR-10 or Caltech-101. Files stand on
EfficientNet-Lite0, whose ImageNet weights come as a package (requirements.txt); any other backbone goes by
--config.backbone.name and --config.backbone.weights. Short name: :files.
"""

import ml_collections

from frozen_vision import config as config_lib
from frozen_vision.tasks.classification_options import ClassificationConfig

ARGUMENTS = {"recipe": ("demo", "files")}
VARIANTS = {"": "recipe=demo", "files": "recipe=files"}


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
  chosen = config_lib.parse_arguments(arguments, ARGUMENTS, "configs/classification.py", VARIANTS)
  config = config_lib.config_dict(ClassificationConfig())
  config.trainable = ("head/.*",)
  config.pictures = 0
  config.batch_size = 64
  config.eval_batch_size = 64
  config.optimizer.update(dict(learning_rate=1e-2, weight_decay=0.0))
  config.classification.update(
    dict(rand_augment=dict(num_ops=0), erasing=0.0, mixup=0.0, cutmix=0.0, label_smoothing=0.0)
  )
  {"demo": _demo, "files": _files}[chosen.get("recipe", "demo")](config)
  return config


def _demo(config: ml_collections.ConfigDict) -> None:
  config.headline = (
    "DEMO on generated shapes with the shipped swinv2_nano. Your own images: "
    "--config=configs/classification.py:files."
  )
  config.steps = 200
  config.log_every = 50
  config.classification.update(dict(data="shapes", image_size=64, crop_scale=(0.7, 1.0)))


def _files(config: ml_collections.ConfigDict) -> None:
  config.steps = 1000
  config.backbone.update(dict(name="efficientnet_lite0", weights="efficientnet_lite0"))
  config.classification.update(dict(image_size=224))
