"""Reconstructed images as results: how they are drawn and written."""

from collections.abc import Iterator, Mapping
import dataclasses
from typing import ClassVar

from jaxtyping import UInt8
import numpy as np

from frozen_vision.tasks import feature_maps, results

_GRAY = 127  # of masked pixels in pictures


class ReconstructionWriter(results.FileWriter):
  """`reconstructions/NAME.png` of every input, at the side that the network sees."""

  def files(self, result: "Reconstruction") -> Iterator[tuple[str, str, bytes]]:
    yield "reconstructions", ".png", results.png(result.image)


@dataclasses.dataclass(frozen=True)
class Reconstruction(results.Result):
  """An image of which some patches are predicted from the others.

  Attributes:
    image: RGB, predictions in the place of what was masked.
    masked: the image without what was masked.
  """

  exported: ClassVar[tuple[str, ...]] = ("reconstruction",)
  writer: ClassVar[type[results.ResultWriter]] = ReconstructionWriter

  image: UInt8[np.ndarray, "side side 3"]
  masked: UInt8[np.ndarray, "side side 3"]

  @classmethod
  def from_outputs(
    cls,
    outputs: Mapping[str, np.ndarray],
    batch: Mapping[str, np.ndarray],
    count: int,
    classes: results.Classes,
  ) -> "list[Reconstruction]":
    del batch, classes
    rows = zip(outputs["reconstruction"][:count], outputs["pixel_mask"][:count])
    return [cls(image, np.where(mask[..., None], np.uint8(_GRAY), image)) for image, mask in rows]

  def draw(
    self, picture: UInt8[np.ndarray, "h w 3"], *, score_threshold: float = 0.3
  ) -> UInt8[np.ndarray, "y x 3"]:
    """The central square of the image, what the network sees of it, and the reconstruction."""
    del score_threshold
    return feature_maps.side_by_side(feature_maps.central_square(picture), (self.masked, self.image))
