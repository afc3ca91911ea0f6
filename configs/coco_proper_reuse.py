"""Detection on frozen classifiers with NAS-FPN and cascades, as in Proper Reuse (arXiv 2204.00484).

  python -m frozen_vision.main --config=configs/coco_proper_reuse.py:backbone=resnet_rs101,detector=nas_fpn \
    --workdir=REUSE --config.backbone.weights=FILE --config.detection.root=COCO

| argument | values, the default first |
|---|---|
| backbone | resnet_rs101 at 1024 px (cascade: 1280, retinanet: 640); efficientnet_b7 at 1280 px |
| detector | nas_fpn, fpn, cascade (on NAS-FPN): Faster R-CNN; retinanet (on NAS-FPN) |
| train | heads; adapters in the frozen backbone, too; all: everything is fine-tuned |
| epochs | 72; 600; with data=lvis, too, epochs are COCO's |
| masks | off; on: Mask R-CNN, of efficientnet_b7 with copy-paste |
| data | coco; lvis: LVIS's JSON at config.detection.train.annotations and .images, .validation likewise |
| loss | softmax; federated: a sigmoid for each class, of those that images were searched for |
| stage | 1; 2: of a finished run on LVIS only the classifiers train, by a class-balanced loss |

None of them was run: these are recipes at full scale. Weights: timm's `resnetrs101` and `tf_efficientnet_b7`,
or the `.index` of Model Garden's checkpoint of ResNet-RS-101, from which the release began. How the paper's
residual adapters (table 7) look is not known: these are bottlenecks parallel to every block [ours].

Stage 2 begins with the neck and head of stage 1, which experiments/export_head.py writes, given as
--config.detection.init.path=FILE; after train=all its backbone is the one of experiments/export_backbone.py.
Adapters are not carried over, so train=adapters has no stage 2.

What trains of fpn, nas_fpn and cascade has 20.7, 38.9 and 71.3 million parameters, of 90 classes without
masks; the paper's table 3 has 21.9, 40.9 and 71.3. Of the first difference 0.6 are a convolution for level 6
in Model Garden's FPN; the rest is not explained.

Tags of the values: [reuse] official/projects/backbone_reuse of TensorFlow Model Garden, the authors' release;
[tf] the configs in official/vision that it builds on; [paper] the paper; [lvis] LVIS (arXiv 1908.03195,
appendix B); [centernet2] the federated loss of github.com/xingyizhou/CenterNet2; [ours] our choice. Detectors
are rows of `frozen_vision.heads.htc.config.PRESETS`, which says what differs from the release.
"""

import ml_collections

from frozen_vision import config as config_lib
from frozen_vision.tasks.detection_options import DetectionConfig

ARGUMENTS = {
  "backbone": ("resnet_rs101", "efficientnet_b7"),
  "detector": ("fpn", "nas_fpn", "cascade", "retinanet"),
  "train": ("heads", "adapters", "all"),
  "epochs": ("72", "600"),
  "masks": ("off", "on"),
  "data": ("coco", "lvis"),
  "loss": ("softmax", "federated"),
  "stage": ("1", "2"),
}
VARIANTS = {"": "backbone=resnet_rs101"}
_EPOCH = 1848  # steps of batch 64 in an epoch of train2017 [reuse]
# Epochs after which the rate falls to a tenth [reuse].
_DECAY_AT = {"72": (48, 68), "600": (575, 590)}


def get_config(arguments: str = "") -> ml_collections.ConfigDict:
  chosen = config_lib.parse_arguments(arguments, ARGUMENTS, "configs/coco_proper_reuse.py", VARIANTS)
  chosen = {name: chosen.get(name, default) for name, default in _DEFAULTS.items()}
  if chosen["detector"] == "retinanet" and chosen["masks"] == "on":
    raise ValueError("configs/coco_proper_reuse.py: RetinaNet has no masks; leave out masks=on.")
  if chosen["detector"] == "retinanet" and (chosen["loss"] == "federated" or chosen["stage"] == "2"):
    raise ValueError(
      "configs/coco_proper_reuse.py: loss=federated and stage=2 are of Faster R-CNN; take another detector."
    )
  if chosen["stage"] == "2" and (chosen["data"] != "lvis" or chosen["train"] == "adapters"):
    raise ValueError(
      "configs/coco_proper_reuse.py: stage=2 is for data=lvis with train=heads or all; adapters of "
      "stage 1 are not carried over."
    )
  config = config_lib.config_dict(DetectionConfig())
  config.headline = "A frozen ImageNet classifier with a detector of Proper Reuse."
  config.frozen_dtype = config.backbone.dtype = config.detection.head_dtype = "bfloat16"  # [tf]
  config.eval_every = config.checkpoint_every = 5000  # [ours]
  config.loader.workers = 8  # [ours]
  _backbone(config, chosen)
  _detector(config, chosen)
  _schedule(config, chosen)
  if chosen["data"] == "lvis":
    config.detection.data = "files"
    config.detection.repeat_threshold = 0.001  # [lvis]
    config.detection.max_objects = 300  # [ours]
    # As many as LVIS counts; of a thousand classes few scores reach 0.05 [ours].
    heads = (*_TF_HEADS, "retinanet")
    config_lib.set_for(config.detection.head, heads, max_detections=300, score_threshold=1e-4)
  if chosen["loss"] == "federated":
    # [centernet2]; a bias of the background is then without use.
    config_lib.set_for(config.detection.head, _TF_HEADS, class_loss="sigmoid", federated_classes=50)
  if chosen["train"] == "all":
    config.trainable = (".*",)
  elif chosen["train"] == "adapters":
    config.adapters.update(dict(kind="bottleneck", placement="parallel", width=64))  # [ours]
  if chosen["stage"] == "2":
    _second_stage(config)
  return config


