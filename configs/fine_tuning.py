"""Fine-tuning of a whole classifier as in "How Well Do Self-Supervised Models Transfer?" (arXiv 2011.13377).

  python -m frozen_vision.main --mode=fine_tune --config=configs/fine_tuning.py --workdir=/tmp/fine_tuning

20 runs, each of 5,000 steps, for a grid of learning rates and weight decays; the best on validation data is
trained again on training and validation data and tested once: `fine_tuning.md` and `.json` in the workdir.
`--mode=train` makes one run.

| arguments | data |
|---|---|
| recipe=demo, the default | generated shapes of 64 px, 4 runs of 60 steps |
| recipe=files | yours, at classification.train, .validation and .test |
| recipe=benchmark | a published set, of classification.benchmark.name, at .root |

Files stand on EfficientNet-Lite0, whose ImageNet weights come as a package (requirements.txt); any other
backbone goes by --config.backbone.name and --config.backbone.weights. Short names: :files, :benchmark.
"""

import ml_collections

from frozen_vision import config as config_lib
from frozen_vision.tasks.classification_options import ClassificationConfig

ARGUMENTS = {"recipe": ("demo", "files", "benchmark")}
VARIANTS = {"": "recipe=demo", "files": "recipe=files", "benchmark": "recipe=benchmark"}


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
  chosen = config_lib.parse_arguments(arguments, ARGUMENTS, "configs/fine_tuning.py", VARIANTS)
  config = config_lib.config_dict(ClassificationConfig())
  config.trainable = (".*",)
  config.pictures = 0
  # finetune.py of github.com/linusericsson/ssl-transfer.
  config.steps = 5000
  config.batch_size = 64
  config.eval_batch_size = 64
  config.optimizer.update(
    dict(
      name="sgd",
      nesterov=True,
      momentum=0.9,
      l2=True,
      schedule="cosine",
      learning_rate=1e-2,
      weight_decay=0.0,
    )
  )
  config.classification.update(
    dict(
      image_size=224, rand_augment=dict(num_ops=0), erasing=0.0, mixup=0.0, cutmix=0.0, label_smoothing=0.0
    )
  )
  # One checkpoint at a time is what an interrupted run needs.
  config.keep_checkpoints = 1
  recipe = chosen.get("recipe", "demo")
  if recipe == "demo":
    _demo(config)
  else:
    config.backbone.update(dict(name="efficientnet_lite0", weights="efficientnet_lite0"))
    config.classification.data = recipe
  return config


def _demo(config: ml_collections.ConfigDict) -> None:
  config.headline = (
    "DEMO on generated shapes with the shipped swinv2_nano. Your own images: "
    "--config=configs/fine_tuning.py:files."
  )
  config.steps = 60
  config.log_every = 20
  config.classification.update(dict(data="shapes", image_size=64, crop_scale=(0.7, 1.0)))
  config.classification.shapes.update(dict(train_images=300, validation_images=90, test_images=90))
  config.classification.fine_tuning.update(dict(learning_rates=(1e-1, 1e-2), weight_decays=(0.0, 1e-4)))
