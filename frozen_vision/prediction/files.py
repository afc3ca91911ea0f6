"""Prediction on folders and files: finds them, reads them ahead, writes results, names what cannot be used.

What is written below the folder of results, for a head that is called HEAD:

    summary.json                  inputs, those that were skipped and why, heads and their backbone passes;
                                  written too where an error or Ctrl-C ends the program before the last input
    HEAD/pictures/NAME.jpg        results drawn over the input, at most 1600 pixels on a side
    HEAD/...                      as the writer of the task's results has it (`tasks.results`):
    HEAD/detections.json          of a detector: a list in COCO's results format
    HEAD/images.json              of a detector: COCO's `images` and `categories`, without annotations:
                                  COCO("images.json").loadRes("detections.json") has both
    HEAD/label_maps/NAME.png      of a segmenter: the class index of every pixel, at the image's size
    HEAD/classes.json             of a segmenter: name and colour of every index
    HEAD/normals/NAME.png         of a head of surface normals: x, y, z as 8-bit red, green, blue
    HEAD/depth/NAME.png           of a head of depth: millimetres, 16 bits
    HEAD/actions.json             of an action recogniser: the likeliest classes of every video
    HEAD/top_classes.json         of a classifier: the same of every image

Images have no ids of COCO's; they are numbered from 1 in the order of the inputs, and `file_name` says which
is which. NAME is the input's path below the folder that was given, without its ending, or with it where two
inputs would have the same name.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
import concurrent.futures
import errno
import logging
import os
import pathlib
import time
from typing import Any

import jax
from PIL import Image

from frozen_vision import failures
from frozen_vision.data import images
from frozen_vision.files import atomic, lock
from frozen_vision.prediction import inputs as inputs_lib
from frozen_vision.prediction import predictor as predict_lib
from frozen_vision.prediction import trained_head
from frozen_vision.tasks import results as results_lib

_logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0
_DECODING_THREADS = 4
# Errors of writing that concern the name of one file, and no other file.
_ERRORS_OF_NAMES = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)


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
  """Predicts on files, as `--mode=predict` does.

  Args:
    inputs: folders, files, or patterns such as `photos/*.jpg`.
    workdir: of a run whose head predicts, if there is one head.
    heads: several of them, each a workdir or NAME=WORKDIR.
    out: folder of results; None: `predictions` in the (first) workdir.
    backbone, image_size, best: see `predictor.Predictor`; image_size is (), (side,) or (height, width).

  Returns:
    The summary; see `predict_files`.

  Raises:
    FileNotFoundError: an input or a run that is not there.
    ValueError: no head, two of one name, or not a single input that could be used.
    OSError: as of `predict_files`.
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
    `passes`, `seconds`; in the file of a program that ended early also `stopped`, why.

  Raises:
    OSError: a full disk, for example; says what became of the results so far.
  """
  out = pathlib.Path(out)
  if jax.process_index() != 0:
    return _predict_files(predictor, inputs, out, pictures, score_threshold)
  with lock.hold(out / ".lock", f"predictions in {out}"):
    return _predict_files(predictor, inputs, out, pictures, score_threshold)


def _predict_files(
  predictor: predict_lib.Predictor,
  inputs: Sequence[inputs_lib.Input | str | os.PathLike],
  out: pathlib.Path,
  pictures: bool,
  score_threshold: float,
) -> dict[str, Any]:
  """`predict_files`, in a folder that nobody else writes to."""
  if not all(isinstance(entry, inputs_lib.Input) for entry in inputs):
    inputs = inputs_lib.find_inputs(inputs, exclude=out)
  results = _Results(predictor, inputs, out, score_threshold if pictures else None)
  try:
    for media in ("image", "video"):
      of_media = [entry for entry in inputs if entry.media == media]
      if of_media and not predictor.takes(media):
        _logger.warning("%d %ss are skipped: no head takes them.", len(of_media), media)
        results.skipped |= {entry.path: f"no head takes {media}s" for entry in of_media}
        continue
      progress, before = _Progress(len(of_media), media), len(results.skipped)
      for chunk in _read_ahead(predictor, media, of_media, results.skipped):
        done = results.add(chunk, predictor.run(media, [example for _, example in chunk]))
        progress.done(done, len(results.skipped) - before)
  except BaseException as error:  # Ctrl-C too: what was found so far is kept
    results.keep(error)
    raise
  return results.finish()


class _Results:
  """Results on their way to the disk.

  Attributes:
    skipped: why an input has none, by its path.
  """

  def __init__(
    self,
    predictor: predict_lib.Predictor,
    inputs: Sequence[inputs_lib.Input],
    out: pathlib.Path,
    score_threshold: float | None,
  ):
    """Writes nothing yet.

    Args:
      score_threshold: of the detections that are drawn; None draws no pictures. Others are those of
        `predict_files`.
    """
    self.skipped: dict[pathlib.Path, str] = {}
    self._predictor, self._inputs, self._out = predictor, inputs, out
    self._score_threshold = score_threshold
    self._started = time.perf_counter()
    self._done = 0
    self._pictures: list[pathlib.Path] = []
    self._writers = {
      name: head.task.result_type.writer(out / name, head.classes, head.media)
      for name, head in predictor.heads.items()
    }

  def add(
    self,
    examples: Sequence[tuple[inputs_lib.Input, predict_lib.Example]],
    results: Mapping[str, Sequence[results_lib.Result]],
  ) -> int:
    """Writes the results of a batch of inputs, and returns how many could be written.

    Raises:
      OSError: a disk that takes nothing more, with the path in its text.
    """
    before = self._done
    for index, (entry, example) in enumerate(examples):
      of_entry = {name: values[index] for name, values in results.items()}
      try:
        if self._score_threshold is not None:
          for name, result in of_entry.items():
            drawn = result.draw(example.picture, score_threshold=self._score_threshold)
            path = self._out / name / "pictures" / f"{entry.name}.jpg"
            with atomic.open_aside(path, sync=False) as file:
              Image.fromarray(drawn).save(file, "JPEG", quality=90)
            self._pictures.append(path)
        for name, result in of_entry.items():
          self._writers[name].add(entry.name, entry.file_name, result)
      except OSError as error:
        if error.errno not in _ERRORS_OF_NAMES:
          raise
        reason = f"its results cannot be written: {failures.sentence(error)}"
        _logger.warning("Skipped %s: %s", entry.path, reason)
        self.skipped[entry.path] = reason
      else:
        self._done += 1
    return self._done - before

  def finish(self, stopped: str = "") -> dict[str, Any]:
    """Writes what concerns all inputs together, and the summary, which is returned.

    Args:
      stopped: what ended the program before all inputs were looked at.
    """
    for name, head in self._predictor.heads.items():
      if any(entry.media == head.media for entry in self._inputs):
        self._writers[name].finish()
    summary = {
      "inputs": len(self._inputs),
      "done": self._done,
      "skipped": [
        {"file": str(entry.path), "reason": self.skipped[entry.path]}
        for entry in self._inputs
        if entry.path in self.skipped
      ],
      "heads": {
        name: {"workdir": head.workdir, "step": head.step, "task": head.config.task}
        for name, head in self._predictor.heads.items()
      },
      "passes": [one.describe() for one in self._predictor.passes],
      "seconds": round(time.perf_counter() - self._started, 2),
    } | ({"stopped": stopped} if stopped else {})
    atomic.write_json(self._out / "summary.json", summary, indent=1)
    if not stopped:
      _logger.info(
        "%d of %d inputs done in %.1f s, %d skipped. Everything is in %s.",
        summary["done"],
        summary["inputs"],
        summary["seconds"],
        len(self.skipped),
        self._out,
      )
    return summary

  def keep(self, error: BaseException) -> None:
    """Writes the results so far before `error` ends the program.

    On a full disk pictures make room for them, the newest first.

    Raises:
      OSError: what `error` says and what became of the results, if it is an OSError.
    """
    reason = failures.sentence(error) or type(error).__name__
    drawn = len(self._pictures)
    while True:
      try:
        self.finish(stopped=reason)
        kept = f"The results of {self._done} of {len(self._inputs)} inputs are in {self._out}"
        removed = drawn - len(self._pictures)
        kept += f"; {removed} of {drawn} pictures were removed to make room for them." if removed else "."
        break
      except OSError as second:
        if second.errno != errno.ENOSPC or not self._pictures:
          kept = f"The results so far could not be written: {failures.sentence(second)}"
          break
      kept_pictures = len(self._pictures) * 7 // 8
      for path in self._pictures[kept_pictures:]:
        path.unlink(missing_ok=True)
      del self._pictures[kept_pictures:]
    if isinstance(error, OSError):
      raise OSError(f"{reason} {kept} Free space there, or give another folder with --out=FOLDER.") from error
    _logger.warning("%s", kept)


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
