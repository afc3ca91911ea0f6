"""Opens labelled videos: a folder of class folders, or a list of paths and labels.

A list is one of

* a table (.csv, .tsv, .txt) whose first line names its columns: `path` and `label`, others are ignored;
* Kinetics' own table, with `label`, `youtube_id`, `time_start` and `time_end`, where the files have Kinetics'
  names: `ID_000010_000020.mp4`, in the folder itself or in one for each class;
* lines of a path and a label, separated by a comma, a tab or white space, the path in quotes if need be.

Labels are class names, or numbers from 0.
"""

from collections.abc import Sequence
import dataclasses
import os
import pathlib
import re

from frozen_vision import messages
from frozen_vision.data import classes as class_names
from frozen_vision.data import names as data_names
from frozen_vision.data import text_files
from frozen_vision.data.video import decoding, sources

_LISTS = (".csv", ".tsv", ".txt")
_KINETICS = ("youtube_id", "time_start", "time_end")
_KINETICS_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi")
_QUOTED = re.compile(r'"((?:[^"]|"")*)"[,;\s]\s*(.+)')


@dataclasses.dataclass(frozen=True)
class _Row:
  """A video of a list.

  Attributes:
    line: its number in the file, from 1.
    names: paths that it may have; the first is what errors call it.
  """

  line: int
  names: tuple[str, ...]
  label: str
  group: str = ""


def open_videos(
  path: str | os.PathLike[str],
  *,
  root: str | os.PathLike[str] = "",
  classes: Sequence[str] = (),
  group_column: str = "",
  keep_missing: bool = False,
  allow_outside: bool = False,
) -> sources.VideoList:
  """Opens the videos of a folder of class folders, or of a list; see the module.

  Args:
    path: the folder or list.
    root: what paths in a list are relative to; by default the list's folder, or the folder in it that has the
      list's name (`train/` beside `train.csv`).
    classes: class names in the order of their labels; by default those of `classes.json` in the folder or
      beside the list, else the folders' names, the labels' names in order, or "0", "1", ...
    group_column: column of a table that says which videos belong together.
    keep_missing: list files that are missing too; opening them is an error then.
    allow_outside: take paths in the list that are absolute or lead out of `root`.

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
    raise text_files.TextError(f"{path} is neither a folder nor a list ending in {', '.join(_LISTS)}.")
  rows = _read_list(path, group_column)
  for row in rows:
    data_names.require_inside(row.names[0], f"{path}, line {row.line},", allow_outside=allow_outside)
  known = list(classes) or class_names.find_classes(path.parent) or []
  labels, known = _number([row.label for row in rows], known, path)
  files = _find_files(rows, path, pathlib.Path(root) if root else None)
  missing = [] if keep_missing else [file for file in files if not os.path.isfile(file)]
  if missing:
    raise FileNotFoundError(
      f"{path} lists {len(files)} videos, {len(missing)} of which are missing, such as "
      f"{', '.join(map(str, missing[:3]))}. Give the folder that its paths are relative to, or take them "
      "out."
    )
  return sources.VideoList(files, labels, known, [row.group for row in rows])


def _find_files(rows: Sequence[_Row], path: pathlib.Path, root: pathlib.Path | None) -> list[pathlib.Path]:
  """The file of every row: the first of its names that exists, in any Unicode form; else its first name."""
  folder = root or path.parent
  inner = folder / path.stem
  if root is None and inner.is_dir():
    if not any(os.path.exists(folder / name) for row in rows for name in row.names):
      folder = inner
  below, files = data_names.Files(folder), []
  for row in rows:
    found = (below.find(name) for name in row.names)
    files.append(next((file for file in found if file is not None), folder / row.names[0]))
  return files


def _open_folder(path: pathlib.Path, classes: Sequence[str]) -> sources.VideoList:
  names = list(classes) or class_names.find_classes(path) or []
  found = [file for file in data_names.files_below(path) if file.suffix.lower() in decoding.SUFFIXES]
  loose = [file for file in found if file.parent == path]
  if loose or not found:
    what = f"{loose[0]} lies outside of any class folder" if loose else "there are no videos"
    raise ValueError(
      f"{path}: {what}; expected CLASS/VIDEO with one of the endings {', '.join(sorted(decoding.SUFFIXES))}."
    )
  labels, names = _number([file.relative_to(path).parts[0] for file in found], names, path, are_names=True)
  return sources.VideoList(found, labels, names)


def _read_list(path: pathlib.Path, group_column: str) -> list[_Row]:
  rows = _read_table(path, group_column)
  if rows is None:
    if group_column:
      raise text_files.TextError(f"{path} has no line of column names, so no column {group_column!r}.")
    rows = [_read_line(path, number, line) for number, line in text_files.read_lines(path)]
  if not rows:
    raise text_files.TextError(f"{path} lists no video.")
  return rows


def _read_table(path: pathlib.Path, group_column: str) -> list[_Row] | None:
  """The rows of a table; None where the first line names neither our columns nor Kinetics'."""
  table = text_files.read_table(path, ["path", "label"])
  is_kinetics = table is None
  if is_kinetics:
    table = text_files.read_table(path, _KINETICS)
    if table is not None and "label" not in table.columns:
      raise text_files.TextError(
        f"{path} has Kinetics' columns without `label`, as the list of its test set has them; expected a "
        "list with labels."
      )
  if table is None:
    return None
  group_column = group_column.strip().casefold()
  if group_column and group_column not in table.columns:
    raise text_files.TextError(
      f"{path} has no column {group_column!r}; its columns are {list(table.columns)}."
    )
  rows = []
  for row in table.rows:
    label, group = row.cells["label"], row.cells[group_column] if group_column else ""
    names = _kinetics_names(path, row) if is_kinetics else (row.cells["path"],)
    if not names[0] or not label:
      raise text_files.TextError(f"{path}, line {row.line}: path or label is empty.")
    rows.append(_Row(row.line, names, label, group))
  return rows


