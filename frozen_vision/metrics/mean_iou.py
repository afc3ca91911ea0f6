"""Mean intersection over union of label maps, counted exactly at original sizes and over all processes.

With the counts n[t, p] of labelled pixels of true class t that were predicted as p:

    IoU of c      = n[c, c] / (sum_p n[c, p] + sum_t n[t, c] - n[c, c])
    mIoU          = mean of the IoUs over the classes that occur in truth or prediction
    pixel accuracy = sum_c n[c, c] / sum n
    mean accuracy = mean of n[c, c] / sum_p n[c, p] over the classes that occur in the truth

as mmseg's IoUMetric: a class that occurs in neither has no IoU and is left out of the mean; one that is
predicted and never true counts as 0. (detectron2 leaves out whatever the truth lacks.) Pixels without a class
in the truth count nowhere.
"""

from collections.abc import Callable, Mapping, Sequence
import logging
import os
import pathlib

from jaxtyping import Float, Int, UInt8
import numpy as np

from frozen_vision.data import names
from frozen_vision.data.segmentation import label_maps
from frozen_vision.files import atomic
from frozen_vision.metrics import gather

_logger = logging.getLogger(__name__)

LabelMap = UInt8[np.ndarray, "h w"]


def confusion_counts(truth: LabelMap, prediction: LabelMap, num_classes: int) -> Int[np.ndarray, "k k"]:
  """int64 counts [true class, predicted class] of the pixels that have a true class.

  Raises:
    ValueError: maps of different sizes, or a class outside of 0..num_classes - 1.
  """
  if truth.shape != prediction.shape:
    raise ValueError(f"The truth is {truth.shape} and the prediction {prediction.shape} (height, width).")
  known = truth != label_maps.IGNORE
  true, predicted = truth[known].astype(np.int64), prediction[known].astype(np.int64)
  for what, classes in (("truth", true), ("prediction", predicted)):
    if classes.size and classes.max() >= num_classes:
      raise ValueError(f"The {what} has class {classes.max()}; expected 0 to {num_classes - 1}.")
  counts = np.bincount(true * num_classes + predicted, minlength=num_classes**2)
  return counts.reshape(num_classes, num_classes)


def class_iou(counts: Int[np.ndarray, "k k"]) -> Float[np.ndarray, " k"]:
  """IoU of every class, NaN for those that occur in neither truth nor prediction."""
  both = np.diag(counts)
  return _ratio(both, counts.sum(axis=1) + counts.sum(axis=0) - both)


def class_accuracy(counts: Int[np.ndarray, "k k"]) -> Float[np.ndarray, " k"]:
  """Fraction of a class's pixels that were found, NaN for those that do not occur in the truth."""
  return _ratio(np.diag(counts), counts.sum(axis=1))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
  return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


