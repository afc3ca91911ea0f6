"""Options of detection and instance segmentation."""

import dataclasses
import functools
from typing import Literal

from frozen_vision import config, options
from frozen_vision.heads import retinanet
from frozen_vision.heads.htc import config as htc_config
from frozen_vision.necks import build as necks
from frozen_vision.options import Count, DType, Fraction, Natural, Path, Positive, Size
from frozen_vision.tasks.shared_options import InitOptions, ScenesOptions

HEADS = {
  **{name: functools.partial(htc_config.preset, name) for name in htc_config.PRESETS},
  "retinanet": retinanet.RetinaNetConfig,
}


@dataclasses.dataclass(frozen=True)
class AnnotatedImages:
  """A COCO JSON and the folder of its images."""

  annotations: Path = ""
  images: Path = ""


@dataclasses.dataclass(frozen=True)
class VocOptions:
  """Splits of PASCAL VOC's layout below `root`: year and list, or of one year's folder the list alone."""

  train: tuple[str, ...] = ("2007_trainval", "2012_trainval")
  validation: tuple[str, ...] = ("2007_test",)
  classes: Path = ""  # JSON list of class names; VOC's 20 if empty
  # Whether difficult objects are trained on, as detectron2 does. Evaluation never counts them.
  difficult: bool = True
  # Of voc_AP; auto: 11 points of recall where all validation splits are of 2007, else the area.
  average_precision: Literal["auto", "11_points", "area"] = "auto"


@dataclasses.dataclass(frozen=True)
class TestOptions:
  """Testing on several views. Without short sides there is one scale, eval_short_side in eval_frame."""

  __test__ = False  # no test of pytest's

  short_sides: tuple[Natural, ...] = ()  # of each scale; 0: as large as its frame allows
  frames: tuple[
    Size, ...
  ] = ()  # (height, width) of each scale, padded; an image that does not fit is made smaller
  sizes: tuple[
    str, ...
  ] = ()  # of the objects that each scale may find: "s", "ml", ... (COCO's, by box); all if empty
  flip: bool = False  # each scale also mirrored
  max_detections: Natural = 0  # after merging; 0: the head's


@dataclasses.dataclass(frozen=True)
class SemanticOptions:
  """Label maps for the semantic branch, which head.semantic_classes switches on."""

  maps: Path = (
    ""  # folder of the training images' label maps, one PNG of class indices for each; COCO-stuff's: 183
  )
  ignored: tuple[Natural, ...] = ()  # pixel values without a class, besides 255


@dataclasses.dataclass(frozen=True)
class DetectionScenesOptions(ScenesOptions):
  """Generated scenes with exact boxes and masks."""

  # In training images the first class is so many times as frequent as the last. Above 1, validation, whose
  # classes are equal, also reports the AP of frequent, common and rare classes, a third of them each.
  imbalance: Positive = 1.0


@dataclasses.dataclass(frozen=True)
class DetectionOptions:
  """The section `detection`."""

  # scenes: generated; photos: the built-in sample; coco: the standard layout below `root`;
  # voc: PASCAL VOC's layout below `root`; files: any COCO JSON and its folder of images; prepared: what
  # frozen_vision.data.prepare wrote.
  data: Literal["scenes", "photos", "coco", "voc", "files", "prepared"] = "coco"
  scenes: DetectionScenesOptions = DetectionScenesOptions()
  root: Path = "data/coco"
  voc: VocOptions = VocOptions()
  train: AnnotatedImages = AnnotatedImages()
  validation: AnnotatedImages = AnnotatedImages()
  # For data=files without validation paths: fraction of the images that is held out of training.
  validation_fraction: Fraction = 0.0
  train_image_ids: tuple[int, ...] = ()  # only these; all if empty
  validation_image_ids: tuple[int, ...] = ()
  # Images of classes in a smaller fraction of the training images are shown more often (LVIS: 0.001).
  repeat_threshold: Fraction = 0.0
  max_objects: Count = 100
  frame: Size = (1024, 1024)  # (height, width) of training images, padded
  eval_frame: Size = (1024, 1024)
  resize: Literal["lsj", "short_side", "fit"] = "lsj"
  scale_range: tuple[Positive, Positive] = (0.1, 2.0)  # of lsj
  short_side: tuple[Count, Count] = (480, 800)  # of short_side
  long_side: Count = 1333
  eval_short_side: Natural = 0  # 0: as large as eval_frame allows
  flip: Fraction = 0.5
  copy_paste: Fraction = (
    0.0  # probability that objects of another random image are pasted into a training image
  )
  test: TestOptions = TestOptions()
  neck: necks.NeckConfig = options.choice(necks.NECKS, "fpn")
  semantic: SemanticOptions = SemanticOptions()
  head: htc_config.HTCConfig | retinanet.RetinaNetConfig = options.choice(HEADS, "htc")
  head_dtype: DType = "float32"
  init: InitOptions = InitOptions()


@dataclasses.dataclass(frozen=True)
class DetectionConfig(config.Config):
  """A config of task `detection`."""

  task: str = "detection"
  detection: DetectionOptions = DetectionOptions()
