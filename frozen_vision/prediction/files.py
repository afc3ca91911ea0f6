"""Prediction on folders and files: finds them, reads them ahead, writes results, names what cannot be used.

What is written below the folder of results, for a head that is called HEAD:

    summary.json                  inputs, those that were skipped and why, heads and their backbone passes
    HEAD/pictures/NAME.jpg        results drawn over the input, at most 1600 pixels on a side
    HEAD/detections.json          of a detector: a list in COCO's results format
    HEAD/images.json              of a detector: COCO's `images` and `categories`, without annotations:
                                  COCO("images.json").loadRes("detections.json") has both
    HEAD/label_maps/NAME.png      of a segmenter: the class index of every pixel, at the image's size
    HEAD/classes.json             of a segmenter: name and colour of every index
    HEAD/actions.json             of an action recogniser: the likeliest classes of every video
    HEAD/top_classes.json         of a classifier: the same of every image

Images have no ids of COCO's; they are numbered from 1 in the order of the inputs, and `file_name` says which
is which. NAME is the input's path below the folder that was given, without its ending, or with it where two
inputs would have the same name.
"""

import abc
import collections
from collections.abc import Iterator, Mapping, Sequence
import concurrent.futures
import dataclasses
import logging
import os
import pathlib
import time
from typing import Any

import numpy as np
from PIL import Image

from frozen_vision.data import images
from frozen_vision.data.segmentation import label_maps
from frozen_vision.files import atomic
from frozen_vision.prediction import inputs as inputs_lib
from frozen_vision.prediction import predictor as predict_lib
from frozen_vision.prediction import results as predictions
from frozen_vision.prediction import trained_head
from frozen_vision.visualization import clips, instances
from frozen_vision.visualization import label_maps as visualize_semantic

_logger = logging.getLogger(__name__)

_LARGEST_PICTURE = 1600
_TOP = 5
_SECONDS_BETWEEN_LINES = 10.0
_DECODING_THREADS = 4


def predict(
  inputs: Sequence[str],
  *,
  workdir: str | None = None,
  heads: Sequence[str] = (),
  out: str | None = None,
  backbone: str | None = None,
  image_size: Sequence[int] = (),
  best: bool = False,
) -> dict[str, Any]:
  """What `--mode=predict` does.

  Args:
    inputs: folders, files, or patterns such as `photos/*.jpg`.
    workdir: of a run whose head predicts, if there is one head.
    heads: several of them, each a workdir or NAME=WORKDIR.
    out: folder of results; None: `predictions` in the (first) workdir.
    backbone, image_size, best: see `predict.Predictor`; image_size is (), (side,) or (height, width).

  Returns:
    The summary; see `predict_files`.

  Raises:
    FileNotFoundError: an input or a run that is not there.
    ValueError: no head, two of one name, or not a single input that could be used.
  """
  if bool(workdir) == bool(heads):
    raise ValueError(
      "--mode=predict needs the trained heads: --workdir=RUN for one, or --heads=detect=RUN1,segment=RUN2."
    )
  found = inputs_lib.find_inputs(inputs, exclude=None if out is None else pathlib.Path(out))
  named = trained_head.named(heads or [workdir])
  size = tuple(image_size)
  predictor = predict_lib.Predictor(
    backbone, named, image_size=size[0] if len(size) == 1 else size or None, best=best
  )
  _logger.info("%s", predictor.describe())
  folder = pathlib.Path(out) if out else pathlib.Path(next(iter(named.values()))) / "predictions"
  summary = predict_files(predictor, found, folder)
  if not summary["done"]:
    reasons = "".join(f"\n  {row['file']}: {row['reason']}" for row in summary["skipped"][:10])
    raise ValueError(f"None of the {summary['inputs']} inputs could be used:{reasons}")
  return summary


