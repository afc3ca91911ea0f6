"""Reads class lists of label images, and the segments of COCO's panoptic format.

A class list is one of

* a text file with a name per line;
* a table (.csv, .tsv) with the column `name`, and perhaps `value` or `id`, and `color` or `r`, `g`, `b`;
* a JSON list of names, or of objects `{"name": ..., "value": pixel value, "color": [r, g, b] or "#rrggbb"}`;
* JSON with such a list as `classes`, and perhaps `ignore_index`;
* COCO's JSON with `categories`: `id` is the pixel value, 0 is ignored (COCO's "unlabelled"), and the colours,
  which COCO has for the eye, are not read.

Without values a class's position is its value. 255 is ignored, unless it is the value of a class. A class
whose value is named as ignored is left out of the list.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import os
import pathlib
import re
from typing import Any

from frozen_vision.data import text_files
from frozen_vision.data.segmentation import label_maps
from frozen_vision.messages import short

_MAX_VALUE = 2**16 - 1
_MAX_SEGMENT = 2**24 - 1  # three bytes
_HEX = re.compile(r"#?([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})")
_TABLES = (".csv", ".tsv")


@dataclasses.dataclass(frozen=True)
class _Entry:
  """A class as the file has it; `where` names its place in the file."""

  where: str
  name: Any
  value: Any = None
  colour: Any = None


def read_format(
  path: str | os.PathLike[str],
  *,
  ignored: Sequence[int] = (),
  unknown: str = "error",
) -> label_maps.LabelFormat:
  """Reads the class list of a file; see the module for the kinds.

  Args:
    ignored: more pixel values to ignore.
    unknown: of `LabelFormat`.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not such a list; names the file and what is wrong with it.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist; expected a class list (.txt, .csv or .json).")
  explicitly_ignored = {int(value) for value in ignored}
  if path.suffix.lower() == ".json":
    entries, ignored_by_file = _json_entries(path)
    explicitly_ignored |= ignored_by_file
  else:
    entries = _table_entries(path) if path.suffix.lower() in _TABLES else None
    if entries is None:
      lines = text_files.read_lines(path)
      entries = [_Entry(f"line {number}", text_files.unquoted(line)) for number, line in lines]
  if not entries:
    raise text_files.TextError(f"{path}: lists no class.")
  return _label_format(entries, explicitly_ignored, unknown, path)


def _json_entries(path: pathlib.Path) -> tuple[list[_Entry], set[int]]:
  """The classes of a JSON file, and the pixel values that it says are ignored."""
  content = text_files.read_json(path)
  match content:
    case list():
      return [_json_entry(f"entry {position}", entry) for position, entry in enumerate(content)], set()
    case {"classes": list(entries)}:
      ignored = set()
      if content.get("ignore_index") is not None:
        value = text_files.whole_number(content["ignore_index"], -_MAX_VALUE, _MAX_VALUE)
        if value is None:
          raise text_files.TextError(
            f"{path}: ignore_index is {short(content['ignore_index'])}; expected a pixel value."
          )
        ignored.add(value)
      return [_json_entry(f"class {position}", entry) for position, entry in enumerate(entries)], ignored
    case {"categories": list(categories)}:
      found = []
      for position, category in enumerate(categories):
        if not isinstance(category, dict) or "id" not in category:
          raise text_files.TextError(f"{path}: category {position} is {short(category)}; expected an `id`.")
        where = f"category {position} (id {short(category['id'])})"
        found.append(_Entry(where, category.get("name"), category["id"]))
      return found, {0} - {entry.value for entry in found if isinstance(entry.value, int)}
    case _:
      raise text_files.TextError(
        f"{path} is no class list; expected a JSON list of names, or an object with `classes` or "
        "`categories`."
      )


def _json_entry(where: str, entry: Any) -> _Entry:
  if isinstance(entry, dict):
    return _Entry(where, entry.get("name"), entry.get("value"), entry.get("color"))
  return _Entry(where, entry)


def _table_entries(path: pathlib.Path) -> list[_Entry] | None:
  """The classes of a table, None where its first line does not name the column `name`."""
  table = text_files.read_table(path, ["name"])
  if table is None:
    return None
  value = next((column for column in ("value", "id") if column in table.columns), None)
  colour = next((column for column in ("color", "colour") if column in table.columns), None)
  entries = []
  for row in table.rows:
    colours = row.cells[colour] if colour else None
    if colour is None and {"r", "g", "b"} <= set(table.columns):
      colours = [row.cells[channel] for channel in ("r", "g", "b")]
    entries.append(
      _Entry(f"line {row.line}", row.cells["name"], row.cells[value] if value else None, colours)
    )
  return entries


