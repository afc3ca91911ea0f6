"""Detection and instance segmentation with HTC on a frozen backbone.

  python -m frozen_vision.main --config=configs/coco_htc.py --workdir=/tmp/demo

| arguments | data | minutes on two CPU cores (AMD EPYC) | result |
|---|---|---|---|
| recipe=demo, the default | generated scenes | 4.3 to 5.1 | mask AP 0.375 to 0.399, mean 0.387, of 3 seeds |
| recipe=photos | 34 built-in photographs, 16 others to validate | 11.1 | box AP50 0.041, of 80 classes |
| recipe=overfit | eight built-in photographs, overfitted | 7.1 | mask AP50 0.898 on the same |
| recipe=files | your own COCO JSON and images | | |
| backbone=swinv2_t, _b, _l, _g | COCO below config.detection.root | | not run: a recipe at full scale |
| backbone=dinov2_vitg14, dinov3_vitl16, dinov3_vith16plus, dinov3_vit7b16 | the same | | likewise not run |

`configs/coco_htc.py:recipe=photos` is how they are given, commas between several; experiments/README.md has
the runs. A full recipe reads backbone weights at config.backbone.weights; those of a plain vision transformer
are fetched by name. Its pyramid is made by neck=simple_pyramid, or with neck=vit_adapter by DINOv3's adapter,
which also trains convolutions on the image. recipe=files trains a small head
on any COCO JSON and the folder of its images, of which a fifth is held out for validation unless
detection.validation.annotations and .images are given too:

  python -m frozen_vision.main --config=configs/coco_htc.py:recipe=files --workdir=MINE \
    --config.detection.train.annotations=FILE.json --config.detection.train.images=FOLDER

The largest backbone learns to detect on Objects365 first, without a mask branch, stage=objects365, which
needs a COCO JSON and a folder of images of each split (config.detection.train.annotations, .images, and
.validation); its batch, steps and rate are the paper's for G. COCO then starts from that run's neck and
head:

  PYTHONPATH=. python experiments/export_head.py --workdir=O365 --out=o365.safetensors \
    --config=configs/coco_htc.py:backbone=swinv2_g,stage=objects365
  python -m frozen_vision.main --config=configs/coco_htc.py:backbone=swinv2_g --workdir=COCO \
    --config.detection.init.path=o365.safetensors

With train=all, both stages are as the paper ran them, all weights training (between the two,
experiments/export_backbone.py too). Short names: :photos, :overfit, :files, :swinv2_t, :swinv2_b, :swinv2_l,
:swinv2_g, :objects365_swinv2_g, :swinv2_g_finetune, :objects365_swinv2_g_finetune, :dinov2_vitg14,
:dinov3_vitl16, :dinov3_vith16plus, :dinov3_vit7b16. Multi-scale testing, at
the scales of ViT-Adapter's HTC++ (the paper's are not known), of a finished run:

  python -m frozen_vision.main --config=configs/coco_htc.py:backbone=swinv2_g --workdir=COCO --mode=evaluate \
    --config.detection.test.short_sides="(600,800,1000,1200,1400,1600)" --config.detection.test.flip=True \
    --config.detection.test.frames="((1152,1152),(1536,1536),(1920,1920),(2304,2304),(2688,2688),(3008,3008))"\
    --config.detection.test.sizes="('l','l','ml','sm','sm','sm')" --config.detection.test.max_detections=1000

Tags of the values: [paper] arXiv 2111.09883 (SwinV2), appendix A2, whose detectors are fine-tuned; [mmdet]
mmdet 3.3.0's HTC R50; [swin] the released detection code of Swin; [swin1] arXiv 2103.14030, appendix A2.2;
[lsj] mmdet 3.3.0's common/lsj; [vitdet] detectron2's ViTDet B and L, fine-tuned for 100 epochs; [ours] our
choice: the appendix of the frozen study (2211.02043) with its learning rate, schedule and window sizes for
frozen backbones was not available to us.
"""

import ml_collections

from frozen_vision import config as config_lib
from frozen_vision.necks.build import NECKS
from frozen_vision.tasks.detection_options import DetectionConfig

