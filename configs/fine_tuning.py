"""Fine-tuning of a whole classifier: by a grid, or by the recipes of published models.

The grid is that of "How Well Do Self-Supervised Models Transfer?" (arXiv 2011.13377):

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

Recipes of one run on ImageNet-1K, by --mode=train; none has been run:

| arguments | backbone | source of the values |
|---|---|---|
| recipe=fd_clip_vitb16_100, fd_clip_vitb16 | ViT-B/16 distilled from CLIP, 100 and 300 epochs | [fd] |
| recipe=fd_clip_vitl14, fd_deit_vitb16, fd_dino_vitb16 | ViTs distilled from those | [fd] |
| recipe=fd_esvit_swinb | SwinV2-B distilled from EsViT | [fd] |
| recipe=simmim_swinv2_b | SwinV2-B pretrained by SimMIM | [simmim], the rest [fd] |
| recipe=swinv2_b_22k, swinv2_l_22k | SwinV2 pretrained on ImageNet-22K, at 256 px | [swinv2] |

[fd]: configs/finetune of SwinTransformer/Feature-Distillation, for a total batch of 2,048 (1,024 for EsViT's,
which its authors call an accident): epochs, warm-up, stochastic depth, learning rate, layer decay, weight
decay 0.05, clipping at 5, RandAugment 9 with deviation 0.5, random erasing 0.25, mixup 0.8, cutmix 1, label
smoothing 0.1. [simmim]: microsoft/Swin-Transformer, 100 epochs, layer decay 0.75, stochastic depth 0.1.
[swinv2]: arXiv 2111.09883, appendix A2.1: 30 epochs, batch 1,024, learning rate 4e-5, weight decay 1e-8; the
rest [ours].

Differences from [fd]: a ViT is read by its class token, not by the mean of its patches under a new norm; its
blocks go on sharing one table of positions, where the released code gives each a copy; the classifier's first
weights are not divided by 1,000; and warm-up begins at 0.
"""

import ml_collections

from frozen_vision import config as config_lib
from frozen_vision.tasks.classification_options import ClassificationConfig

_DISTILLED = {  # [fd]: (backbone, epochs, warm-up, stochastic depth, learning rate, layer decay)
  "fd_clip_vitb16_100": ("fd_vitb16", 100, 20, 0.1, 5e-3, 0.65),
  "fd_clip_vitb16": ("fd_vitb16", 100, 20, 0.3, 5e-3, 0.60),
  "fd_clip_vitl14": ("fd_vitl14", 50, 5, 0.4, 1e-3, 0.75),
  "fd_deit_vitb16": ("fd_vitb16", 100, 20, 0.3, 5e-3, 0.65),
  "fd_dino_vitb16": ("fd_vitb16", 100, 20, 0.2, 6e-3, 0.60),
  "fd_esvit_swinb": ("swinv2_b", 100, 20, 0.4, 2.5e-3, 0.80),
  "simmim_swinv2_b": ("swinv2_b", 100, 20, 0.1, 5e-3, 0.75),  # [simmim]; warm-up and learning rate are [fd]'s
}
_FROM_22K = {"swinv2_b_22k": "swinv2_b", "swinv2_l_22k": "swinv2_l"}
ARGUMENTS = {"recipe": ("demo", "files", "benchmark", *_DISTILLED, *_FROM_22K)}
VARIANTS = {"": "recipe=demo"} | {name: f"recipe={name}" for name in ARGUMENTS["recipe"][1:]}

_IMAGENET = 1_281_167


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
  chosen = config_lib.parse_arguments(arguments, ARGUMENTS, "configs/fine_tuning.py", VARIANTS)
  config = config_lib.config_dict(ClassificationConfig())
  config.trainable = (".*",)
  config.pictures = 0
  recipe = chosen.get("recipe", "demo")
  if recipe in _DISTILLED or recipe in _FROM_22K:
    (_distilled if recipe in _DISTILLED else _from_22k)(config, recipe)
    return config
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


def _distilled(config: ml_collections.ConfigDict, recipe: str) -> None:
  """[fd], on images of 224 px; the options of the task have its augmentation as their defaults."""
  name, epochs, warmup, drop_path, rate, decay = _DISTILLED[recipe]
  batch = 1024 if recipe == "fd_esvit_swinb" else 2048
  config.backbone.update(dict(name=name, weights=f"weights/{recipe}.pth"))
  config.backbone.overrides = dict(drop_path_rate=drop_path)
  if name.startswith("swinv2"):
    # Positions go on being normalised by the windows of the pretraining, of 192 px for SimMIM's.
    pretrained = (12, 12, 12, 6) if recipe.startswith("simmim") else (14, 14, 14, 7)
    config.backbone.overrides.update(dict(window_sizes=(14, 14, 14, 7), pretrained_window_sizes=pretrained))
  _on_imagenet(config, epochs, warmup, batch)
  least = 2e-6 if recipe == "fd_clip_vitl14" else 2.5e-7 * batch / 512
  config.optimizer.update(
    dict(learning_rate=rate, final_fraction=least / rate, layer_decay=decay, weight_decay=0.05, clip_norm=5.0)
  )
  config.classification.image_size = 224


def _from_22k(config: ml_collections.ConfigDict, recipe: str) -> None:
  """[swinv2]: 256 px in windows of 16, after 192 px in windows of 12."""
  name = _FROM_22K[recipe]
  size = {"swinv2_b": "base", "swinv2_l": "large"}[name]
  config.backbone.update(dict(name=name, weights=f"swinv2_{size}_window12_192_22k"))
  config.backbone.overrides = dict(
    window_sizes=(16, 16, 16, 8), pretrained_window_sizes=(12, 12, 12, 6), drop_path_rate=0.2
  )
  _on_imagenet(config, 30, 5, 1024)
  config.optimizer.update(dict(learning_rate=4e-5, weight_decay=1e-8, clip_norm=5.0))
  config.classification.image_size = 256


def _on_imagenet(config: ml_collections.ConfigDict, epochs: int, warmup: int, batch: int) -> None:
  epoch = _IMAGENET // batch  # the last, smaller batch is dropped
  config.update(dict(steps=epochs * epoch, batch_size=batch, eval_batch_size=256, log_every=100))
  config.update(dict(eval_every=5 * epoch, checkpoint_every=epoch))
  config.optimizer.update(dict(name="adamw", schedule="cosine", warmup_steps=warmup * epoch))
  config.classification.update(dict(train="imagenet/train", validation="imagenet/val"))
