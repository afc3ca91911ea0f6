"""Images with a surface normal and a depth for every pixel.

Normals are unit vectors in the camera's coordinates: x to the right, y up, z towards the camera, so that a
wall seen straight on has (0, 0, 1). A pixel without a normal has (0, 0, 0). Depth is the distance along the
optical axis in metres, not along the ray; a pixel without a depth has 0.
"""

import abc
from typing import Any, Literal, TypedDict

from jaxtyping import Float32, UInt8
import numpy as np

Target = Literal["normals", "depth"]
TARGETS: tuple[Target, ...] = ("normals", "depth")


class Truth(TypedDict, total=False):
  """The maps of an image, at its own size; a source may have one of them or both.

  Attributes:
    normals: unit vectors, zeros where unknown.
    depth: metres, 0 where unknown.
  """

  normals: Float32[np.ndarray, "h w 3"]
  depth: Float32[np.ndarray, "h w"]


class DenseSource(abc.ABC):
  """Images with normals, depth or both, by position; a record has these keys:

  image uint8 [h, w, 3], RGB; name str; and those of `Truth` that are in `targets`.

  Attributes:
    targets: the maps that every image has.
    largest_size: (height, width) in pixels that no image exceeds.
  """

  targets: tuple[Target, ...]
  largest_size: tuple[int, int]

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @abc.abstractmethod
  def image(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
    """The image alone."""

  @abc.abstractmethod
  def truth(self, index: int) -> Truth:
    """The maps alone, at the image's own size."""

  @abc.abstractmethod
  def name(self, index: int) -> str:
    """What files about the image are called, without an ending."""

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {"image": self.image(index), "name": self.name(index), **self.truth(index)}
