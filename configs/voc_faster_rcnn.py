"""VOC detection by Faster R-CNN with an FPN on a frozen backbone, as in 2011.13377.

  python -m frozen_vision.main --config=configs/voc_faster_rcnn.py --workdir=VOC \
    --config.backbone.weights=FILE --config.detection.root=VOCdevkit

Trains on VOC2007 and VOC2012 trainval and tests on VOC2007 test, by VOC's average precision (`voc_AP50`, and
`voc_AP`, `voc_AP75` over IoU as that paper has them) and COCO's (`box_AP`). Other lists of VOC's layout are
`--config.detection.voc.train="('trainval',)"` and `.validation`, with a class list of your own at
`--config.detection.voc.classes=classes.json`.

A recipe at full scale: it was not run. Tags of the values: [ssl] detectron2's config in the paper's release,
github.com/linusericsson/ssl-transfer, and detectron2's defaults under it; [ours] our choice. What that paper
calls frozen trains the last stage of the ResNet; here nothing of the backbone trains.
"""

import ml_collections

from frozen_vision import config as config_lib
from frozen_vision.tasks.detection_options import DetectionConfig


def get_config() -> ml_collections.ConfigDict:
  config = config_lib.config_dict(DetectionConfig())
  config.headline = "Faster R-CNN with an FPN on VOC, the backbone frozen."
  config.backbone.update(dict(name="resnet50", weights="weights/resnet50.pth"))
  config.steps = 144_000  # [ssl]
  config.batch_size = 2  # [ssl]
  config.eval_batch_size = 4  # [ours]
  config.eval_every = config.checkpoint_every = 12_000  # [ours]
  config.loader.workers = 4  # [ours]
  config.optimizer.update(
    dict(
      name="sgd",
      momentum=0.9,  # [ssl]
      learning_rate=0.0025,  # [ssl]
      weight_decay=1e-4,  # [ssl]; of kernels here, added after the momentum
      schedule="steps",
      decay_at=(96_000, 128_000),  # [ssl]
      warmup_steps=100,  # [ssl]
    )
  )
  options = config.detection
  options.data = "voc"
  options.root = "data/VOCdevkit"
  options.frame = options.eval_frame = (1333, 1333)  # [ssl]: the longest side, in either orientation
  options.resize = "short_side"
  options.short_side = (480, 800)  # [ssl] draws one of 480, 512, ..., 800
  options.long_side = 1333  # [ssl]
  options.eval_short_side = 800  # [ssl]
  options.head.name = "mask_rcnn"
  config_lib.set_for(options.head, "mask_rcnn", with_masks=False)
  return config
