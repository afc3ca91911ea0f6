"""Results of prediction for one image or one video, in its own coordinates: how they are drawn and written.

A result is NumPy arrays; its class says how results are made of a model's outputs, drawn over the input,
written to a folder, and which of the outputs an exported program gives.
"""

import abc
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import io
import pathlib
from typing import Any, ClassVar, Literal, Self

from jaxtyping import Bool, Float, Int, UInt8
import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

from frozen_vision.data.segmentation import label_maps
from frozen_vision.files import atomic
from frozen_vision.metrics import coco_ap
from frozen_vision.visualization import clips, instances
from frozen_vision.visualization import label_maps as visualize_label_maps

# {"id": ..., "name": ...} of every class by its index, as JSON; ids are COCO's where the data have some.
Classes = Sequence[Mapping[str, Any]]

_LARGEST_PICTURE = 1600
_TOP = 5


class ResultWriter(abc.ABC):
  """Writes the results of one head into a folder, one input after the other."""

  def __init__(self, folder: pathlib.Path, classes: Classes, media: Literal["image", "video"]):
    """Writes nothing yet.

    Args:
      folder: of this head's results; it need not exist.
      classes: what the head tells apart.
      media: what its inputs are.
    """
    self.folder = folder
    self.classes = classes
    self.media = media

  @abc.abstractmethod
  def add(self, name: str, file_name: str, result: Any) -> None:
    """Takes the result of one input.

    Args:
      name: what files about this input are called, a relative path without an ending.
      file_name: how results name the input's file.
    """

  @abc.abstractmethod
  def finish(self) -> None:
    """Writes what concerns all inputs together."""


class Result(abc.ABC):
  """The prediction of a head for one input.

  Attributes:
    exported: names of those outputs of a task's model that an exported program gives.
    writer: class that writes results of this kind.
  """

  exported: ClassVar[tuple[str, ...]]
  writer: ClassVar[type[ResultWriter]]

  @classmethod
  @abc.abstractmethod
  def from_outputs(
    cls, outputs: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray], count: int, classes: Classes
  ) -> list[Self]:
    """The results of the first `count` examples of a batch, from the model's outputs on the host."""

  @abc.abstractmethod
  def draw(
    self, picture: UInt8[np.ndarray, "*t h w 3"], *, score_threshold: float = 0.3
  ) -> UInt8[np.ndarray, "y x 3"]:
    """The result over its input.

    Args:
      picture: the image [h, w, 3]; of a video its frames [t, h, w, 3].
      score_threshold: detections below it are not drawn.
    """


class FileWriter(ResultWriter):
  """Writes files of each input, and nothing about all of them."""

  @abc.abstractmethod
  def files(self, result: Any) -> Iterator[tuple[str, str, bytes]]:
    """Files of a result: folder, ending and content of each."""

  def add(self, name: str, file_name: str, result: Any) -> None:
    del file_name
    for folder, ending, content in self.files(result):
      atomic.write_bytes(self.folder / folder / f"{name}{ending}", content, sync=False)

  def finish(self) -> None:
    pass


def png(pixels: np.ndarray) -> bytes:
  """A PNG of gray pixels [h, w] of 8 or 16 bits, or of colours uint8 [h, w, 3]."""
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "PNG")
  return buffer.getvalue()


class DetectionWriter(ResultWriter):
  """`detections.json` in COCO's results format, and `images.json` with COCO's `images` and `categories`."""

  def __init__(self, *arguments: Any):
    super().__init__(*arguments)
    self._images: list[dict[str, Any]] = []
    self._rows: list[dict[str, Any]] = []

  def add(self, name: str, file_name: str, result: "Detections") -> None:
    image_id = len(self._images) + 1
    height, width = result.size
    self._images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
    self._rows += result.coco_rows(image_id, [category["id"] for category in self.classes])

  def finish(self) -> None:
    atomic.write_json(self.folder / "detections.json", self._rows)
    atomic.write_json(
      self.folder / "images.json",
      {"images": self._images, "categories": list(self.classes), "annotations": []},
    )


class LabelMapWriter(ResultWriter):
  """`label_maps/NAME.png`, class indices of all pixels, and `classes.json`, name and colour of each index."""

  def add(self, name: str, file_name: str, result: "LabelMap") -> None:
    palette = [instances.class_color(index) for index in range(len(result.class_names))]
    path = self.folder / "label_maps" / f"{name}.png"
    atomic.write_bytes(path, label_maps.encode(result.labels, palette), sync=False)

  def finish(self) -> None:
    atomic.write_json(
      self.folder / "classes.json",
      [
        {"id": index, "name": name, "color": instances.class_color(index)}
        for index, name in enumerate(class_names(self.classes))
      ],
      indent=1,
    )