class MeanIoUEvaluator:
  """Collects predicted label maps and measures them; gathers over processes by itself."""

  def __init__(
    self,
    class_names: Sequence[str],
    label: Callable[[int], LabelMap | None],
    name: Callable[[int], str],
    num_images: int,
    *,
    palette: Sequence[tuple[int, int, int]] = (),
  ):
    """Starts empty.

    Args:
      class_names: in the order of class indices.
      label: index of an image -> its true label map at original size, None where it is unlabelled: then it is
        written and not scored.
      name: index of an image -> what its file is called, without ending.
      num_images: how many images there are, over all processes.
      palette: colours of the classes in the files that are written.
    """
    self.class_names = tuple(class_names)
    self._label = label
    self._name = name
    self._num_images = num_images
    self._palette = palette
    self.reset()

  def reset(self) -> None:
    """Forgets all predictions."""
    count = len(self.class_names)
    self._counts = np.zeros((count, count), np.int64)
    self._files: dict[int, bytes] = {}
    self._total: np.ndarray | None = None

  def update(self, predictions: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> None:
    """Adds one batch.

    Args:
      predictions: `label_map` uint8 [b, H, W]: class of every pixel, the image's in the upper left
        `original_size` pixels.
      batch: `index` [b], `original_size` [b, 2] (h, w) and, if padding is possible, `example_valid` [b] bool;
        rows where it is False are not looked at.

    Raises:
      ValueError: an image that was there before, a truth of another size, or a class out of range; names the
        image.
    """
    valid = np.asarray(batch.get("example_valid", np.ones(len(batch["index"]), bool)), bool)
    self._total = None
    for row in np.flatnonzero(valid):
      index = int(batch["index"][row])
      if index in self._files:
        raise ValueError(
          f"{self._name(index)} was given twice. Mark padding with example_valid=False; call reset() "
          "before a second pass."
        )
      height, width = (int(side) for side in batch["original_size"][row])
      predicted = np.asarray(predictions["label_map"][row])
      if predicted.shape[0] < height or predicted.shape[1] < width:
        raise ValueError(
          f"{self._name(index)} is {height} x {width} pixels (height x width), and predicted at "
          f"{predicted.shape}."
        )
      predicted = np.ascontiguousarray(predicted[:height, :width])
      truth = self._label(index)
      if truth is not None:
        try:
          self._counts += confusion_counts(truth, predicted, len(self.class_names))
        except ValueError as error:
          raise ValueError(f"{self._name(index)}: {error}") from error
      # Compressed: whole label maps of a validation set would be gigabytes.
      self._files[index] = label_maps.encode(predicted, self._palette)

  def counts(self) -> Int[np.ndarray, "k k"]:
    """int64 counts [true class, predicted class] over all processes. Every process must call it.

    Raises:
      ValueError: two processes were given the same image.
    """
    if self._total is None:
      states = gather.gather_objects({"counts": self._counts.tolist(), "images": list(self._files)})
      images = [index for state in states for index in state["images"]]
      if len(set(images)) != len(images):
        twice = next(index for index in images if images.count(index) > 1)
        raise ValueError(f"{self._name(twice)} was given on two processes; mark padding as such.")
      if len(images) < self._num_images:
        _logger.warning("Only %d of %d images were evaluated.", len(images), self._num_images)
      self._total = np.sum([np.array(state["counts"], np.int64) for state in states], axis=0)
    return self._total

  def result(self) -> dict[str, float]:
    """`mIoU`, `mean_accuracy`, `pixel_accuracy` in 0..1 over all processes.

    Every process must call it. Without a single labelled pixel the answer is `{}`, with a warning.
    """
    counts = self.counts()
    if not counts.sum():
      _logger.warning("No labelled pixel was evaluated: label maps only, no mIoU.")
      return {}
    return {
      "mIoU": float(np.nanmean(class_iou(counts))),
      "mean_accuracy": float(np.nanmean(class_accuracy(counts))),
      "pixel_accuracy": float(np.trace(counts) / counts.sum()),
    }

  def per_class(self) -> dict[str, dict[str, float | int | None]]:
    """{class: {IoU, accuracy, pixels}} over all processes; None where a class has no such number.

    `pixels` are those of the truth. Every process must call it.
    """
    counts = self.counts()

    def number(value):
      return None if np.isnan(value) else float(value)

    return {
      name: {"IoU": number(iou), "accuracy": number(accuracy), "pixels": int(pixels)}
      for name, iou, accuracy, pixels in zip(
        self.class_names, class_iou(counts), class_accuracy(counts), counts.sum(axis=1)
      )
    }

  def write(self, folder: str | os.PathLike[str], *, main_process: bool = True) -> None:
    """Writes `label_maps/NAME.png` of this process's images and, once, `per_class.json`, over what is there.

    NAME is `names.output_name` of an image's name, since that stands in data and is not trusted as a path.
    A pixel of the PNG is the class's position in `per_class.json`. Every process must call it.

    Args:
      main_process: whether this process writes `per_class.json`.
    """
    folder = pathlib.Path(folder)
    for index, data in self._files.items():
      path = folder / "label_maps" / f"{names.output_name(self._name(index))}.png"
      atomic.write_bytes(path, data, sync=False)
    per_class = self.per_class()
    if main_process:
      atomic.write_json(folder / "per_class.json", per_class, indent=1, allow_nan=True)