def predict_files(
  predictor: predict_lib.Predictor,
  inputs: Sequence[inputs_lib.Input | str | os.PathLike],
  out: str | os.PathLike,
  *,
  pictures: bool = True,
  score_threshold: float = 0.3,
) -> dict[str, Any]:
  """Predicts on files and writes the results; see the module.

  Args:
    inputs: of `inputs.find_inputs`, or what it takes.
    out: folder of results; what an earlier call left there under the same names is replaced.
    pictures: draw.
    score_threshold: detections below it are not drawn; the JSON has all of them.

  Returns:
    What `summary.json` holds: `inputs` and `done` (numbers), `skipped` ({file, reason} of each), `heads`,
    `passes`, `seconds`.
  """
  started = time.perf_counter()
  out = pathlib.Path(out)
  if not all(isinstance(entry, inputs_lib.Input) for entry in inputs):
    inputs = inputs_lib.find_inputs(inputs, exclude=out)
  writers = {
    name: _WRITERS[type(head)](head, out / name, pictures, score_threshold)
    for name, head in predictor.heads.items()
  }
  skipped: dict[pathlib.Path, str] = {}
  for media in ("image", "video"):
    of_media = [entry for entry in inputs if entry.media == media]
    if of_media and not predictor.takes(media):
      _logger.warning("%d %ss are skipped: no head takes them.", len(of_media), media)
      skipped |= {entry.path: f"no head takes {media}s" for entry in of_media}
      continue
    progress, before = _Progress(len(of_media), media), len(skipped)
    for chunk in _read_ahead(predictor, media, of_media, skipped):
      results = predictor.run(media, [example for _, example in chunk])
      for name, values in results.items():
        for (entry, example), result in zip(chunk, values, strict=True):
          writers[name].add(entry, example.picture, result)
      progress.done(len(chunk), len(skipped) - before)
  for name, head in predictor.heads.items():
    if any(entry.media == head.media for entry in inputs):
      writers[name].finish()
  summary = {
    "inputs": len(inputs),
    "done": len(inputs) - len(skipped),
    "skipped": [
      {"file": str(entry.path), "reason": skipped[entry.path]} for entry in inputs if entry.path in skipped
    ],
    "heads": {
      name: {"workdir": head.workdir, "step": head.step, "task": head.config.task}
      for name, head in predictor.heads.items()
    },
    "passes": [one.describe() for one in predictor.passes],
    "seconds": round(time.perf_counter() - started, 2),
  }
  atomic.write_json(out / "summary.json", summary, indent=1)
  _logger.info(
    "%d of %d inputs done in %.1f s, %d skipped. Everything is in %s.",
    summary["done"],
    summary["inputs"],
    summary["seconds"],
    len(skipped),
    out,
  )
  return summary


def draw(picture: np.ndarray, result: predictions.Result, *, score_threshold: float = 0.3) -> np.ndarray:
  """A result over its input, uint8 [h, w, 3].

  Args:
    picture: the image [h, w, 3]; of a video its frames [t, h, w, 3].
  """
  match result:
    case predictions.Detections():
      return _draw_detections(picture, result.above(score_threshold))
    case predictions.LabelMap():
      factor = min(1.0, _LARGEST_PICTURE / 2 / max(picture.shape[:2]))
      small = tuple(max(1, round(side * factor)) for side in picture.shape[1::-1])
      labels = np.asarray(Image.fromarray(result.labels).resize(small, Image.Resampling.NEAREST))
      image = np.asarray(Image.fromarray(picture).resize(small, Image.Resampling.BILINEAR))
      comparison = visualize_semantic.LabelComparison(image, labels, None)
      return visualize_semantic.draw_label_comparisons(
        [comparison], result.class_names, panel_size=max(max(small), 320)
      )
    case predictions.ClassProbabilities():
      frames = picture if picture.ndim == 4 else picture[None]
      clip = clips.ClipPrediction(frames, result.probabilities, None)
      return clips.draw_strips([clip], result.class_names)


def _draw_detections(picture: np.ndarray, result: predictions.Detections) -> np.ndarray:
  """At most `_LARGEST_PICTURE` pixels on a side: masks are resized one at a time."""
  height, width = picture.shape[:2]
  factor = min(1.0, _LARGEST_PICTURE / max(height, width))
  small = max(1, round(width * factor)), max(1, round(height * factor))
  masks = None
  if result.segmentations is not None:
    masks = np.zeros((len(result), small[1], small[0]), bool)
    for index in range(len(result)):
      one = dataclasses.replace(
        result,
        boxes=result.boxes[[index]],
        scores=result.scores[[index]],
        labels=result.labels[[index]],
        segmentations=result.segmentations[index : index + 1],
      )
      masks[index] = np.asarray(Image.fromarray(one.masks()[0]).resize(small, Image.Resampling.NEAREST))
  scale = np.array([small[0] / width, small[1] / height] * 2)
  image = np.asarray(Image.fromarray(picture).resize(small, Image.Resampling.LANCZOS))
  return instances.draw_detections(
    image, result.boxes * scale, result.labels, result.scores, masks, result.class_names
  )


class _Writer(abc.ABC):
  """Writes what a head says of one input after the other."""

  def __init__(
    self, head: trained_head.TrainedHead, folder: pathlib.Path, pictures: bool, score_threshold: float
  ):
    self._head = head
    self._folder = folder
    self._pictures = pictures
    self._score_threshold = score_threshold
    self._rows: list[dict[str, Any]] = []

  def add(self, entry: inputs_lib.Input, picture: np.ndarray, result: predictions.Result) -> None:
    if self._pictures:
      path = self._path("pictures", entry, ".jpg")
      drawn = draw(picture, result, score_threshold=self._score_threshold)
      with atomic.open_aside(path, sync=False) as file:
        Image.fromarray(drawn).save(file, "JPEG", quality=90)
    self._add(entry, result)

  def _path(self, folder: str, entry: inputs_lib.Input, suffix: str) -> pathlib.Path:
    return self._folder / folder / f"{entry.name}{suffix}"

  @abc.abstractmethod
  def _add(self, entry: inputs_lib.Input, result: Any) -> None: ...

  @abc.abstractmethod
  def finish(self) -> None: ...