# The heads whose options are set here; RetinaNet keeps its own defaults.
_HEADS = ("htc", "cascade_mask_rcnn", "mask_rcnn")
_SIZES = ("swinv2_t", "swinv2_b", "swinv2_l", "swinv2_g")
_PLAIN = ("dinov2_vitg14", "dinov3_vitl16", "dinov3_vith16plus", "dinov3_vit7b16")
ARGUMENTS = {
  "recipe": ("demo", "photos", "overfit", "files"),
  "backbone": _SIZES + _PLAIN,  # the recipe at full scale
  "stage": ("coco", "objects365"),  # of swinv2_*
  "train": ("heads", "all"),  # of swinv2_*
  "neck": ("simple_pyramid", "vit_adapter"),  # of plain vision transformers
}
VARIANTS = {
  "": "recipe=demo",
  "photos": "recipe=photos",
  "overfit": "recipe=overfit",
  "files": "recipe=files",
  **{size: f"backbone={size}" for size in _SIZES + _PLAIN},
  "objects365_swinv2_g": "backbone=swinv2_g,stage=objects365",
  "swinv2_g_finetune": "backbone=swinv2_g,train=all",
  "objects365_swinv2_g_finetune": "backbone=swinv2_g,stage=objects365,train=all",
}
_PYRAMIDS = ("fpn", "bifpn", "simple_pyramid")  # necks with the options of an FPN


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
  chosen = config_lib.parse_arguments(arguments, ARGUMENTS, "configs/coco_htc.py", VARIANTS)
  config = config_lib.config_dict(DetectionConfig())
  backbone = chosen.get("backbone")
  if {"stage", "train"} & set(chosen) and backbone not in _SIZES:
    raise ValueError("configs/coco_htc.py: stage= and train= need a SwinV2, such as backbone=swinv2_b.")
  if "neck" in chosen and backbone not in _PLAIN:
    raise ValueError(
      "configs/coco_htc.py: neck= needs a plain vision transformer, such as backbone=dinov3_vitl16."
    )
  if backbone is None:
    recipes = {"demo": _demo, "photos": _photos, "overfit": _overfit, "files": _files}
    recipes[chosen.get("recipe", "demo")](config)
    return config
  _full(config)
  if backbone in _PLAIN:
    _plain(config, backbone, chosen.get("neck", "simple_pyramid"))
  else:
    _swin(config, backbone)
  if chosen.get("stage") == "objects365":
    _objects365(config)
  if chosen.get("train") == "all":
    _finetune(config)
  return config


def _demo(config: ml_collections.ConfigDict) -> None:
  """All [ours]: sizes that two CPU cores train in minutes."""
  config.headline = (
    "DEMO on generated scenes with the shipped swinv2_nano. Real recipes: "
    "--config=configs/coco_htc.py:swinv2_t, :swinv2_b, :swinv2_l, :swinv2_g and more "
    "(configs/coco_htc.py says which)."
  )
  config.steps = 500
  config.batch_size = 8
  config.eval_batch_size = 20
  config.ema_decay = 0.99
  config.log_every = 50
  config.eval_every = 250
  config.checkpoint_every = 125
  config.optimizer.update(dict(learning_rate=1e-3, weight_decay=0.05, warmup_steps=50, clip_norm=5.0))
  options = config.detection
  options.data = "scenes"
  options.frame = options.eval_frame = (128, 128)
  options.resize = "fit"
  options.max_objects = 10
  config_lib.set_for(options.neck, NECKS, channels=64)
  _small_head(options)


def _small_head(options: ml_collections.ConfigDict) -> None:
  """[ours]: HTC with narrow layers and few rois."""
  config_lib.set_for(
    options.head,
    _HEADS,
    anchor_scales=(4.0,),
    rpn_channels=64,
    train_pre_nms=200,
    train_proposals=100,
    test_pre_nms=200,
    test_proposals=100,
    roi_samples=32,
    finest_scale=28.0,
    fc_channels=256,
    mask_channels=32,
    mask_convs=2,
    mask_roi_size=10,
    max_detections=50,
    score_threshold=0.001,
  )


