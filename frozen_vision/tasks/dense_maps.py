"""Surface normals and depth as results: how they are drawn, written and exported."""

from collections.abc import Iterator, Mapping
import dataclasses
from typing import ClassVar

from jaxtyping import Float, UInt8
import numpy as np

from frozen_vision.tasks import results
from frozen_vision.visualization import dense_maps

_MILLIMETRES = 1000  # of a metre: the unit of depth PNGs, as those of NYUv2 and ScanNet
_LARGEST_PANEL = 800


class DenseMapWriter(results.FileWriter):
  """`normals/NAME.png` and `depth/NAME.png`, as far as they are predicted.

  Normals are 8-bit RGB: a value v of x, y or z is 2 v / 255 - 1, x to the right, y up, z towards the camera.
  Depth is 16-bit gray in millimetres, 65,535 at most.
  """

  def files(self, result: "DenseMaps") -> Iterator[tuple[str, str, bytes]]:
    if result.normals is not None:
      yield "normals", ".png", results.png(dense_maps.normal_colours(result.normals))
    if result.depth is not None:
      millimetres = np.clip(result.depth * _MILLIMETRES + 0.5, 0, 2**16 - 1)
      yield "depth", ".png", results.png(millimetres.astype(np.uint16))


@dataclasses.dataclass(frozen=True)
class DenseMaps(results.Result):
  """Normals and depth of an image at its own size; coordinates as in `data.dense.sources`.

  Attributes:
    normals: unit vectors; None of a head that does not predict them.
    depth: metres along the optical axis; None likewise.
  """

  exported: ClassVar[tuple[str, ...]] = ("normals", "depth")
  writer: ClassVar[type[results.ResultWriter]] = DenseMapWriter

  normals: Float[np.ndarray, "h w 3"] | None
  depth: Float[np.ndarray, "h w"] | None

  @classmethod
  def from_outputs(
    cls,
    outputs: Mapping[str, np.ndarray],
    batch: Mapping[str, np.ndarray],
    count: int,
    classes: results.Classes,
  ) -> "list[DenseMaps]":
    del classes
    found = []
    for row in range(count):
      height, width = (int(side) for side in batch["original_size"][row])
      maps = {
        name: np.ascontiguousarray(outputs[name][row][:height, :width]) if name in outputs else None
        for name in ("normals", "depth")
      }
      found.append(cls(**maps))
    return found

  def draw(
    self, picture: UInt8[np.ndarray, "h w 3"], *, score_threshold: float = 0.3
  ) -> UInt8[np.ndarray, "y x 3"]:
    """The image beside its maps, each 800 pixels wide or high at most."""
    del score_threshold
    shown = dense_maps.DenseComparison(picture, {"normals": self.normals, "depth": self.depth})
    return dense_maps.draw_dense_comparisons(
      [shown], panel_size=min(_LARGEST_PANEL, max(*picture.shape[:2], 320))
    )