class _DetectionWriter(_Writer):
  def __init__(self, *arguments: Any):
    super().__init__(*arguments)
    self._images: list[dict[str, Any]] = []

  def _add(self, entry: inputs_lib.Input, result: predictions.Detections) -> None:
    image_id = len(self._images) + 1
    height, width = result.size
    self._images.append({"id": image_id, "file_name": entry.file_name, "height": height, "width": width})
    self._rows += result.coco_rows(image_id, [category["id"] for category in self._head.classes])

  def finish(self) -> None:
    atomic.write_json(self._folder / "detections.json", self._rows)
    atomic.write_json(
      self._folder / "images.json",
      {"images": self._images, "categories": list(self._head.classes), "annotations": []},
    )


class _LabelMapWriter(_Writer):
  def _add(self, entry: inputs_lib.Input, result: predictions.LabelMap) -> None:
    palette = [instances.class_color(index) for index in range(len(result.class_names))]
    path = self._path("label_maps", entry, ".png")
    atomic.write_bytes(path, label_maps.encode(result.labels, palette), sync=False)

  def finish(self) -> None:
    atomic.write_json(
      self._folder / "classes.json",
      [
        {"id": index, "name": name, "color": instances.class_color(index)}
        for index, name in enumerate(self._head.class_names)
      ],
      indent=1,
    )


class _ProbabilityWriter(_Writer):
  def _add(self, entry: inputs_lib.Input, result: predictions.ClassProbabilities) -> None:
    top = [{"class": name, "probability": round(p, 6)} for name, p in result.top(_TOP)]
    self._rows.append({"file": entry.file_name, "top": top})

  def finish(self) -> None:
    name = "actions.json" if self._head.media == "video" else "top_classes.json"
    atomic.write_json(self._folder / name, self._rows, indent=1)


_WRITERS: Mapping[type[trained_head.TrainedHead], type[_Writer]] = {
  trained_head.ActionHead: _ProbabilityWriter,
  trained_head.ClassificationHead: _ProbabilityWriter,
  trained_head.DetectionHead: _DetectionWriter,
  trained_head.SegmentationHead: _LabelMapWriter,
}


def _read_ahead(
  predictor: predict_lib.Predictor,
  media: str,
  inputs: Sequence[inputs_lib.Input],
  skipped: dict[pathlib.Path, str],
) -> Iterator[list[tuple[inputs_lib.Input, predict_lib.Example]]]:
  """Prepared inputs, as many as a batch has; the next ones are decoded meanwhile."""

  def prepare(entry: inputs_lib.Input) -> predict_lib.Example | images.FileError:
    try:
      return predictor.prepare(media, entry.path)
    except images.FileError as error:
      return error

  if not inputs:
    return
  size = predictor.chunk_size(media)
  with concurrent.futures.ThreadPoolExecutor(_DECODING_THREADS) as pool:
    waiting: collections.deque[tuple[inputs_lib.Input, concurrent.futures.Future]] = collections.deque()
    ready: list[tuple[inputs_lib.Input, predict_lib.Example]] = []
    left = iter(inputs)
    for entry in left:
      waiting.append((entry, pool.submit(prepare, entry)))
      if len(waiting) == 2 * size:
        break
    while waiting:
      entry, future = waiting.popleft()
      example = future.result()
      for following in left:
        waiting.append((following, pool.submit(prepare, following)))
        break
      if isinstance(example, images.FileError):
        _logger.warning("Skipped %s: %s", entry.path, example.reason)
        skipped[entry.path] = example.reason
      else:
        ready.append((entry, example))
      if len(ready) == size:
        yield ready
        ready = []
    if ready:
      yield ready


class _Progress:
  """A line now and then."""

  def __init__(self, total: int, media: str):
    self._total, self._media = total, media
    self._done = 0
    self._started = self._last = time.perf_counter()

  def done(self, count: int, skipped: int) -> None:
    self._done += count
    now = time.perf_counter()
    if now - self._last >= _SECONDS_BETWEEN_LINES or self._done + skipped == self._total:
      self._last = now
      _logger.info(
        "%d/%d %ss  %.2f %ss/s",
        self._done + skipped,
        self._total,
        self._media,
        self._done / max(now - self._started, 1e-9),
        self._media,
      )