def _kinetics_names(path: pathlib.Path, row: text_files.Row) -> tuple[str, ...]:
  """Possible paths of a video of Kinetics: alone, below its class, or below its split."""
  identity, label, split = row.cells["youtube_id"], row.cells["label"], row.cells.get("split", "")
  seconds = [text_files.whole_number(row.cells[key], 0, 999_999) for key in ("time_start", "time_end")]
  if not identity or None in seconds:
    raise text_files.TextError(
      f"{path}, line {row.line}: youtube_id is {identity!r}, time_start {row.cells['time_start']!r}, "
      f"time_end {row.cells['time_end']!r}; expected an id and whole seconds, which make the file's name: "
      "ID_000010_000020.mp4."
    )
  start, end = seconds
  folders = ["", label, label.replace(" ", "_")]
  folders += [f"{split}/{folder}" for folder in folders if split]
  stem = f"{identity}_{start:06d}_{end:06d}"
  return tuple(
    "/".join(part for part in (*folder.split("/"), stem + suffix) if part)
    for suffix in _KINETICS_SUFFIXES
    for folder in dict.fromkeys(folders)
  )


def _read_line(path: pathlib.Path, number: int, line: str) -> _Row:
  quoted = _QUOTED.fullmatch(line)
  if quoted:
    parts = [quoted[1].replace('""', '"'), quoted[2]]
  else:
    # The label is last, since paths may hold spaces and commas.
    separator = next((mark for mark in ("\t", ",") if mark in line), None)
    parts = line.rsplit(separator, 1)
  parts = [part.strip() for part in parts]
  label = text_files.unquoted(parts[-1])
  if len(parts) != 2 or not parts[0] or not label or '"' in label:
    raise text_files.TextError(f"{path}, line {number}: expected a path and a label, found {line[:100]!r}.")
  return _Row(number, (parts[0],), label)


def _number(
  labels: Sequence[str], classes: list[str], where: pathlib.Path, *, are_names: bool = False
) -> tuple[list[int], list[str]]:
  """Labels as numbers, and the classes.

  Raises:
    TextError: a label that no class has; names it.
  """
  if not are_names and all(label.isascii() and label.isdigit() for label in labels):
    return _number_digits(labels, classes, where)
  classes = classes or sorted(set(labels))
  if len(classes) > class_names.MAX_CLASSES:
    raise text_files.TextError(
      f"{where} has {len(classes)} different labels; expected at most {class_names.MAX_CLASSES}."
    )
  found = class_names.numbers(labels, classes)
  unknown = sorted({label for label, number in zip(labels, found) if number is None})
  if unknown:
    raise text_files.TextError(
      f"{where} has the labels {[label[:60] for label in unknown[:5]]}, which the {len(classes)} classes do "
      f"not name: {classes[:10]}{messages.did_you_mean(unknown[0], classes)}"
    )
  return found, classes


def _number_digits(
  labels: Sequence[str], classes: list[str], where: pathlib.Path
) -> tuple[list[int], list[str]]:
  known = len(classes) or class_names.MAX_CLASSES
  numbers = [text_files.whole_number(label, 0, known - 1) for label in labels]
  if None in numbers:
    label = labels[numbers.index(None)][:60]
    expected = f"there are {known} classes" if classes else f"expected less than {known}"
    raise text_files.TextError(f"{where} has the label {label}, but {expected}.")
  return numbers, classes or [str(number) for number in range(max(numbers) + 1)]
