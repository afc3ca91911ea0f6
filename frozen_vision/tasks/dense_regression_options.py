"""Options of surface normals and depth."""

import dataclasses
import functools
from typing import Annotated, Literal

from frozen_vision import config, options
from frozen_vision.heads import linear, upernet
from frozen_vision.options import Count, DType, Fraction, Natural, NonNegative, Path, Positive, Range, Size
from frozen_vision.tasks.shared_options import InitOptions, ScenesOptions

HEADS = {
  "linear": linear.LinearConfig,
  "upernet": functools.partial(upernet.UPerNetConfig, auxiliary_weight=0.0),
}


@dataclasses.dataclass(frozen=True)
class DenseFoldersOptions:
  """Paths below `root`, or absolute ones; files of an image have its name."""

  images: Path = ""
  normals: Path = ""  # .npy [h, w, 3], or images of 8 bits: 2 v / 255 - 1
  depth: Path = ""  # .npy [h, w] in metres, or gray images of 16 bits: v times depth_unit


@dataclasses.dataclass(frozen=True)
class DenseTestOptions:
  """Views of testing whose maps are averaged."""

  scales: tuple[Positive, ...] = (1.0,)  # of eval_frame and the sides with it


@dataclasses.dataclass(frozen=True)
class DenseRegressionOptions:
  """The section `dense_regression`."""

  # rooms: generated; nyuv2: as people keep it below `root`; files: any images with normals and depth;
  # prepared: what frozen_vision.data.prepare wrote below `root`, splits training and validation.
  data: Literal["rooms", "nyuv2", "files", "prepared"] = "rooms"
  rooms: ScenesOptions = ScenesOptions()
  root: Path = "data/nyuv2"
  train: DenseFoldersOptions = DenseFoldersOptions()
  validation: DenseFoldersOptions = DenseFoldersOptions()
  # What x, y, z of the files' normals are multiplied by, to have x to the right, y up, z towards the camera.
  normal_signs: tuple[Literal[-1, 1], Literal[-1, 1], Literal[-1, 1]] = (1, 1, 1)
  depth_unit: Positive = 0.001  # metres of a step of depth images; arrays are in metres
  eigen_crop: bool = False  # depth of 480 x 640 images is evaluated inside of Eigen's crop
  targets: tuple[Literal["normals", "depth"], ...] = ("normals", "depth")  # what is learned
  # Directions that normals are classified among, learned from the training data by k-means.
  codewords: Annotated[int, Range(2, 255)] = 40
  depth_bins: Annotated[int, Range(2)] = 64  # evenly spaced over `depth_range`
  depth_range: tuple[NonNegative, Positive] = (0.0, 10.0)  # metres, of the first and the last bin
  depth_weight: NonNegative = 1.0  # of the loss of depth beside that of normals
  frame: Size = (448, 448)  # (height, width) of training crops, padded
  short_sides: tuple[Count, ...] = (448,)  # one is drawn; then a crop
  long_side: Count = 1000
  colour_jitter: bool = False
  flip: Fraction = 0.5
  eval_frame: Size = (480, 640)
  eval_short_side: Natural = 0  # 0: as large as eval_frame allows
  eval_long_side: Natural = 0
  test: DenseTestOptions = DenseTestOptions()
  head: linear.LinearConfig | upernet.UPerNetConfig = options.choice(HEADS, "linear")
  head_dtype: DType = "float32"
  init: InitOptions = InitOptions()

  def __post_init__(self):
    if not self.targets or len(set(self.targets)) != len(self.targets):
      raise ValueError(
        f"DenseRegressionOptions.targets is {self.targets}; expected normals, depth or both, each once."
      )
    if self.depth_range[0] >= self.depth_range[1]:
      raise ValueError(
        f"DenseRegressionOptions.depth_range is {self.depth_range}; expected the nearer depth first."
      )
    if not self.test.scales or not self.short_sides:
      raise ValueError("DenseRegressionOptions.test.scales and short_sides need one value at least.")
    if getattr(self.head, "auxiliary_weight", 0):
      raise ValueError(
        f"DenseRegressionOptions.head.auxiliary_weight is {self.head.auxiliary_weight}; normals and depth "
        "have no auxiliary loss, so it must be 0."
      )


@dataclasses.dataclass(frozen=True)
class DenseRegressionConfig(config.Config):
  """A config of task `dense_regression`."""

  task: str = "dense_regression"
  dense_regression: DenseRegressionOptions = DenseRegressionOptions()
