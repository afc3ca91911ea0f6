"""The smallest configs that run through everything; `--config=tests/tiny.py[:classification]` works too."""

import json
import pathlib
from typing import Any

import ml_collections
import numpy as np
from PIL import Image

from frozen_vision import config as config_lib
from frozen_vision.tasks.action_options import ActionOptions
from frozen_vision.tasks.classification_options import ClassificationOptions
from frozen_vision.tasks.contrastive_options import ContrastiveOptions
from frozen_vision.tasks.dense_regression_options import DenseRegressionOptions
from frozen_vision.tasks.detection_options import DetectionOptions
from frozen_vision.tasks.feature_distillation_options import FeatureDistillationOptions
from frozen_vision.tasks.masked_image_modeling_options import MaskedImageModelingOptions
from frozen_vision.tasks.segmentation_options import SegmentationOptions
from frozen_vision.tasks.self_distillation_options import SelfDistillationOptions

# A SwinV2 of 0.1 M parameters, whose blocks are not the identity.
SMALL_BACKBONE = dict(
  embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), window_sizes=(4, 4, 4, 2), residual_norm_init=1.0
)
# Few rois and narrow layers of an R-CNN head.
SMALL_HEAD = dict(
  rpn_channels=8,
  train_pre_nms=20,
  train_proposals=10,
  test_pre_nms=20,
  test_proposals=10,
  roi_samples=8,
  fc_channels=8,
  mask_channels=8,
  mask_convs=1,
)


def get_config(task: str = "detection") -> ml_collections.ConfigDict:
  configs = {
    "detection": detection,
    "classification": classification,
    "segmentation": segmentation,
    "action": action,
    "feature_distillation": feature_distillation,
    "masked_image_modeling": masked_image_modeling,
    "contrastive": contrastive,
    "dense_regression": dense_regression,
    "self_distillation": self_distillation,
  }
  return configs[task]()


def _base(task: str, **fields: Any) -> ml_collections.ConfigDict:
  """A few steps on batches of two; `fields` differ from that."""
  config = config_lib.base_config()
  backbone(config)
  config.tensorboard = False  # importing TensorFlow takes seconds
  config.pictures = 0
  few = dict(steps=4, batch_size=2, eval_batch_size=2, log_every=1, checkpoint_every=2, ema_decay=0.9)
  config.update(few | dict(task=task) | fields)
  return config


def backbone(config: ml_collections.ConfigDict) -> None:
  """`SMALL_BACKBONE` with random weights."""
  config.backbone.weights = "random"
  config.backbone.overrides = dict(SMALL_BACKBONE)


def small_head(options: ml_collections.ConfigDict) -> None:
  """Mask R-CNN on few rois and narrow layers: it compiles in seconds."""
  options.neck.update(dict(channels=8, levels=4))
  options.head.update(
    name="mask_rcnn", anchor_scales=(4.0,), finest_scale=28.0, max_detections=5, **SMALL_HEAD
  )


def detection() -> ml_collections.ConfigDict:
  """Generated scenes of 64 px."""
  config = _base("detection", steps=40, checkpoint_every=5)
  config.optimizer.warmup_steps = 2
  config.detection = config_lib.config_dict(DetectionOptions())
  options = config.detection
  options.data = "scenes"
  options.scenes.update(dict(train_images=50, validation_images=3, image_size=64))
  options.frame = options.eval_frame = (64, 64)
  options.resize = "fit"
  options.max_objects = 8
  small_head(options)
  return config


def segmentation(head: str = "linear") -> ml_collections.ConfigDict:
  """Generated scenes of 64 px."""
  config = _base("segmentation", trainable=("head/.*",))
  config.segmentation = config_lib.config_dict(SegmentationOptions())
  options = config.segmentation
  options.data = "scenes"
  options.scenes.update(dict(train_images=50, validation_images=3, image_size=64))
  options.frame = options.eval_frame = (64, 64)
  options.short_sides = (48, 64, 80)
  options.head.name = head
  config_lib.set_for(options.head, "upernet", channels=8, auxiliary_channels=8, norm_groups=4)
  config_lib.set_for(
    options.head,
    "mask2former",
    hidden_dim=8,
    mask_dim=8,
    num_queries=8,
    num_points=32,
    num_heads=2,
    encoder_layers=1,
    encoder_ffn_dim=8,
    decoder_layers=1,
    decoder_ffn_dim=8,
    norm_groups=2,
  )
  return config


def dense_regression() -> ml_collections.ConfigDict:
  """Generated rooms of 32 px, normals among 8 codewords and depth in 4 bins."""
  config = _base("dense_regression", trainable=("head/.*",))
  config.dense_regression = config_lib.config_dict(DenseRegressionOptions())
  options = config.dense_regression
  options.rooms.update(dict(train_images=20, validation_images=3, image_size=32))
  options.update(dict(codewords=8, depth_bins=4, frame=(32, 32), eval_frame=(32, 32), short_sides=(32, 40)))
  config_lib.set_for(options.head, "upernet", channels=8, norm_groups=4)
  return config


