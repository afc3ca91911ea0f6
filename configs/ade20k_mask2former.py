"""Semantic segmentation with Mask2Former and other heads on a frozen backbone.

  python -m frozen_vision.main --config=configs/ade20k_mask2former.py --workdir=/tmp/segmentation

| arguments | data | minutes on two CPU cores (AMD EPYC) | result |
|---|---|---|---|
| recipe=demo, the default | generated scenes | 4.0 to 6.7 | mIoU 0.681 to 0.701 of 3 seeds |
| recipe=camvid | 184 road scenes below config.segmentation.root | 10.8, 12.1 | mIoU 0.595, 0.589 of 2 seeds |
| recipe=camvid,head=upernet | the same | 7.7, 8.0 | mIoU 0.390, 0.389 |
| recipe=camvid,head=linear | the same | 2.6, 2.3 | mIoU 0.383, 0.376 |
| recipe=files | yours: config.segmentation.classes, .train.images, .train.labels, .validation likewise | | |
| backbone=swinv2_t, _b, _l, _g | ADE20K below config.segmentation.root | | not run: a recipe at full scale |
| backbone=dinov2_vitg14, dinov3_vitl16, dinov3_vith16plus, dinov3_vit7b16 | the same | | likewise not run |

`configs/ade20k_mask2former.py:recipe=camvid,head=linear` is how they are given; the CamVid runs shared
their cores with other jobs (experiments/README.md has them). A full recipe reads backbone weights at
config.backbone.weights; those of a plain vision transformer are fetched by name. Short names: :camvid,
:files, :swinv2_t, :swinv2_b, :swinv2_l, :swinv2_g, :dinov2_vitg14, :dinov3_vitl16, :dinov3_vith16plus,
:dinov3_vit7b16.

head=upernet or linear puts another head on the same features; the rates and schedules here are
Mask2Former's. On a plain vision transformer Mask2Former and UPerNet stand on DINOv3's adapter, which trains
with them (neck=simple_pyramid takes the simple feature pyramid instead), the linear head on its maps, and
head=plain_mask is PMT's decoder with its schedule.

training=everything, beside backbone= of a SwinV2 and head=upernet, is [paper]'s fine-tuning, backbone
included. T: 512 px, 4e-5, 160,000 steps of 16, 1,500 of warm-up, layer decay 0.95, stochastic depth 0.3. B
and L: 640 px, 6e-5, 40,000 steps of 64, 375 of warm-up, 0.3. G: 4e-5, 80,000 steps of 32, 750 of warm-up,
0.4. Not run.

Tags of the values: [m2f] Mask2Former's released ADE20K configs, Swin-L at 640 px and R50 at 512 px, with
all of the backbone trained; [paper] arXiv 2111.09883 (SwinV2), appendix A1 and A2, UPerNet on ADE20K,
likewise; [mmseg] mmsegmentation's UPerNet on ADE20K; [pmt] tue-mps/pmt's recipe for ADE20K, a frozen DINOv3-L
at 512 px; [dinov3] DINOv3's released evaluation code; [ours] our choice: the appendix of the frozen study
(2211.02043) with its learning rate, schedule and window sizes for frozen backbones was not available to us.
"""

import ml_collections

from frozen_vision import config as config_lib
from frozen_vision.tasks.segmentation_options import HEADS, SegmentationConfig

_SIZES = ("swinv2_t", "swinv2_b", "swinv2_l", "swinv2_g")
_PLAIN = ("dinov2_vitg14", "dinov3_vitl16", "dinov3_vith16plus", "dinov3_vit7b16")
ARGUMENTS = {
  "recipe": ("demo", "camvid", "files"),
  "backbone": _SIZES + _PLAIN,  # the recipe at full scale
  "head": tuple(HEADS),  # plain_mask is for plain vision transformers
  "neck": ("vit_adapter", "simple_pyramid"),  # of plain vision transformers
  "training": ("everything",),  # fine-tuning of a SwinV2 with UPerNet
}
VARIANTS = {
  "": "recipe=demo",
  "camvid": "recipe=camvid",
  "files": "recipe=files",
  **{size: f"backbone={size}" for size in _SIZES + _PLAIN},
}


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
  chosen = config_lib.parse_arguments(arguments, ARGUMENTS, "configs/ade20k_mask2former.py", VARIANTS)
  config = config_lib.config_dict(SegmentationConfig())
  config.trainable = ("head/.*",)
  head = config.segmentation.head.name = chosen.get("head", "mask2former")
  backbone = chosen.get("backbone")
  if backbone not in _PLAIN and ("neck" in chosen or head == "plain_mask"):
    raise ValueError(
      "configs/ade20k_mask2former.py: neck= and head=plain_mask need a plain vision transformer, such as "
      "backbone=dinov3_vitl16."
    )
  if "training" in chosen:
    if backbone not in _SIZES or head != "upernet":
      raise ValueError(
        "configs/ade20k_mask2former.py: training=everything is a recipe of UPerNet on a SwinV2; expected "
        f"backbone= one of {', '.join(_SIZES)} and head=upernet beside it."
      )
    _swin(config, backbone)
    _fine_tuned(config, backbone)
  elif backbone is None:
    {"demo": _demo, "camvid": _camvid, "files": _files}[chosen.get("recipe", "demo")](config)
  elif backbone in _PLAIN:
    _plain(config, backbone, chosen.get("neck"))
  else:
    _swin(config, backbone)
  return config


