"""Makes training examples of a fixed shape from images with normals and depth.

Maps take the nearest source pixel, so that no direction is invented at an edge. Mirroring negates the x of
normals. An image that is resized by twice the factor of evaluation looks as through a lens of twice the focal
length, so its depths are halved (Eigen, Puhrsch and Fergus 2014, section 3.4); normals stay.

Examples of evaluation are those of segmentation (`segmentation.transforms.SegmentationEval`).
"""

import dataclasses
from typing import Any

import numpy as np

from frozen_vision.data import batches
from frozen_vision.data.dense import sources
from frozen_vision.data.detection import transforms
from frozen_vision.data.segmentation import transforms as segmentation_transforms


@dataclasses.dataclass(frozen=True)
class DenseTrain:
  """Training example of a fixed shape.

  Attributes:
    frame: (height, width) of the result; content at the top left, zeros elsewhere.
    targets: the maps that an example has.
    resize: how the image is placed.
    evaluation: the transform of evaluation, at whose scale depths are as measured.
    jitter: change of colours; None for none.
    flip_probability: of mirroring left to right.
  """

  frame: transforms.Size
  targets: tuple[sources.Target, ...]
  resize: segmentation_transforms.RandomShortSide
  evaluation: segmentation_transforms.SegmentationEval
  jitter: segmentation_transforms.ColourJitter | None = None
  flip_probability: float = 0.5

  def __call__(self, record: dict[str, Any], rng: np.random.Generator) -> batches.DenseTrainBatch:
    """Makes one example of a record of a `DenseSource`."""
    # The placement looks at the size alone where no area of a class is limited.
    geometry = self.resize(record["image"][..., 0], self.frame, rng)
    if rng.random() < self.flip_probability:
      geometry = dataclasses.replace(geometry, flip=True)
    image = geometry.move_image(record["image"])
    if self.jitter is not None:
      image = self.jitter(image, rng)
    example = {
      "image": transforms.padded(image, self.frame, 0),
      "image_size": np.array(geometry.size, np.int32),
    }
    if "normals" in self.targets:
      normals = geometry.move_bitmaps(np.moveaxis(record["normals"], -1, 0))
      if geometry.flip:
        normals = normals * np.array([-1, 1, 1], np.float32)[:, None, None]
      example["normals"] = transforms.padded(np.moveaxis(normals, 0, -1), self.frame, 0)
    if "depth" in self.targets:
      usual = self.evaluation.resize(geometry.source, self.evaluation.frame)
      nearer = np.float32(usual.scale[0] / geometry.scale[0])
      depth = geometry.move_bitmaps(record["depth"][None])[0] * nearer
      example["depth"] = transforms.padded(depth, self.frame, 0)
    return example
