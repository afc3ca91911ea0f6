"""Maps of features as results: how they are drawn and written, and means over images as metrics."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import io
from typing import Any, ClassVar

from jaxtyping import Float, UInt8
import numpy as np
from PIL import Image

from frozen_vision.metrics import gather
from frozen_vision.tasks import results

_PANEL = 224  # pixels of a panel's side at least


class FeatureWriter(results.FileWriter):
  """`features/NAME.npz` with the array `features` [rows, columns, channels] of every input."""

  def files(self, result: "FeatureMap") -> Iterator[tuple[str, str, bytes]]:
    buffer = io.BytesIO()
    np.savez(buffer, features=result.features)
    yield "features", ".npz", buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class FeatureMap(results.Result):
  """The last map of a backbone for an image.

  Attributes:
    features: after the final norm.
  """

  exported: ClassVar[tuple[str, ...]] = ("features",)
  writer: ClassVar[type[results.ResultWriter]] = FeatureWriter

  features: Float[np.ndarray, "rows columns channels"]

  @classmethod
  def from_outputs(
    cls,
    outputs: Mapping[str, np.ndarray],
    batch: Mapping[str, np.ndarray],
    count: int,
    classes: results.Classes,
  ) -> "list[FeatureMap]":
    del batch, classes
    return [cls(np.asarray(map_)) for map_ in outputs["features"][:count]]

  def draw(
    self, picture: UInt8[np.ndarray, "h w 3"], *, score_threshold: float = 0.3
  ) -> UInt8[np.ndarray, "y x 3"]:
    """The central square of the image beside the map, in colours of its principal components."""
    del score_threshold
    return side_by_side(central_square(picture), principal_colours([self.features]))


def central_square(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "side side 3"]:
  """The largest square in the middle, which evaluation resizes."""
  side = min(picture.shape[:2])
  top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
  return np.ascontiguousarray(picture[top : top + side, left : left + side])


def principal_colours(
  maps: Sequence[Float[np.ndarray, "_rows _columns c"]],
) -> list[UInt8[np.ndarray, "_rows _columns 3"]]:
  """Maps as red, green and blue by the three principal components of the first map's cells.

  All maps have one origin and one range, so that equal colours are equal features.
  """
  cells = maps[0].reshape(-1, maps[0].shape[-1]).astype(np.float64)
  mean = cells.mean(axis=0)
  directions = np.linalg.svd(cells - mean, full_matrices=False)[2][:3].T
  # The sign of a component is arbitrary; its largest entry is made positive.
  directions = directions * np.sign(directions[np.abs(directions).argmax(axis=0), range(directions.shape[1])])
  first = (cells - mean) @ directions
  low, high = first.min(axis=0), first.max(axis=0)
  colours = []
  for map_ in maps:
    values = ((map_ - mean) @ directions - low) / np.maximum(high - low, 1e-12)
    padded = np.zeros((*map_.shape[:2], 3))
    padded[..., : values.shape[-1]] = np.clip(values, 0, 1)
    colours.append((255 * padded + 0.5).astype(np.uint8))
  return colours


def rows_of_pictures(
  images: UInt8[np.ndarray, "b h w 3"], *stacks: Float[np.ndarray, "b rows columns c"]
) -> UInt8[np.ndarray, "y x 3"]:
  """A row for every image: the image beside its maps, by the principal components of all first maps together.

  Equal colours are equal features, in one picture and across all of them.
  """
  count = len(images)
  colours = principal_colours([maps[:count].reshape(-1, *maps.shape[2:]) for maps in stacks])
  panels = [flat.reshape(count, -1, *flat.shape[1:]) for flat in colours]
  return np.concatenate([side_by_side(image, maps) for image, *maps in zip(images, *panels)])


def side_by_side(
  image: UInt8[np.ndarray, "h w 3"], maps: Sequence[UInt8[np.ndarray, "_h _w 3"]]
) -> UInt8[np.ndarray, "y x 3"]:
  """A square image and coarse maps as panels of one size; cells keep sharp edges."""
  size = (max(image.shape[0], _PANEL),) * 2
  panels = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))]
  panels += [np.asarray(Image.fromarray(map_).resize(size, Image.Resampling.NEAREST)) for map_ in maps]
  return np.concatenate(panels, axis=1)


class MeanEvaluator:
  """Means over all images of outputs that have one number for each."""

  def __init__(self, names: Sequence[str]):
    self._totals = {name: 0.0 for name in names}
    self._count = 0

  def update(self, predictions: Mapping[str, Any], batch: Mapping[str, np.ndarray]) -> None:
    """Adds a batch: `predictions[name]` [b], of the rows where `example_valid`."""
    valid = np.asarray(batch["example_valid"], bool)
    for name in self._totals:
      self._totals[name] += float(np.asarray(predictions[name], np.float64)[valid].sum())
    self._count += int(valid.sum())

  def result(self) -> dict[str, float]:
    """The means over all processes; every process must call it. Empty without an image."""
    states = gather.gather_objects({"totals": self._totals, "count": self._count})
    count = sum(state["count"] for state in states)
    if not count:
      return {}
    return {name: sum(state["totals"][name] for state in states) / count for name in self._totals}