def _photos(config: ml_collections.ConfigDict) -> None:
  """All [ours]: as `_files`; too few photographs for a score to compare with others'."""
  _files(config)
  config.headline = (
    "34 built-in photographs, evaluated on 16 others, with an ImageNet-pretrained EfficientNet-Lite0."
  )
  config.detection.data = "photos"
  config.detection.frame = config.detection.eval_frame = (320, 320)


# The photographs of :overfit, by COCO image id: those of the built-in sample with up to nine objects of mixed
# size.
_EIGHT = (352257, 358083, 458756, 491525, 165518, 214753, 377575, 519208)


def _overfit(config: ml_collections.ConfigDict) -> None:
  """All [ours]: the head alone overfits eight photographs, without augmentation."""
  config.headline = (
    "Eight built-in photographs at 512 px, trained on and evaluated on: can the head alone overfit them?"
  )
  config.steps = 600
  config.batch_size = 2
  config.eval_batch_size = 2
  config.log_every = 50
  config.checkpoint_every = 200
  config.optimizer.update(dict(learning_rate=1e-3, warmup_steps=100, clip_norm=5.0, weight_decay=0.0))
  options = config.detection
  options.data = "photos"
  options.train_image_ids = options.validation_image_ids = _EIGHT
  options.frame = options.eval_frame = (512, 512)
  options.resize = "fit"
  options.flip = 0.0
  options.max_objects = 10
  config_lib.set_for(options.neck, NECKS, channels=64)
  _small_head(options)
  config_lib.set_for(options.head, _HEADS, anchor_scales=(8.0,), roi_samples=64, finest_scale=56.0)


def _files(config: ml_collections.ConfigDict) -> None:
  """All [ours]: a first run on one's own photographs, at a size that a laptop trains; not tuned."""
  config.headline = (
    "Your own data with an ImageNet-pretrained EfficientNet-Lite0 and a small head; for a large backbone "
    "take :swinv2_b with --config.detection.data=files."
  )
  config.backbone.update(dict(name="efficientnet_lite0", weights="efficientnet_lite0"))
  config.steps = 1000
  config.batch_size = config.eval_batch_size = 4
  config.ema_decay = 0.99
  config.log_every = 50
  config.eval_every = config.checkpoint_every = 250
  config.optimizer.update(dict(learning_rate=1e-3, weight_decay=0.05, warmup_steps=100, clip_norm=5.0))
  options = config.detection
  options.data = "files"
  options.validation_fraction = 0.2
  options.frame = options.eval_frame = (384, 384)
  options.scale_range = (0.5, 2.0)
  config_lib.set_for(options.neck, NECKS, channels=64)
  _small_head(options)
  config_lib.set_for(
    options.head, _HEADS, anchor_scales=(8.0,), roi_samples=64, finest_scale=56.0, max_detections=100
  )


def _full(config: ml_collections.ConfigDict) -> None:
  """Values of all recipes at full scale."""
  config.backbone.dtype = config.frozen_dtype = "bfloat16"
  config.batch_size = 64  # [paper] for B and L, [vitdet]
  config.steps = 118_287 * 36 // 64  # 3x: 36 epochs of train2017 [paper]
  config.optimizer.update(dict(name="adamw", schedule="steps"))  # [mmdet], [vitdet]
  config.eval_every = config.checkpoint_every = 5000  # [ours]
  config.loader.workers = 8  # [ours]
  options = config.detection
  options.head.name = "htc"  # [paper] says HTC++, a third-party table of the frozen study HTC
  options.resize = "lsj"
  options.scale_range = (0.1, 2.0)  # [paper], [vitdet]
  options.flip = 0.5  # [lsj]
  options.head_dtype = "bfloat16"  # [ours]
  # The head's other values are [mmdet]'s, except sampling_ratio: RoIAlign takes Detectron's two points per
  # bin and axis, where mmdet adapts their number.


