"""Looks at images and label maps before a run begins: which cannot be read, and which classes occur.

All images are looked at (`image_checks`). Label maps are decoded: all of them, or of a large set some that
are evenly spaced, and then more until every class has been seen.
"""

from collections.abc import Iterable, Iterator
import concurrent.futures
import dataclasses

from jaxtyping import Int
import numpy as np

from frozen_vision.data import findings, image_checks, images
from frozen_vision.data.segmentation import sources

# Label maps that are decoded in any case; some milliseconds each.
_ENOUGH = 2000
_THREADS = 16
_STEP = 256
KINDS = {
  "image_unreadable": findings.Kind("images that cannot be read: dropped", "images"),
  "label_unreadable": findings.Kind("label images that cannot be used: image dropped", "images"),
  "unknown_label": findings.Kind(
    "pixels with a label that is in no list: ignored",
    "pixels",
    advice="Add the label to the class list, or name it with --config.segmentation.ignore.",
  ),
  "class_absent": findings.Kind("classes without a pixel in any label map", "classes", dropped=False),
}


@dataclasses.dataclass(frozen=True)
class _Found:
  """The statistics of one label map; `counts` are the pixels of every class index."""

  index: int
  counts: Int[np.ndarray, "256"]
  unknown: dict[str, int]
  error: images.FileError | None = None


def survey(source: sources.LabelledImages, *, absent_classes: bool = True) -> sources.LabelledImages:
  """The source without what cannot be read; its findings say what that is, and which classes never occur.

  Args:
    absent_classes: report classes without a pixel, as training wants.
  """
  found = findings.Findings(KINDS)
  found.saw("images", len(source))
  bad = _bad_images(source, found)
  labelled = [i for i in range(len(source)) if i not in bad and source.label_path(i) is not None]
  first, rest = labelled, []
  if len(labelled) > _ENOUGH:
    chosen = np.linspace(0, len(labelled) - 1, _ENOUGH).round().astype(int)
    first = [labelled[i] for i in chosen]
    rest = sorted(set(labelled) - set(first))
  counts, looked_at = np.zeros(256, np.int64), 0
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    for one in _look(source, first, rest, pool):
      looked_at += 1
      if one.error is not None:
        bad.add(one.index)
        found.add("label_unreadable", str(one.error))
        continue
      counts += one.counts
      found.saw("pixels", int(one.counts.sum()))
      for label, number in one.unknown.items():
        found.add("unknown_label", f"{number} of label {label} in {source.name(one.index)}", number)
      if looked_at >= len(first) and np.all(counts[: source.num_classes]):
        break
  if looked_at < len(labelled):
    found.notes.append(f"{looked_at:,} of {len(labelled):,} label maps were looked at")
  if absent_classes and labelled:
    found.saw("classes", source.num_classes)
    for index in np.flatnonzero(counts[: source.num_classes] == 0):
      found.add("class_absent", source.class_names[index])
  source = source.take([i for i in range(len(source)) if i not in bad])
  source.findings.merge(found)
  return source


def _bad_images(source: sources.LabelledImages, found: findings.Findings) -> set[int]:
  """Positions of the images that cannot be read, which are counted."""
  names = [source.name(i) for i in range(len(source))]
  errors = image_checks.check_files((source.image_path(i) for i in range(len(source))), names)
  return set(range(len(source))) - set(found.add_errors("image_unreadable", errors))


def _look(
  source: sources.LabelledImages,
  first: Iterable[int],
  rest: list[int],
  pool: concurrent.futures.Executor,
) -> Iterator[_Found]:
  """Decodes the label maps in order, those of `rest` some at a time, so that looking can end early."""

  def look(index: int) -> _Found:
    try:
      label, unknown = source.label_counting(index)
    except images.FileError as error:
      return _Found(index, np.zeros(256, np.int64), {}, error)
    return _Found(index, np.bincount(label.ravel(), minlength=256), unknown)

  yield from pool.map(look, first)
  for start in range(0, len(rest), _STEP):
    yield from pool.map(look, rest[start : start + _STEP])
