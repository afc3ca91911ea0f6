"""Errors of surface normals and depth over the pixels that have a true one, over all processes.

Normals: the angle between prediction and truth in degrees, of all pixels of all images together; its mean,
its median and the fractions below 11.25, 22.5 and 30 degrees (Fouhey, Gupta and Hebert 2013; Goyal et al.
2019).

Depth: of every image over its pixels, then the mean over images (AdaBins, Bhat et al. 2021, and its public
evaluation): abs_rel = mean |p - t| / t, rmse in metres, log10 = mean |log10 p - log10 t|, silog = 100 times
the standard deviation of ln p - ln t, and delta1 to delta3, the fractions with max(p / t, t / p) below 1.25,
1.25^2 and 1.25^3.
"""

from collections.abc import Callable, Mapping
import logging
import os
import pathlib

from jaxtyping import Float
import numpy as np

from frozen_vision.data.dense import sources
from frozen_vision.files import atomic
from frozen_vision.metrics import gather

_logger = logging.getLogger(__name__)

ANGLES = (11.25, 22.5, 30.0)
_BINS_PER_DEGREE = 1000  # of the median: it is right to a thousandth of a degree
_NEAREST = 1e-3  # metres: predicted depths below it count as it

Numbers = dict[str, float]


def angles(predicted: Float[np.ndarray, "*n 3"], true: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n"]:
  """Degrees between vectors, which need not have unit length; float64.

  A prediction without a direction is at 90 degrees to everything.
  """
  predicted, true = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
  dot = (predicted * true).sum(axis=-1)
  # The arc cosine of nearly one is exact to the square root of rounding only; this is exact everywhere.
  cross = np.sqrt((np.cross(predicted, true) ** 2).sum(axis=-1))
  return np.where((dot == 0) & (cross == 0), 90.0, np.degrees(np.arctan2(cross, dot)))


def angle_errors(
  predicted: Float[np.ndarray, "h w 3"], true: Float[np.ndarray, "h w 3"]
) -> Float[np.ndarray, "n"]:
  """Degrees of the pixels that have a true normal."""
  known = np.any(true != 0, axis=-1)
  return angles(predicted[known], true[known])


def depth_errors(predicted: Float[np.ndarray, "h w"], true: Float[np.ndarray, "h w"]) -> Numbers:
  """The depth metrics of one image; empty where no pixel has a true depth."""
  known = true > 0
  t = np.asarray(true, np.float64)[known]
  if not t.size:
    return {}
  p = np.maximum(np.asarray(predicted, np.float64)[known], _NEAREST)
  ratio, logs = np.maximum(p / t, t / p), np.log(p) - np.log(t)
  found = {
    "abs_rel": np.mean(np.abs(p - t) / t),
    "rmse": np.sqrt(np.mean((p - t) ** 2)),
    "log10": np.mean(np.abs(logs)) / np.log(10),
    "silog": 100 * np.std(logs),
  } | {f"delta{k}": np.mean(ratio < 1.25**k) for k in (1, 2, 3)}
  return {name: float(value) for name, value in found.items()}


class DenseEvaluator:
  """Collects predicted maps and measures them; gathers over processes by itself."""

  def __init__(
    self,
    truth: Callable[[int], sources.Truth],
    name: Callable[[int], str],
    num_images: int,
    targets: tuple[sources.Target, ...] = sources.TARGETS,
  ):
    """Starts empty.

    Args:
      truth: index of an image -> its true maps at original size.
      name: index of an image -> what `per_image.json` calls it.
      num_images: how many images there are, over all processes.
      targets: the maps that are measured.
    """
    self._truth, self._name, self._num_images, self._targets = truth, name, num_images, targets
    self._images: dict[int, Numbers] = {}
    self._histogram = np.zeros(180 * _BINS_PER_DEGREE + 1, np.int64)
    self._sums = dict.fromkeys(["pixels", "angle", *map(str, ANGLES)], 0.0)

  def update(self, predictions: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> None:
    """Adds one batch.

    Args:
      predictions: `normals` [b, H, W, 3], unit vectors, and `depth` [b, H, W] in metres, as far as they are
        among the targets; an image's are in the upper left `original_size` pixels.
      batch: `index` [b], `original_size` [b, 2] (h, w) and, if padding is possible, `example_valid` [b] bool.

    Raises:
      ValueError: an image that was there before, or whose truth has another size; names it.
    """
    valid = np.asarray(batch.get("example_valid", np.ones(len(batch["index"]), bool)), bool)
    for row in np.flatnonzero(valid):
      index = int(batch["index"][row])
      if index in self._images:
        raise ValueError(f"{self._name(index)} was given twice. Mark padding with example_valid=False.")
      height, width = (int(side) for side in batch["original_size"][row])
      truth = self._truth(index)
      for target in self._targets:
        found = np.shape(predictions[target][row])[:2]
        if truth[target].shape[:2] != (height, width) or found[0] < height or found[1] < width:
          raise ValueError(
            f"{self._name(index)} is {height} x {width} pixels (height x width); its true {target} are "
            f"{truth[target].shape[:2]} and the predicted ones {found}."
          )
      self._images[index] = self._measure(
        {target: np.asarray(predictions[target][row])[:height, :width] for target in self._targets}, truth
      )

  def _measure(self, predicted: Mapping[str, np.ndarray], truth: sources.Truth) -> Numbers:
    """The metrics of one image, whose angles are added to those of all."""
    found: Numbers = {}
    if "normals" in self._targets:
      errors = angle_errors(predicted["normals"], truth["normals"])
      bins = (errors * _BINS_PER_DEGREE + 0.5).astype(np.int64)
      self._histogram += np.bincount(bins, minlength=len(self._histogram))
      self._sums["pixels"] += len(errors)
      self._sums["angle"] += float(errors.sum())
      for angle in ANGLES:
        self._sums[str(angle)] += int(np.count_nonzero(errors < angle))
      if len(errors):
        found["mean_angle"] = float(errors.mean())
    if "depth" in self._targets:
      found |= depth_errors(predicted["depth"], truth["depth"])
    return found

  def _gathered(self) -> tuple[dict[str, Numbers], Numbers, np.ndarray]:
    """(metrics of each image by name, sums, histogram) over all processes."""
    occupied = np.flatnonzero(self._histogram)
    states = gather.gather_objects(
      {
        "images": [[index, numbers] for index, numbers in self._images.items()],
        "sums": self._sums,
        "histogram": [occupied.tolist(), self._histogram[occupied].tolist()],
      }
    )
    images = {index: numbers for state in states for index, numbers in state["images"]}
    if len(images) < self._num_images:
      _logger.warning("Only %d of %d images were evaluated.", len(images), self._num_images)
    histogram = np.zeros_like(self._histogram)
    for state in states:
      bins, counts = state["histogram"]
      histogram[np.asarray(bins, np.int64)] += np.asarray(counts, np.int64)
    sums = {key: sum(state["sums"][key] for state in states) for key in self._sums}
    return {self._name(index): images[index] for index in sorted(images)}, sums, histogram

  def result(self) -> dict[str, float]:
    """`mean_angle`, `median_angle` in degrees, `within_11.25`, ... in 0..1, and the depth metrics.

    Every process must call it. What no pixel has a truth for is left out, with a warning.
    """
    images, sums, histogram = self._gathered()
    found: dict[str, float] = {}
    if sums["pixels"]:
      found["mean_angle"] = sums["angle"] / sums["pixels"]
      found["median_angle"] = _median(histogram) / _BINS_PER_DEGREE
      found |= {f"within_{angle:g}": sums[str(angle)] / sums["pixels"] for angle in ANGLES}
    elif "normals" in self._targets:
      _logger.warning("No pixel with a true normal was evaluated.")
    measured = [numbers for numbers in images.values() if "abs_rel" in numbers]
    if measured:
      keys = [key for key in measured[0] if key != "mean_angle"]
      found |= {key: float(np.mean([numbers[key] for numbers in measured])) for key in keys}
    elif "depth" in self._targets:
      _logger.warning("No pixel with a true depth was evaluated.")
    return found

  def write(self, folder: str | os.PathLike[str], *, main_process: bool = True) -> None:
    """Writes `per_image.json`, {image: its metrics}. Every process must call it; the main one writes."""
    images, _, _ = self._gathered()
    if main_process:
      atomic.write_json(pathlib.Path(folder) / "per_image.json", images, indent=1)


def _median(histogram: np.ndarray) -> float:
  """The median of whole numbers that are counted; between two of them their mean."""
  cumulative = np.cumsum(histogram)
  count = int(cumulative[-1])
  low, high = (np.searchsorted(cumulative, rank, side="right") for rank in ((count - 1) // 2, count // 2))
  return float(low + high) / 2