def _swin(config: ml_collections.ConfigDict, name: str) -> None:
  """The frozen recipe of a SwinV2."""
  config.backbone.update(dict(name=name, weights=f"weights/{name}.safetensors"))
  # Window 32 on 1536-pixel crops, positions normalised by the windows of the pretraining [paper]: those that
  # the weights or the backbone's row say.
  config.backbone.overrides = dict(window_sizes=(32, 32, 32, 32))
  rate = 4e-4  # [paper], of the fine-tuned B and L at batch 64
  if name == "swinv2_g":
    config.batch_size, config.steps, rate = 96, 45_000, 6e-4  # [paper], of the fine-tuned G
  # Decay [paper], warm-up [mmdet].
  config.optimizer.update(dict(learning_rate=rate, weight_decay=0.05, warmup_steps=500))
  _decay(config)
  options = config.detection
  options.neck.name = "fpn"
  # [mmdet]; [swin]: a norm on every level of the backbone
  config_lib.set_for(options.neck, _PYRAMIDS, channels=256, levels=5, input_norm=True)
  options.frame = (1536, 1536)  # [paper]
  options.eval_frame = (1536, 1536)  # [ours]; the paper tests at a short side of 1100 without a long side
  options.eval_short_side = 1100  # [paper]
  # [paper] says soft-NMS; its kind is mmcv's default.
  config_lib.set_for(options.head, _HEADS, nms_kind="soft_linear")
  # Not taken from a head trained on Objects365, which has no masks [paper] and other classes.
  options.init.keep = ("head/mask_heads/.*", "head/box_heads/.*/classes/.*")


def _plain(config: ml_collections.ConfigDict, name: str, neck: str) -> None:
  """The frozen recipe of a plain vision transformer; nobody has published one."""
  # A stride of 16 resizes images by 14/16 for patches of 14, and changes nothing for patches of 16 [ours].
  config.backbone.update(dict(name=name, weights=name, overrides=dict(stride=16)))
  config.optimizer.update(dict(learning_rate=1e-4, weight_decay=0.1, warmup_steps=250))  # [vitdet]
  # x 0.1 at 163,889 and 177,546 of 184,375 steps [vitdet].
  config.optimizer.decay_at = (config.steps * 8 // 9, config.steps * 26 // 27)
  options = config.detection
  options.neck.name = neck  # with the defaults of its source, ViTDet or DINOv3
  options.frame = options.eval_frame = (1024, 1024)  # [vitdet]


def _decay(config: ml_collections.ConfigDict) -> None:
  """x 0.1 at 27/36 and 33/36 of the schedule [swin]."""
  config.optimizer.decay_at = (config.steps * 27 // 36, config.steps * 33 // 36)


def _objects365(config: ml_collections.ConfigDict) -> None:
  """The stage before COCO, of G; [paper] where nothing else is said."""
  config.steps = 67_500
  config.batch_size = 96
  config.optimizer.learning_rate = 1.2e-3
  _decay(config)
  options = config.detection
  options.data = "files"
  config_lib.set_for(options.head, _HEADS, with_masks=False)
  options.init.keep = ()
  # The paper prints an input of [800, 1024], and not which sides these are; here, in mmdet's manner, the
  # short side is 800 unless the long one would exceed 1024 [ours].
  options.resize = "short_side"
  options.short_side = (800, 800)
  options.long_side = 1024
  options.frame = options.eval_frame = (1024, 1024)
  options.eval_short_side = 800  # [ours]
  options.max_objects = 200  # [ours]: Objects365 has more objects in an image than COCO


def _finetune(config: ml_collections.ConfigDict) -> None:
  """All weights train, as the paper ran it. Learning rate, decay, batch, steps and input of `_full` are its
  own."""
  config.trainable = (".*",)
  # [ours]: not stated for G. The paper has 0.1 times the rate for the backbones B and L, and names none for
  # G.
  config.optimizer.layer_decay = 1.0
  config.backbone.overrides.drop_path_rate = 0.4  # [paper] on ADE20K; not stated for COCO
  # HTC++ has one more global attention layer [swin1]; heads of 32 channels, as in the backbone [ours].
  config_lib.set_for(config.detection.neck, _PYRAMIDS, attention_heads=128)
