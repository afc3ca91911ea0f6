"""Options of action recognition."""

import dataclasses
from typing import Literal

from frozen_vision import config, options
from frozen_vision.heads import video_swin
from frozen_vision.options import Count, DType, Fraction, Natural, NonNegative, Path
from frozen_vision.tasks.shared_options import RandAugmentOptions

HEADS = {
  "video_swin": video_swin.VideoSwinHeadConfig,
  "attentive": video_swin.AttentiveHeadConfig,
  "average": video_swin.AverageHeadConfig,
}


@dataclasses.dataclass(frozen=True)
class ClipsOptions:
  """Generated clips."""

  train_clips: Count = 6000
  validation_clips: Count = 200
  frames: Count = 8


@dataclasses.dataclass(frozen=True)
class TestOptions:
  """Views whose probabilities are averaged: clips x crops."""

  __test__ = False  # no test of pytest's

  clips: Count = 1
  crops: Literal[1, 3] = 1


@dataclasses.dataclass(frozen=True)
class ActionOptions:
  """The section `action`."""

  # clips: generated ones; videos: `train` and `validation`, each a folder of class folders or a list; folds:
  # one fold of a cross-validation over all of `lists`; prepared: what frozen_vision.data.prepare wrote below
  # `root`, splits train and validation. A folder of one prepared split is taken wherever a folder or list is.
  data: Literal["clips", "videos", "folds", "prepared"] = "videos"
  clips: ClipsOptions = ClipsOptions()
  train: Path = "kinetics400/train.csv"
  validation: Path = "kinetics400/val.csv"
  root: Path = ""  # of lists, what paths in them are relative to; by default the list's own folder
  lists: tuple[Path, ...] = ()
  group_column: str = ""  # column of the lists that says which videos belong together, such as one scene
  fold: Natural = 0
  num_folds: Count = 5
  frames: Count = 16  # per clip
  stride: Count = 4  # frames of the video per frame of the clip
  sampling: Literal["dense", "uniform"] = "dense"
  rate: NonNegative = (
    0.0  # frames per second that videos are resampled to first, by time stamp; 0: as they are
  )
  image_size: Count = 224
  short_side: Count = 256  # of decoded frames in training
  crop_scale: tuple[()] | tuple[Fraction, Fraction] = (
    0.08,
    1.0,
  )  # area of random resized crops; (): the central square
  flip: Fraction = 0.5
  rand_augment: RandAugmentOptions = RandAugmentOptions(num_ops=0, magnitude=7.0)
  erasing: Fraction = 0.0
  label_smoothing: Fraction = 0.0
  test: TestOptions = TestOptions()
  # Frames of one pass through the backbone, on each device; more go through it in several passes.
  frames_per_pass: Count = 64
  head: video_swin.VideoSwinHeadConfig | video_swin.AttentiveHeadConfig | video_swin.AverageHeadConfig = (
    options.choice(HEADS, "video_swin")
  )
  head_dtype: DType = "float32"


@dataclasses.dataclass(frozen=True)
class ActionConfig(config.Config):
  """A config of task `action`."""

  task: str = "action"
  action: ActionOptions = ActionOptions()