def _label_format(
  entries: Sequence[_Entry], ignored: set[int], unknown: str, path: pathlib.Path
) -> label_maps.LabelFormat:
  """The format of checked entries, without the classes whose value is ignored."""
  names = [_name(entry, path) for entry in entries]
  values = [_value(entry, position, path) for position, entry in enumerate(entries)]
  colours = [_colour(entry, path) for entry in entries]
  coloured = [colour is not None for colour in colours]
  if any(coloured) and not all(coloured):
    raise text_files.TextError(
      f"{path}: {names[coloured.index(False)]!r} has no color, though others have one."
    )
  if label_maps.IGNORE not in values:
    ignored = ignored | {label_maps.IGNORE}
  kept = [i for i, value in enumerate(values) if value not in ignored]
  dropped = [i for i, value in enumerate(values) if value in ignored]
  try:
    return label_maps.LabelFormat(
      class_names=tuple(names[i] for i in kept),
      values=tuple(values[i] for i in kept),
      colours=tuple(colours[i] for i in kept) if any(coloured) else None,
      ignored=tuple(sorted(ignored)),
      unknown=unknown,
      ignored_colours=tuple(colours[i] for i in dropped) if any(coloured) else (),
    )
  except ValueError as error:
    raise text_files.TextError(f"{path}: {error}") from error


def _name(entry: _Entry, path: pathlib.Path) -> str:
  name = entry.name.strip() if isinstance(entry.name, str) else None
  if not name:
    found = "has no name" if entry.name is None or entry.name == "" else f"is {short(entry.name)}"
    raise text_files.TextError(f"{path}: {entry.where} {found}; expected a name, or an object with `name`.")
  return name


def _value(entry: _Entry, position: int, path: pathlib.Path) -> int:
  if entry.value is None:
    return position
  value = text_files.whole_number(entry.value, 0, _MAX_VALUE)
  if value is None:
    raise text_files.TextError(
      f"{path}: {entry.where} ({short(entry.name)}) has the pixel value {short(entry.value)}; expected a "
      f"whole number from 0 to {_MAX_VALUE}."
    )
  return value


def _colour(entry: _Entry, path: pathlib.Path) -> label_maps.Rgb | None:
  if entry.colour is None:
    return None
  channels: Sequence[Any] = entry.colour if isinstance(entry.colour, list) else ()
  if isinstance(entry.colour, str):
    match = _HEX.fullmatch(entry.colour.strip())
    channels = [int(part, 16) for part in match.groups()] if match else ()
  numbers = [text_files.whole_number(channel, 0, 255) for channel in channels]
  if len(numbers) != 3 or None in numbers:
    raise text_files.TextError(
      f"{path}: {entry.where} ({short(entry.name)}) has the color {short(entry.colour)}; expected "
      '[r, g, b] of whole numbers from 0 to 255, or "#rrggbb".'
    )
  red, green, blue = numbers
  return red, green, blue


def read_segments(path: str | os.PathLike[str]) -> dict[str, dict[int, int]]:
  """{label file name: {segment id: category id}} of a COCO panoptic JSON.

  Raises:
    FileNotFoundError, ValueError: no such file, or not such a JSON.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist; expected a COCO panoptic JSON.")
  content = text_files.read_json(path, max_bytes=2**32)
  annotations = content.get("annotations") if isinstance(content, dict) else None
  if not isinstance(annotations, list):
    raise text_files.TextError(
      f"{path} is no COCO panoptic JSON; expected `annotations`, a list of objects with `file_name` and "
      "`segments_info`."
    )
  return dict(_segments_of(annotation, position, path) for position, annotation in enumerate(annotations))


def _segments_of(annotation: Any, position: int, path: pathlib.Path) -> tuple[str, dict[int, int]]:
  match annotation:
    case {"file_name": str(name), "segments_info": list(segments)} if all(
      isinstance(s, Mapping) for s in segments
    ):
      pairs = [
        (
          text_files.whole_number(segment.get("id"), 0, _MAX_SEGMENT),
          text_files.whole_number(segment.get("category_id"), 0, 2**62),
        )
        for segment in segments
      ]
      if not any(None in pair for pair in pairs):
        return name, dict(pairs)
  raise text_files.TextError(
    f"{path} is no COCO panoptic JSON: annotation {position} is {short(annotation)}; expected `file_name`, "
    "and `segments_info` with whole numbers as `id` and `category_id`."
  )