def action() -> ml_collections.ConfigDict:
  """Generated clips of 4 frames at 32 px."""
  config = _base("action", trainable=("head/.*",))
  config.action = config_lib.config_dict(ActionOptions())
  options = config.action
  options.data = "clips"
  options.clips.update(dict(train_clips=50, validation_clips=7, frames=4))
  options.update(dict(frames=4, stride=1, image_size=32, crop_scale=(), flip=0.0, frames_per_pass=4))
  config_lib.set_for(
    options.head,
    "video_swin",
    levels=(1, 2),
    channels=(8, 8),
    depths=(1, 1),
    head_channels=4,
    window_size=(2, 2, 2),
    drop_path_rate=0.0,
    dropout=0.0,
  )
  config_lib.set_for(options.head, "attentive", levels=(2,), channels=8, num_heads=2)
  config_lib.set_for(options.head, "average", levels=(2,))
  return config


def classification(
  train: pathlib.Path | str = ".",
  validation: pathlib.Path | str = ".",
) -> ml_collections.ConfigDict:
  """An image folder at 16 px, all parameters training, no mixing and no random augmentation."""
  config = _base(
    "classification",
    trainable=(".*",),
    steps=6,
    batch_size=4,
    eval_batch_size=4,
    log_every=2,
    ema_decay=0.0,
  )
  config.classification = config_lib.config_dict(ClassificationOptions())
  config.classification.update(
    dict(
      train=str(train),
      validation=str(validation),
      image_size=16,
      crop_padding=2,
      rand_augment=dict(num_ops=0),
      erasing=0.0,
      mixup=0.0,
      cutmix=0.0,
    )
  )
  return config


def feature_distillation() -> ml_collections.ConfigDict:
  """Generated shapes at 32 px: `SMALL_BACKBONE` from scratch, and a wider one as the teacher."""
  config = _base("feature_distillation", trainable=(".*",), batch_size=4, ema_decay=0.0, pictures=1)
  config.backbone.weights = "init"
  config.backbone.overrides.update(residual_norm_init=1e-5, drop_path_rate=0.2)
  config.feature_distillation = config_lib.config_dict(FeatureDistillationOptions())
  options = config.feature_distillation
  small_images(options)
  options.teacher.weights = "random"
  options.teacher.overrides = dict(SMALL_BACKBONE, embed_dim=16)
  return config


def masked_image_modeling() -> ml_collections.ConfigDict:
  """Generated shapes at 32 px, masked in patches of 8."""
  config = _base("masked_image_modeling", trainable=(".*",), batch_size=4, ema_decay=0.0, pictures=1)
  config.backbone.weights = "init"
  config.masked_image_modeling = config_lib.config_dict(MaskedImageModelingOptions())
  small_images(config.masked_image_modeling)
  config.masked_image_modeling.update(dict(mask_patch=8, target_window=7))
  return config


def contrastive() -> ml_collections.ConfigDict:
  """Two views of generated shapes at 32 px."""
  config = _base("contrastive", trainable=(".*",), batch_size=4, ema_decay=0.0, pictures=1)
  config.contrastive = config_lib.config_dict(ContrastiveOptions())
  small_images(config.contrastive)
  config.contrastive.update(dict(hidden=8, channels=4))
  return config


def self_distillation() -> ml_collections.ConfigDict:
  """Two crops of generated shapes at 32 px and two of 16 px."""
  config = _base("self_distillation", trainable=(".*",), batch_size=4, pictures=1)
  config.backbone.weights = "init"
  config.optimizer.update(dict(delayed=("head/prototypes/.*",), delay_steps=2, final_weight_decay=0.4))
  config.self_distillation = config_lib.config_dict(SelfDistillationOptions())
  small_images(config.self_distillation)
  config.self_distillation.shapes.validation_images = 8
  config.self_distillation.update(dict(local_crops=2, local_size=16, hidden=8, bottleneck=4, prototypes=8))
  return config


def small_images(options: ml_collections.ConfigDict) -> None:
  """Few generated shapes of 32 px in the section of a task that trains on images alone."""
  options.update(dict(data="shapes", image_size=32, crop_scale=(0.5, 1.0)))
  options.shapes.update(dict(train_images=20, validation_images=3, image_size=32))


def image_folder(root: pathlib.Path, *, classes: int = 3, images: int = 4, side: int = 16) -> pathlib.Path:
  """CLASS/IMAGE.png of noise around a colour of the class."""
  rng = np.random.default_rng(0)
  for label in range(classes):
    folder = root / f"class{label}"
    folder.mkdir(parents=True)
    colour = rng.integers(40, 216, 3)
    for index in range(images):
      pixels = colour + rng.integers(-40, 40, (side, side, 3))
      Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
  return root


def metrics(workdir: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
  """{key: [(step, value), ...]} of a run's `metrics.jsonl`."""
  series: dict[str, list[tuple[int, float]]] = {}
  for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines():
    row = json.loads(line)
    for key in set(row) - {"step", "time"}:
      series.setdefault(key, []).append((row["step"], row[key]))
  return series
