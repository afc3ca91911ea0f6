"""Labelled videos for action recognition: a folder per class, or a list of paths and labels."""

from collections.abc import Sequence
import csv
import json
import pathlib
from typing import Any

import numpy as np

from frozen_vision.data.video import decoding

_LISTS = (".csv", ".txt")


class VideoList:
  """Records of video files, decoded when a clip is cut out of them.

  Attributes:
    classes: class names; a label is a position in it.
    paths: the files.
    labels: int32 [n].
    groups: a name per file, such as the scene it was filmed in; empty strings where the list has none.
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

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The record {path, label: int32, name}."""
    return {"path": self.paths[index], "label": self.labels[index], "name": self.paths[index]}


class Selection:
  """Some records of one source, or of several of the same classes; attributes as `VideoList`'s."""

  def __init__(self, parts: Sequence[Any], indices: Sequence[int] | None = None):
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

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> dict[str, Any]:
    position = int(self._indices[index])
    part = int(np.searchsorted(self._starts, position, side="right")) - 1
    return self._parts[part][position - int(self._starts[part])]


def open_videos(
  path: str | pathlib.Path,
  *,
  root: str | pathlib.Path = "",
  classes: Sequence[str] = (),
  group_column: str = "",
  keep_missing: bool = False,
) -> VideoList:
  """The videos of a folder of class folders, or of a list.

  Lists are `.csv` files whose first line names the columns (`path` and `label`; others are ignored), or text
  files with a path and a label per line, separated by white space or a comma, without such a line. Labels are
  class names, or numbers from 0.

  Args:
    path: the folder or list.
    root: what paths in a list are relative to; by default the list's folder, or the folder in it that has the
      list's name (`train/` beside `train.csv`).
    classes: class names in the order of their labels; by default those of `classes.json` in the folder or
      beside the list, else the folders' names, the labels' names in order, or "0", "1", ...
    group_column: column of a `.csv` file that says which videos belong together.
    keep_missing: list files that are missing too; opening them is an error then.

  Raises:
    FileNotFoundError: no such folder or list, or listed files that are missing; the first are named.
    ValueError: a list that cannot be read, with its line; labels that do not fit the classes.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise FileNotFoundError(
      f"{path} does not exist; expected a folder of class folders, or a .csv or .txt list."
    )
  if path.is_dir():
    return _open_folder(path, classes)
  if path.suffix.lower() not in _LISTS:
    raise ValueError(f"{path} is neither a folder nor a list ending in {' or '.join(_LISTS)}.")
  rows = _read_list(path, group_column)
  names, labels, groups = zip(*rows)
  labels, classes = _number(labels, list(classes) or _read_classes(path.parent), path)
  folder = pathlib.Path(root) if root else path.parent
  if not root and (folder / path.stem).is_dir() and not any((folder / name).exists() for name in names):
    folder = folder / path.stem
  files = [folder / name for name in names]
  missing = [] if keep_missing else [file for file in files if not file.is_file()]
  if missing:
    raise FileNotFoundError(
      f"{path} lists {len(files)} videos, {len(missing)} of which are missing, such as "
      f"{', '.join(map(str, missing[:3]))}. Give the folder that its paths are relative to, or take them "
      "out."
    )
  return VideoList(files, labels, classes, groups)


def _open_folder(path: pathlib.Path, classes: Sequence[str]) -> VideoList:
  names = list(classes) or _read_classes(path)
  found = sorted(
    file
    for file in path.rglob("*")
    if file.suffix.lower() in decoding.SUFFIXES
    and file.is_file()
    and not any(part.startswith(".") for part in file.relative_to(path).parts)
  )
  loose = [file for file in found if file.parent == path]
  if loose or not found:
    what = f"{loose[0]} lies outside of any class folder" if loose else "there are no videos"
    raise ValueError(
      f"{path}: {what}; expected CLASS/VIDEO with one of the endings {', '.join(sorted(decoding.SUFFIXES))}."
    )
  labels, names = _number([file.relative_to(path).parts[0] for file in found], names, path, are_names=True)
  return VideoList(found, labels, names)


def _read_list(path: pathlib.Path, group_column: str) -> list[tuple[str, str, str]]:
  """(path, label, group) of every line."""
  text = path.read_text(encoding="utf-8-sig")
  first = text.lstrip().splitlines()[0].split(",") if text.strip() else []
  if path.suffix.lower() == ".csv" and {"path", "label"} <= {name.strip() for name in first}:
    lines = csv.DictReader(text.splitlines(), skipinitialspace=True)
    columns = lines.fieldnames or []
    if group_column and group_column not in columns:
      raise ValueError(f"{path} has no column {group_column!r}; its columns are {columns}.")
    rows = [(row["path"], row["label"], row[group_column] if group_column else "") for row in lines]
    broken = next((i for i, row in enumerate(rows) if not row[0] or not row[1]), None)
    if broken is not None:
      raise ValueError(f"{path}, record {broken + 1}: path or label is empty.")
  else:
    if group_column:
      raise ValueError(f"{path} has no line of column names, so no column {group_column!r}.")
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
      if not line.strip():
        continue
      # The label is last, since paths may hold spaces.
      parts = line.strip().rsplit(",", 1) if "," in line else line.strip().rsplit(None, 1)
      if len(parts) != 2 or not all(part.strip() for part in parts):
        raise ValueError(f"{path}, line {number}: expected a path and a label, found {line!r}.")
      rows.append((parts[0].strip(), parts[1].strip(), ""))
  if not rows:
    raise ValueError(f"{path} lists no video.")
  return rows


def _read_classes(folder: pathlib.Path) -> list[str]:
  file = folder / "classes.json"
  if not file.is_file():
    return []
  classes = json.loads(file.read_text())
  if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
    raise ValueError(f"{file} must hold a JSON list of class names.")
  return classes


def _number(
  labels: Sequence[str], classes: list[str], where: pathlib.Path, *, are_names: bool = False
) -> tuple[list[int], list[str]]:
  """Labels as numbers, and the classes."""
  if not are_names and all(label.isdecimal() for label in labels):
    numbers = [int(label) for label in labels]
    classes = classes or [str(number) for number in range(max(numbers) + 1)]
    if max(numbers) >= len(classes):
      raise ValueError(f"{where} has the label {max(numbers)}, but there are {len(classes)} classes.")
    return numbers, classes
  classes = classes or sorted(set(labels))
  unknown = sorted(set(labels) - set(classes))
  if unknown:
    raise ValueError(
      f"{where} has the labels {unknown[:5]}, which the {len(classes)} classes do not name: {classes[:10]}."
    )
  position = {name: number for number, name in enumerate(classes)}
  return [position[label] for label in labels], classes


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
