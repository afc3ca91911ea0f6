"""Detection and instance segmentation with HTC on a frozen SwinV2.

  python -m frozen_vision.main --config=configs/coco_htc.py --workdir=/tmp/demo

is the demo: generated scenes and the backbone that ships with the package; minutes on two CPU cores. The real
recipes are the variants :swinv2_t, :swinv2_b, :swinv2_l and :swinv2_g, which need COCO below
config.detection.root and backbone weights at config.backbone.weights. :photos overfits the built-in photographs.

Tags of the values: [paper] arXiv 2111.09883 (SwinV2), appendix A2; [mmdet] mmdet 3.3.0's HTC R50; [swin] the released
detection code of Swin; [ours] our choice: the appendix of the frozen study (2211.02043) with its learning rate,
schedule and window sizes for frozen backbones was not available to us.
"""

import ml_collections

from frozen_vision import config as config_lib
from frozen_vision.tasks import detection

VARIANTS = ("", "photos", "swinv2_t", "swinv2_b", "swinv2_l", "swinv2_g")


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  if variant not in VARIANTS:
    raise ValueError(
        f"configs/coco_htc.py has no variant {variant!r}; known: "
        + ", ".join(f":{name}" if name else "(none, the demo)" for name in VARIANTS))
  config = config_lib.base_config()
  config.task = "detection"
  config.detection = detection.default_config()
  match variant:
    case "":
      _demo(config)
    case "photos":
      _photos(config)
    case _:
      _full(config, variant)
  return config


def _demo(config: ml_collections.ConfigDict) -> None:
  """All [ours]: sizes that two CPU cores train in minutes."""
  config.headline = (
      "DEMO on generated scenes with the shipped swinv2_nano. Real recipes: --config=configs/coco_htc.py:swinv2_t, "
      ":swinv2_b, :swinv2_l, :swinv2_g.")
  config.steps = 500
  config.batch_size = 8
  config.eval_batch_size = 20
  config.ema_decay = 0.99
  config.log_every = 50
  config.eval_every = 250
  config.checkpoint_every = 125
  config.optimizer.update(dict(
      learning_rate=1e-3, weight_decay=0.05, warmup_steps=50, clip_norm=5.0))
  options = config.detection
  options.data = "scenes"
  options.frame = options.eval_frame = (128, 128)
  options.resize = "fit"
  options.max_objects = 10
  options.neck.update(dict(channels=64))
  _small_head(options)


def _small_head(options: ml_collections.ConfigDict) -> None:
  """[ours]: HTC with narrow layers and few rois."""
  options.head_options = dict(
      anchor_scales=(4.0,), rpn_channels=64, train_pre_nms=200, train_proposals=100, test_pre_nms=200,
      test_proposals=100, roi_samples=32, finest_scale=28.0, fc_channels=256, mask_channels=32,
      mask_convs=2, mask_roi_size=10, max_detections=50)


# The photographs of :photos, by COCO image id: those of the built-in sample with up to nine objects of mixed size.
_PHOTOS = (352257, 358083, 458756, 491525, 165518, 214753, 377575, 519208)


def _photos(config: ml_collections.ConfigDict) -> None:
  """All [ours]: the head alone learns eight photographs by heart, without augmentation."""
  config.headline = (
      "Eight built-in photographs at 512 px, trained on and evaluated on: can the head alone learn them?")
  config.steps = 600
  config.batch_size = 2
  config.eval_batch_size = 2
  config.log_every = 50
  config.checkpoint_every = 200
  config.optimizer.update(dict(learning_rate=1e-3, warmup_steps=100, clip_norm=5.0, weight_decay=0.0))
  options = config.detection
  options.data = "photos"
  options.train_image_ids = options.validation_image_ids = _PHOTOS
  options.frame = options.eval_frame = (512, 512)
  options.resize = "fit"
  options.flip = 0.0
  options.max_objects = 10
  options.neck.update(dict(channels=64))
  _small_head(options)
  options.head_options.update(dict(anchor_scales=(8.0,), roi_samples=64, finest_scale=56.0))


def _full(config: ml_collections.ConfigDict, name: str) -> None:
  """The frozen recipe at full scale."""
  config.backbone.update(dict(name=name, weights=f"weights/{name}.safetensors", dtype="bfloat16"))
  config.frozen_dtype = "bfloat16"
  # Window 32 on 1536-pixel crops, positions normalised by the pretraining's windows (192 px, window 12) [paper].
  # T was never pretrained at 192; its public weights are 256 px with window 16 or 8 [ours].
  pretrained = (16, 16, 16, 8) if name == "swinv2_t" else (12, 12, 12, 6)
  config.backbone.overrides = dict(
      window_sizes=(32, 32, 32, 32), pretrained_window_sizes=pretrained)
  config.batch_size = 64  # [paper] for B and L; 96 for G
  config.steps = 118_287 * 36 // 64  # 3x: 36 epochs of train2017 [paper]
  rate = 4e-4  # [paper], of the fine-tuned B and L at batch 64
  if name == "swinv2_g":
    config.batch_size, config.steps, rate = 96, 45_000, 6e-4  # [paper], of the fine-tuned G
  config.optimizer.update(dict(
      learning_rate=rate, weight_decay=0.05,  # [paper]
      schedule="steps",  # [mmdet]: x 0.1 at 27/36 and 33/36 of the schedule [swin]
      decay_at=(config.steps * 27 // 36, config.steps * 33 // 36),
      warmup_steps=500))  # [mmdet]
  config.eval_every = config.checkpoint_every = 5000  # [ours]
  config.loader.workers = 8  # [ours]
  options = config.detection
  options.frame = (1536, 1536)  # [paper]
  options.scale_range = (0.1, 2.0)  # [paper]
  options.eval_frame = (1536, 1536)  # [ours]; the paper tests at a short side of 1100 without a long side
  options.eval_short_side = 1100  # [paper]
  options.head_dtype = "bfloat16"
  # [paper] says soft-NMS; its kind is mmcv's default. The rest [mmdet].
  options.head_options = dict(nms_kind="soft_linear")
