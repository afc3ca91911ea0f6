"""Labelled videos for action recognition: sources of them, several as one, and folds by group."""

from collections.abc import Sequence
import pathlib
from typing import Any

import numpy as np

from frozen_vision.data import findings, fingerprint


class VideoList:
  """Records of video files, decoded when a clip is cut out of them.

  Attributes:
    classes: class names; a label is a position in it.
    paths: the files.
    labels: int32 [n].
    groups: a name per file, such as the scene it was filmed in; empty strings where the list has none.
    findings: what checks of the videos counted.
  """

  def __init__(
    self,
    paths: Sequence[pathlib.Path],
    labels: Sequence[int],
    classes: Sequence[str],
    groups: Sequence[str] | None = None,
  ):
    self.classes = list(classes)
    self.paths = [str(path) for path in paths]
    self.labels = np.array(labels, np.int32)
    self.groups = list(groups) if groups else [""] * len(self.paths)
    self.findings = findings.Findings({})

  def __len__(self) -> int:
    return len(self.paths)

  def files(self) -> list[pathlib.Path]:
    """The file of every record; see `data.content`."""
    return [pathlib.Path(path) for path in self.paths]

  def identity(self) -> dict[str, Any]:
    """See `fingerprint.Identified`."""
    return {
      "file names": self.paths,
      "labels": self.labels,
      "groups": self.groups,
      "file sizes": fingerprint.file_sizes(self.files()),
    }

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The record {path, label: int32, name}."""
    return {"path": self.paths[index], "label": self.labels[index], "name": self.paths[index]}


class Selection:
  """Some records of one source, or of several of the same classes; attributes as `VideoList`'s."""

  def __init__(self, parts: Sequence[Any], indices: Sequence[int] | np.ndarray | None = None):
    """Positions count through all parts; by default all records, part after part."""
    self._parts = list(parts)
    lengths = [len(part) for part in parts]
    self._starts = np.cumsum([0, *lengths[:-1]])
    self._indices = np.asarray(range(sum(lengths)) if indices is None else indices, np.int64)

    def every(name):
      return [value for part in parts for value in getattr(part, name)]

    paths, groups = every("paths"), every("groups")
    self.classes = list(parts[0].classes)
    self.paths = [paths[i] for i in self._indices]
    self.groups = [groups[i] for i in self._indices]
    self.labels = np.array(every("labels"), np.int32)[self._indices]
    self.findings = findings.Findings({})
    for part in self._parts:
      if getattr(part, "findings", None) is not None:
        self.findings.merge(part.findings)

  def __len__(self) -> int:
    return len(self._indices)

  def identity(self) -> dict[str, Any]:
    """See `fingerprint.Identified`."""
    return {
      "file names": self.paths,
      "labels": self.labels,
      "groups": self.groups,
      "files": [fingerprint.of_source(part) for part in self._parts],
    }

  def __getitem__(self, index: int) -> dict[str, Any]:
    position = int(self._indices[index])
    part = int(np.searchsorted(self._starts, position, side="right")) - 1
    return self._parts[part][position - int(self._starts[part])]


def concatenate(lists: Sequence[Any]) -> Selection:
  """Several sources of labelled videos as one.

  Raises:
    ValueError: lists of different classes.
  """
  if any(part.classes != lists[0].classes for part in lists):
    raise ValueError(f"The lists have different classes: {[part.classes for part in lists]}.")
  return Selection(lists)


def split_fold(videos: Any, fold: int, num_folds: int) -> tuple[Selection, Selection]:
  """(training, validation) videos of one fold of a cross-validation; a group is never on both sides.

  A video without a group is one of its own.

  Groups go, the largest first, to the fold that has the fewest videos of their class, then the fewest videos.

  Raises:
    ValueError: a fold that does not exist, or fewer groups than folds.
  """
  groups: dict[str, list[int]] = {}
  for index, group in enumerate(videos.groups):
    groups.setdefault(group or videos.paths[index], []).append(index)
  if not 0 <= fold < num_folds or len(groups) < num_folds:
    raise ValueError(
      f"Fold {fold} of {num_folds} of {len(groups)} groups; expected a fold from 0 on, and as many groups "
      "as folds."
    )
  counts = np.zeros((num_folds, len(videos.classes)), np.int64)
  fold_of = np.zeros(len(videos), np.int64)
  for _, members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
    own = np.bincount(videos.labels[members], minlength=len(videos.classes))
    chosen = min(range(num_folds), key=lambda f: (counts[f, own.argmax()], counts[f].sum()))
    counts[chosen] += own
    fold_of[members] = chosen
  parts = [np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)]
  return tuple(Selection([videos], part) for part in parts)