_DEFAULTS = dict(
  backbone="resnet_rs101",
  detector="nas_fpn",
  train="heads",
  epochs="72",
  masks="off",
  data="coco",
  loss="softmax",
  stage="1",
)
_TF_HEADS = ("tf_mask_rcnn", "tf_cascade_mask_rcnn")


def _second_stage(config: ml_collections.ConfigDict) -> None:
  """Only the classifier of each box head trains, by a class-balanced loss [paper]; the numbers are [ours]."""
  config.trainable = ("head/box_heads/.*/classes/.*",)
  config_lib.set_for(config.detection.head, _TF_HEADS, class_balance=0.999)
  config.detection.init.path = "weights/stage1_head.safetensors"
  config.detection.repeat_threshold = 0.0
  config.steps = 12 * _EPOCH
  config.optimizer.update(dict(learning_rate=0.016, decay_at=(8 * _EPOCH, 11 * _EPOCH)))


def _backbone(config: ml_collections.ConfigDict, chosen: dict[str, str]) -> None:
  options = config.detection
  # The pretraining at 192 px of the release [reuse] is timm's too.
  config.backbone.update(dict(name="resnet_rs101", weights="weights/resnetrs101.safetensors"))
  side = {"cascade": 1280, "retinanet": 640}.get(chosen["detector"], 1024)  # [reuse], [tf]
  if chosen["backbone"] == "efficientnet_b7":
    config.backbone.update(dict(name="tf_efficientnet_b7", weights="weights/tf_efficientnet_b7.safetensors"))
    side = 1280  # [paper]
    options.copy_paste = 0.5 if chosen["masks"] == "on" else 0.0  # [paper]; how often [ours]
  options.frame = options.eval_frame = (side, side)
  options.resize = "lsj"
  options.scale_range = (0.1, 2.0)  # [reuse]
  options.flip = 0.5  # [tf]


def _detector(config: ml_collections.ConfigDict, chosen: dict[str, str]) -> None:
  options, detector = config.detection, chosen["detector"]
  if detector == "fpn":
    options.neck.name = "fpn"  # levels 2 to 6 [tf]
    config_lib.set_for(options.neck, "fpn", channels=256, levels=5, input_norm=False)
    finest = 56.0
  else:
    options.neck.name = "nas_fpn"  # levels 3 to 7, 5 repeats [reuse]
    activation = "relu" if detector == "retinanet" else "swish"  # [reuse]
    config_lib.set_for(options.neck, "nas_fpn", channels=256, repeats=5, activation=activation)
    finest = 112.0  # a roi of 224 px is for level 4 [tf]
  options.head.name = {"cascade": "tf_cascade_mask_rcnn", "retinanet": "retinanet"}.get(
    detector, "tf_mask_rcnn"
  )
  config_lib.set_for(options.head, _TF_HEADS, finest_scale=finest, with_masks=chosen["masks"] == "on")


def _schedule(config: ml_collections.ConfigDict, chosen: dict[str, str]) -> None:
  epochs, batch = chosen["epochs"], 256 if chosen["detector"] == "retinanet" else 64  # [reuse]
  epoch = _EPOCH * 64 // batch
  config.batch_size, config.steps = batch, int(epochs) * epoch
  config.optimizer.update(
    dict(
      name="sgd",
      momentum=0.9,  # [tf]
      # [reuse]; for batch 64 the paper is cited with 0.08 [paper].
      learning_rate=0.32 if batch == 256 else 0.16,
      weight_decay=1e-4 if batch == 256 else 4e-5,  # [tf]; of kernels here, added after the momentum
      schedule="steps",
      decay_at=tuple(number * epoch for number in _DECAY_AT[epochs]),
      warmup_steps=500,  # [tf]
    )
  )