class ProbabilityWriter(ResultWriter):
  """The likeliest classes of every input: `actions.json` of videos, `top_classes.json` of images."""

  def __init__(self, *arguments: Any):
    super().__init__(*arguments)
    self._rows: list[dict[str, Any]] = []

  def add(self, name: str, file_name: str, result: "ClassProbabilities") -> None:
    top = [{"class": name, "probability": round(p, 6)} for name, p in result.top(_TOP)]
    self._rows.append({"file": file_name, "top": top})

  def finish(self) -> None:
    name = "actions.json" if self.media == "video" else "top_classes.json"
    atomic.write_json(self.folder / name, self._rows, indent=1)


@dataclasses.dataclass(frozen=True)
class Detections(Result):
  """Objects in an image, the most confident first.

  Attributes:
    size: (height, width) of the image.
    boxes: xyxy in pixels of the image.
    scores: confidence in 0..1.
    labels: index of each object's class in `class_names`.
    segmentations: each object's mask as COCO's compressed RLE; None of a detector without masks. `masks`
      decodes them: all bitmaps of a large photograph at once are gigabytes.
    class_names: by index.
  """

  exported: ClassVar[tuple[str, ...]] = ("boxes", "scores", "labels", "valid", "masks")
  writer: ClassVar[type[ResultWriter]] = DetectionWriter

  size: tuple[int, int]
  boxes: Float[np.ndarray, "n 4"]
  scores: Float[np.ndarray, "n"]
  labels: Int[np.ndarray, "n"]
  segmentations: tuple[dict[str, Any], ...] | None
  class_names: tuple[str, ...]

  @classmethod
  def from_outputs(
    cls, outputs: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray], count: int, classes: Classes
  ) -> "list[Detections]":
    """The detections of the first `count` examples of a batch, exactly as evaluation would write them.

    Args:
      outputs: of a detector, in input pixels; see `coco_ap.CocoEvaluator.update`.
      batch: `image_size` and `original_size`, (h, w) of the content and of the source image.
    """
    sizes = np.asarray(batch["original_size"])[:count].tolist()
    evaluator = coco_ap.CocoEvaluator(
      {
        "images": [{"id": i, "height": h, "width": w} for i, (h, w) in enumerate(sizes)],
        "categories": [{"id": label} for label in range(len(classes))],
      },
      ("bbox", "segm") if "masks" in outputs else ("bbox",),
    )
    ids = np.arange(len(batch["original_size"]))
    evaluator.update(
      outputs,
      {
        "image_size": batch["image_size"],
        "original_size": batch["original_size"],
        "image_id": ids,
        "example_valid": ids < count,
      },
    )
    rows: list[list[dict[str, Any]]] = [[] for _ in sizes]
    for row in evaluator.detections():
      rows[row["image_id"]].append(row)
    names = class_names(classes)
    result = []
    for size, found in zip(sizes, rows):
      xywh = np.array([row["bbox"] for row in found], np.float64).reshape(-1, 4)
      corners = xywh[:, :2]
      result.append(
        cls(
          tuple(size),
          np.round(np.concatenate([corners, corners + xywh[:, 2:]], axis=1), 3),
          np.array([row["score"] for row in found], np.float64),
          np.array([row["category_id"] for row in found], np.int64),
          tuple(row["segmentation"] for row in found) if "masks" in outputs else None,
          names,
        )
      )
    return result

  def __len__(self) -> int:
    return len(self.scores)

  @property
  def names(self) -> list[str]:
    """The class of each object."""
    return [self.class_names[label] for label in self.labels]

  def masks(self) -> Bool[np.ndarray, "n h w"] | None:
    """Bitmaps of the whole image; None of a detector without masks."""
    if self.segmentations is None:
      return None
    masks = np.zeros((len(self), *self.size), bool)
    for mask, segmentation in zip(masks, self.segmentations):
      mask[:] = mask_utils.decode(segmentation)
    return masks

  def above(self, score: float) -> "Detections":
    """Those with at least this score."""
    kept = np.flatnonzero(self.scores >= score)
    segmentations = self.segmentations and tuple(self.segmentations[i] for i in kept)
    return dataclasses.replace(
      self,
      boxes=self.boxes[kept],
      scores=self.scores[kept],
      labels=self.labels[kept],
      segmentations=segmentations,
    )

  def coco_rows(self, image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Entries of COCO's results format: boxes are xywh there.

    Args:
      category_ids: by class index.
    """
    corners = self.boxes[:, :2]
    # `boxes` have three decimals; a difference of two of them has more only by rounding in binary.
    xywh = np.round(np.concatenate([corners, self.boxes[:, 2:] - corners], axis=1), 3).tolist()
    rows = [
      {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
      for label, box, score in zip(self.labels, xywh, self.scores.tolist())
    ]
    for row, segmentation in zip(rows, self.segmentations or ()):
      row["segmentation"] = segmentation
    return rows

  def draw(
    self, picture: UInt8[np.ndarray, "h w 3"], *, score_threshold: float = 0.3
  ) -> UInt8[np.ndarray, "y x 3"]:
    """Boxes and masks on the picture, which is made smaller if a side is above 1600 pixels.

    Masks are resized one at a time.
    """
    height, width = picture.shape[:2]
    factor = min(1.0, _LARGEST_PICTURE / max(height, width))
    small = max(1, round(width * factor)), max(1, round(height * factor))
    shown = self.above(score_threshold)
    masks = None
    if shown.segmentations is not None:
      masks = np.zeros((len(shown), small[1], small[0]), bool)
      for index, segmentation in enumerate(shown.segmentations):
        mask = Image.fromarray(mask_utils.decode(segmentation).astype(bool))
        masks[index] = np.asarray(mask.resize(small, Image.Resampling.NEAREST))
    scale = np.array([small[0] / width, small[1] / height] * 2)
    image = np.asarray(Image.fromarray(picture).resize(small, Image.Resampling.LANCZOS))
    return instances.draw_detections(
      image, shown.boxes * scale, shown.labels, shown.scores, masks, shown.class_names
    )


@dataclasses.dataclass(frozen=True)
class LabelMap(Result):
  """The class of every pixel of an image.

  Attributes:
    labels: index into `class_names`, at the image's own size.
    class_names: by index.
  """

  exported: ClassVar[tuple[str, ...]] = ("label_map",)
  writer: ClassVar[type[ResultWriter]] = LabelMapWriter

  labels: UInt8[np.ndarray, "h w"]
  class_names: tuple[str, ...]

  @classmethod
  def from_outputs(
    cls, outputs: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray], count: int, classes: Classes
  ) -> "list[LabelMap]":
    names = class_names(classes)
    return [
      cls(np.ascontiguousarray(labels[:height, :width]), names)
      for labels, (height, width) in zip(outputs["label_map"][:count], batch["original_size"])
    ]

  def draw(
    self, picture: UInt8[np.ndarray, "h w 3"], *, score_threshold: float = 0.3
  ) -> UInt8[np.ndarray, "y x 3"]:
    """Image and label map side by side, 1600 pixels wide at most, with a legend."""
    del score_threshold
    factor = min(1.0, _LARGEST_PICTURE / 2 / max(picture.shape[:2]))
    small = tuple(max(1, round(side * factor)) for side in picture.shape[1::-1])
    labels = np.asarray(Image.fromarray(self.labels).resize(small, Image.Resampling.NEAREST))
    image = np.asarray(Image.fromarray(picture).resize(small, Image.Resampling.BILINEAR))
    comparison = visualize_label_maps.LabelComparison(image, labels, None)
    return visualize_label_maps.draw_label_comparisons(
      [comparison], self.class_names, panel_size=max(max(small), 320)
    )

  def shares(self) -> dict[str, float]:
    """{class: its fraction of the pixels}, of the classes that occur, the largest first."""
    counts = np.bincount(self.labels.ravel(), minlength=len(self.class_names))
    order = np.argsort(-counts, kind="stable")
    return {self.class_names[i]: float(counts[i] / self.labels.size) for i in order if counts[i]}


@dataclasses.dataclass(frozen=True)
class ClassProbabilities(Result):
  """One class for a whole image or video.

  Attributes:
    probabilities: of every class; their sum is 1.
    class_names: by index.
  """

  exported: ClassVar[tuple[str, ...]] = ("probabilities",)
  writer: ClassVar[type[ResultWriter]] = ProbabilityWriter

  probabilities: Float[np.ndarray, "classes"]
  class_names: tuple[str, ...]

  @classmethod
  def from_outputs(
    cls, outputs: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray], count: int, classes: Classes
  ) -> "list[ClassProbabilities]":
    return [cls(row, class_names(classes)) for row in np.asarray(outputs["probabilities"])[:count]]

  def draw(
    self, picture: UInt8[np.ndarray, "*t h w 3"], *, score_threshold: float = 0.3
  ) -> UInt8[np.ndarray, "y x 3"]:
    """Frames in a row, and bars of the likeliest classes."""
    del score_threshold
    frames = picture if picture.ndim == 4 else picture[None]
    clip = clips.ClipPrediction(frames, self.probabilities, None)
    return clips.draw_strips([clip], self.class_names)

  def top(self, k: int = 5) -> list[tuple[str, float]]:
    """The k likeliest classes with their probabilities."""
    order = np.argsort(-self.probabilities, kind="stable")[:k]
    return [(self.class_names[i], float(self.probabilities[i])) for i in order]


def class_names(classes: Classes) -> tuple[str, ...]:
  """Names of the classes by index."""
  return tuple(str(category["name"]) for category in classes)
