"""Semantic maps of the generated scenes: the class of the shape that a pixel shows, or background."""

from typing import Any

from jaxtyping import UInt8
import numpy as np

from frozen_vision.data.generated import scenes
from frozen_vision.data.segmentation import sources


class SemanticScenes(sources.SegmentationSource):
  """The scenes of a `SceneSource` with exact label maps; class 0 is the background, i + 1 shape i."""

  class_names = ("background", *scenes.CLASS_NAMES)

  def __init__(
    self,
    num_images: int,
    image_size: int | tuple[int, int] = 128,
    seed: int = 0,
    split: str = "train",
  ):
    """As `SceneSource`."""
    self._scenes = scenes.SceneSource(num_images, image_size, seed, split)

  def __len__(self) -> int:
    return len(self._scenes)

  def __repr__(self) -> str:
    return f"SemanticScenes({self._scenes!r})"

  @property
  def largest_size(self) -> tuple[int, int]:
    return self._scenes.image_size

  def name(self, index: int) -> str:
    return f"scene_{self._scenes.split}_{self._scenes.seed}_{index:06d}"

  def label(self, index: int) -> UInt8[np.ndarray, "h w"]:
    return _paint(self._scenes.scene(index))

  def __getitem__(self, index: int) -> dict[str, Any]:
    scene = self._scenes.scene(index)
    return {"image": scene.image, "label": _paint(scene), "name": self.name(index)}


def _paint(scene: scenes.Scene) -> UInt8[np.ndarray, "h w"]:
  # No two masks share a pixel, so that the sum is the class of the one that covers it.
  classes = (scene.labels + 1).astype(np.uint8)
  return (scene.masks * classes[:, None, None]).sum(axis=0, dtype=np.uint8)