def _demo(config: ml_collections.ConfigDict) -> None:
  """All [ours]: sizes that two CPU cores train in minutes."""
  config.headline = (
    "DEMO on generated scenes with the shipped swinv2_nano. Real recipes: "
    "--config=configs/ade20k_mask2former.py:swinv2_t, :swinv2_b, :swinv2_l, :swinv2_g."
  )
  config.steps = 1500
  config.batch_size = 8
  config.eval_batch_size = 20
  config.ema_decay = 0.99
  config.log_every = 50
  config.eval_every = 750
  config.checkpoint_every = 250
  config.optimizer.update(
    dict(name="muon", learning_rate=3e-3, weight_decay=0.05, warmup_steps=50, clip_norm=1.0)
  )
  options = config.segmentation
  options.data = "scenes"
  options.frame = options.eval_frame = (128, 128)
  options.short_sides = (128,)
  options.long_side = 128
  options.category_max_area = 1.0
  options.colour_jitter = False
  options.max_segments = 7
  _small_heads(options, queries=12, points=192)
  # Here the class of a shape is harder to learn than its place. With the source's 2.0, queries find shapes
  # and mix up their classes for a thousand steps; like this, each keeps to a class from the start.
  config_lib.set_for(options.head, "mask2former", num_heads=8, class_weight=6.0)


def _camvid(config: ml_collections.ConfigDict) -> None:
  """All [ours]: real road scenes of 480 x 360 px at their own size."""
  config.headline = "CamVid: 184 road scenes, 11 classes, with the shipped swinv2_nano frozen."
  config.steps = 1000
  config.batch_size = 4
  config.eval_batch_size = 3
  config.ema_decay = 0.99
  config.log_every = 50
  config.eval_every = 500
  config.checkpoint_every = 250
  config.optimizer.update(
    dict(name="muon", learning_rate=3e-3, weight_decay=0.05, warmup_steps=50, clip_norm=1.0)
  )
  options = config.segmentation
  options.data = "files"
  options.root = "data/camvid"
  options.classes = "meta.json"
  options.train.update(dict(images="train/images", labels="train/labels"))
  options.validation.update(dict(images="val/images", labels="val/labels"))
  options.frame = (256, 256)
  options.short_sides = tuple(range(256, 545, 32))
  options.long_side = 1024
  options.eval_frame = (384, 480)
  options.eval_short_side = 360
  options.max_segments = 11
  _small_heads(options, queries=20, points=2048)


def _files(config: ml_collections.ConfigDict) -> None:
  """All [ours]: a first run on one's own label images, at a size that a laptop trains; not tuned."""
  config.headline = "Your own label images with an ImageNet-pretrained EfficientNet-Lite0 and small heads."
  config.backbone.update(dict(name="efficientnet_lite0", weights="efficientnet_lite0"))
  config.steps = 1000
  config.batch_size = config.eval_batch_size = 4
  config.ema_decay = 0.99
  config.log_every = 50
  config.eval_every = config.checkpoint_every = 250
  config.optimizer.update(
    dict(name="muon", learning_rate=3e-3, weight_decay=0.05, warmup_steps=50, clip_norm=1.0)
  )
  options = config.segmentation
  options.data = "files"
  options.frame = (320, 320)
  options.short_sides = tuple(range(256, 577, 32))
  options.long_side = 1280
  options.eval_frame = (512, 512)
  options.eval_short_side = 320
  options.max_segments = 20
  _small_heads(options, queries=30, points=2048)


def _small_heads(options: ml_collections.ConfigDict, *, queries: int, points: int) -> None:
  """[ours]: every head with narrow layers, whichever is chosen."""
  config_lib.set_for(
    options.head,
    "mask2former",
    hidden_dim=64,
    mask_dim=64,
    num_queries=queries,
    num_points=points,
    num_heads=4,
    encoder_layers=2,
    encoder_ffn_dim=128,
    decoder_layers=3,
    decoder_ffn_dim=256,
    norm_groups=8,
  )
  config_lib.set_for(options.head, "upernet", channels=64, auxiliary_channels=32, norm_groups=8)


