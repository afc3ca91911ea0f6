"""Options of semantic segmentation."""

import dataclasses
import functools
from typing import Literal

from frozen_vision import config, options
from frozen_vision.heads import linear, upernet
from frozen_vision.heads.mask2former.config import Mask2FormerConfig
from frozen_vision.heads.plain_mask_decoder import PlainMaskConfig
from frozen_vision.necks import build as necks
from frozen_vision.options import Count, DType, Fraction, Natural, Path, Positive, Size
from frozen_vision.tasks.shared_options import InitOptions, ScenesOptions

HEADS = {
  "mask2former": Mask2FormerConfig,
  "plain_mask": PlainMaskConfig,
  "upernet": upernet.UPerNetConfig,
  "linear": linear.LinearConfig,
}

# Four levels of strides 4 to 32 of every neck; the adapter's are the ViT's width, without an FPN behind it.
_LEVELS = {"fpn": {}, "bifpn": {}, "simple_pyramid": {}, "vit_adapter": dict(channels=0)}
NECKS = {"none": necks.NoNeck} | {
  name: functools.partial(necks.NECKS[name], levels=4, **values) for name, values in _LEVELS.items()
}


@dataclasses.dataclass(frozen=True)
class LabelledFolders:
  """Paths below `root`, or absolute ones."""

  images: Path = ""
  labels: Path = ""
  segments: Path = ""  # COCO's panoptic JSON, if the label images are of that format


@dataclasses.dataclass(frozen=True)
class TestOptions:
  """Views of testing whose scores are averaged."""

  __test__ = False  # no test of pytest's

  scales: tuple[Positive, ...] = (1.0,)  # of eval_frame and the sides with it
  flip: bool = False  # each scale also mirrored
  window: tuple[()] | Size = ()  # (height, width) that the model sees at once; (): whole images
  stride: tuple[()] | Size = ()  # (down, right) between windows; (): two thirds of them


@dataclasses.dataclass(frozen=True)
class SegmentationOptions:
  """The section `segmentation`."""

  # scenes: generated; ade20k: the official layout below `root`; files: any images and label images;
  # prepared: what frozen_vision.data.prepare wrote below `root`, splits training and validation.
  data: Literal["scenes", "ade20k", "files", "prepared"] = "ade20k"
  scenes: ScenesOptions = ScenesOptions()
  root: Path = "data/ADEChallengeData2016"
  classes: Path = ""  # of files: a list of class names, .json or .txt
  train: LabelledFolders = LabelledFolders()
  validation: LabelledFolders = LabelledFolders()
  image_suffix: str = ""  # end of the images' names before their ending, such as _leftImg8bit
  label_suffix: str = ""  # the same of the label images
  ignore: tuple[Natural, ...] = ()  # more pixel values without a class
  unknown_labels: Literal["error", "ignore"] = "error"  # what a value outside of the class list is
  # How an image without a label image is treated; keep (of validation): predicted and not scored.
  unlabelled: Literal["error", "skip", "keep"] = "error"
  frame: Size = (512, 512)  # (height, width) of training crops, padded
  short_sides: tuple[Count, ...] = tuple(
    int(0.1 * k * 512) for k in range(5, 21)
  )  # one is drawn; then a crop
  long_side: Count = 2048
  category_max_area: Fraction = (
    0.75  # largest fraction of one class in a crop, tried ten times; 1.0 for no limit
  )
  colour_jitter: bool = True
  flip: Fraction = 0.5
  max_segments: Count = 64  # most classes of a crop that Mask2Former trains on
  eval_frame: Size = (512, 512)
  eval_short_side: Natural = 0  # 0: as large as eval_frame allows
  eval_long_side: Natural = 0
  test: TestOptions = TestOptions()
  neck: necks.NoNeck | necks.NeckConfig = options.choice(NECKS, "none")
  head: Mask2FormerConfig | PlainMaskConfig | upernet.UPerNetConfig | linear.LinearConfig = options.choice(
    HEADS, "mask2former"
  )
  head_dtype: DType = "float32"
  init: InitOptions = InitOptions()


@dataclasses.dataclass(frozen=True)
class SegmentationConfig(config.Config):
  """A config of task `segmentation`."""

  task: str = "segmentation"
  segmentation: SegmentationOptions = SegmentationOptions()