def _full(config: ml_collections.ConfigDict, crop: int) -> None:
  """Values of all recipes at full scale: Mask2Former's, on square crops of `crop` pixels."""
  config.backbone.dtype = config.frozen_dtype = "bfloat16"
  options = config.segmentation
  options.frame = (crop, crop)
  options.colour_jitter = True  # [m2f]
  # [ours]: room for ratios up to 1.6, in both orientations; wider images become smaller.
  options.eval_frame = (-(-8 * crop // 320) * 64,) * 2
  options.eval_short_side = crop  # [m2f]
  options.eval_long_side = 4 * crop  # [m2f]
  # Multi-scale testing is --config.segmentation.test.flip=True with
  # --config.segmentation.test.scales='(0.5,0.75,1.0,1.25,1.5,1.75)' [m2f].
  options.short_sides = tuple(int(0.1 * k * crop) for k in range(5, 21))  # [m2f], as mmseg's ratios 0.5 to 2
  options.long_side = 4 * crop  # [m2f]
  options.head_dtype = "bfloat16"
  config.eval_batch_size = 4  # [ours]
  config.eval_every = config.checkpoint_every = 5000  # [m2f]
  config.loader.workers = 8  # [ours]
  options.category_max_area = 1.0  # [m2f]
  config.batch_size, config.steps = 16, 160_000  # [m2f]
  # 100 queries, 10 predictions, 12,544 points are the head's defaults [m2f].
  config.optimizer.update(
    dict(
      learning_rate=1e-4,
      weight_decay=0.05,
      clip_norm=0.01,  # [m2f]
      schedule="linear",
    )
  )  # [ours]: [m2f] decays polynomially


def _swin(config: ml_collections.ConfigDict, name: str) -> None:
  """The frozen recipe of a SwinV2."""
  # Window 40 on 640-pixel crops, positions normalised by the windows of the pretraining [paper]: those that
  # the weights or the backbone's row say. T's window on ADE20K is 16 at 512 px [paper, A1].
  crop, window = (512, 16) if name == "swinv2_t" else (640, 40)
  _full(config, crop)
  overrides = dict(window_sizes=(window,) * 4)
  config.backbone.update(dict(name=name, weights=f"weights/{name}.safetensors", overrides=overrides))


# [paper], A1 of T, A2 of the others: learning rate, batch, steps, warm-up, stochastic depth, layer decay.
_TUNED = {
  "swinv2_t": (4e-5, 16, 160_000, 1500, 0.3, 0.95),
  "swinv2_b": (6e-5, 64, 40_000, 375, 0.3, 1.0),
  "swinv2_l": (6e-5, 64, 40_000, 375, 0.3, 1.0),
  "swinv2_g": (4e-5, 32, 80_000, 750, 0.4, 1.0),
}


def _fine_tuned(config: ml_collections.ConfigDict, name: str) -> None:
  """[paper]: UPerNet with all of a SwinV2 training; AdamW, weight decay 0.05, linear decay, no clipping."""
  rate, batch, steps, warmup, drop_path, layer_decay = _TUNED[name]
  config.trainable = (".*",)
  config.backbone.overrides.drop_path_rate = drop_path
  config.batch_size, config.steps = batch, steps
  config.optimizer.update(
    dict(
      learning_rate=rate,
      warmup_steps=warmup,
      weight_decay=0.05,
      clip_norm=0.0,
      schedule="linear",
      layer_decay=layer_decay,
    )
  )
  config.segmentation.category_max_area = 0.75  # [mmseg]


def _plain(config: ml_collections.ConfigDict, name: str, neck: str | None) -> None:
  """The frozen recipe of a plain vision transformer."""
  options = config.segmentation
  head = options.head.name
  # [dinov3]: 896 px for Mask2Former on the 7B; [pmt] and [dinov3]'s linear head: 512.
  _full(config, 896 if head in ("mask2former", "upernet") else 512)
  # A stride of 16 resizes images by 14/16 for patches of 14, and changes nothing for patches of 16 [ours].
  config.backbone.update(dict(name=name, weights=name, overrides=dict(stride=16)))
  options.neck.name = neck or ("vit_adapter" if head in ("mask2former", "upernet") else "none")
  if options.neck.name != "none":
    config.trainable = ("neck/.*", "head/.*")
  if name == "dinov3_vit7b16":
    # [dinov3], whose encoder of pixels also has stride 4 among its levels.
    wide = dict(hidden_dim=2048, mask_dim=2048, num_heads=16, encoder_ffn_dim=4096)
    config_lib.set_for(options.head, "mask2former", **wide)
  if head == "linear":
    config.batch_size, config.steps = 16, 40_000  # [dinov3]
    config.optimizer.update(dict(learning_rate=1e-3, weight_decay=1e-2, clip_norm=35.0))  # [dinov3]
  if head == "plain_mask":
    _pmt(config)


def _pmt(config: ml_collections.ConfigDict) -> None:
  """[pmt]: 16 epochs of 1,263 batches; masks are annealed one block after another."""
  config.steps = 16 * 1263
  config.optimizer.update(dict(learning_rate=2e-4, schedule="cosine", warmup_steps=6000))
  config_lib.set_for(
    config.segmentation.head,
    "plain_mask",
    anneal_starts=(0, 5384, 7403, 9422, 11_442, 13_461),
    anneal_ends=(3000, 8749, 10_769, 12_788, 14_807, 16_826),
  )
