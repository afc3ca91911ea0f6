"""Reads text files that people export: class lists, lists of videos and JSON.

Reads UTF-8 and UTF-16 with and without a byte order mark, any line ends, tables with commas, semicolons or
tabs, quotes, spaces around cells, and R's row names. Everything else is one `TextError` that names the file
and, where there is one, the line.
"""

import codecs
from collections.abc import Collection, Mapping, Sequence
import csv
import dataclasses
import json
import os
import pathlib
import re
from typing import Any

# Far above any list of names or videos; annotations have a limit of their own.
MAX_BYTES = 2**28
_BOMS = (  # UTF-32's little-endian mark begins with UTF-16's
  (codecs.BOM_UTF8, "utf-8"),
  (codecs.BOM_UTF32_LE, "utf-32-le"),
  (codecs.BOM_UTF32_BE, "utf-32-be"),
  (codecs.BOM_UTF16_LE, "utf-16-le"),
  (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_DELIMITERS = (",", ";", "\t")
_LINE_END = re.compile(r"\r\n|\r|\n")


class TextError(ValueError):
  """A text file that cannot be used; the message names it."""


def read_text(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> str:
  """The text of a file, with `\\n` as its only line end and without a byte order mark.

  Raises:
    TextError: unreadable, larger than `max_bytes`, or in another encoding than UTF-8 or UTF-16.
  """
  path = pathlib.Path(path)
  try:
    size = path.stat().st_size
    if not path.is_file():
      raise TextError(f"{path} is no file; expected a text file.")
    if size > max_bytes:
      raise TextError(f"{path} has {size} bytes, more than the {max_bytes} that such a file may have.")
    data = path.read_bytes()
  except OSError as error:
    raise TextError(f"{path} cannot be read ({error.strerror}).") from error
  return _LINE_END.sub("\n", _decode(data, path))


def _decode(data: bytes, path: pathlib.Path) -> str:
  for mark, encoding in _BOMS:
    if data.startswith(mark):
      data = data[len(mark) :]
      break
  else:
    encoding = _without_mark(data)
  try:
    text = data.decode(encoding)
  except UnicodeDecodeError as error:
    before = data[: error.start]
    line = before.count("\n".encode(encoding)) + 1
    if encoding != "utf-8":
      raise TextError(f"{path}, line {line}: is damaged {encoding.upper()} ({error.reason}).") from error
    byte = data[error.start : error.start + 1]
    try:
      character, name = byte.decode("cp1252"), "Latin-1 (Windows-1252)"
    except UnicodeDecodeError:
      character, name = byte.decode("latin-1"), "Latin-1"
    raise TextError(
      f"{path}, line {line}: is not UTF-8, since it has the byte 0x{byte.hex()}, which is {character!r} in "
      f"{name}. Save it as UTF-8: iconv -f WINDOWS-1252 -t UTF-8 {path.name} > NEW"
    ) from error
  if "\0" in text:
    line = text.count("\n", 0, text.index("\0")) + 1
    raise TextError(f"{path}, line {line}: has a zero byte; expected a text file.")
  return text


def _without_mark(data: bytes) -> str:
  """UTF-16 of mostly Latin letters has a zero in every other byte."""
  start = data[:1000]
  if len(data) % 2 == 0 and start:
    if start[1::2].count(0) > len(start) / 3 and 0 not in start[::2]:
      return "utf-16-le"
    if start[::2].count(0) > len(start) / 3 and 0 not in start[1::2]:
      return "utf-16-be"
  return "utf-8"


def read_lines(path: str | os.PathLike[str]) -> list[tuple[int, str]]:
  """(number from 1, content without surrounding spaces) of every line that is not empty."""
  lines = enumerate(read_text(path).split("\n"), 1)
  return [(number, line.strip()) for number, line in lines if line.strip()]


def unquoted(text: str) -> str:
  """The text without surrounding spaces and quotes, doubled quotes inside as one."""
  text = text.strip()
  if len(text) > 1 and text[0] == text[-1] == '"':
    text = text[1:-1].replace('""', '"').strip()
  return text


def read_json(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> Any:
  """The content of a JSON file.

  Raises:
    TextError: as `read_text`, or no JSON; says the line and column.
  """
  text = read_text(path, max_bytes=max_bytes)
  try:
    return json.loads(text)
  except json.JSONDecodeError as error:
    raise TextError(
      f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})."
    ) from error
  except RecursionError as error:
    raise TextError(f"{path}: not valid JSON (nested too deeply).") from error
  except ValueError as error:  # a number of more digits than Python reads
    raise TextError(f"{path}: not valid JSON ({error}).") from error


def whole_number(value: Any, low: int, high: int) -> int | None:
  """The whole number in low..high that a value of JSON or a cell of a table is; None for anything else."""
  if isinstance(value, str):
    value = value.strip()
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", value, re.ASCII):
      return None
    value = int(value)
  if isinstance(value, bool) or not isinstance(value, int | float):
    return None
  if not low <= value <= high or value != int(value):  # NaN and infinities fail the first
    return None
  return int(value)


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of a table.

  Attributes:
    line: the number of its first line in the file, from 1.
    cells: {column: content without surrounding spaces}.
  """

  line: int
  cells: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Table:
  """A table whose first line names its columns."""

  columns: tuple[str, ...]
  rows: tuple[Row, ...]


def read_table(path: str | os.PathLike[str], required: Collection[str]) -> Table | None:
  """The table in a file, or None where its first line does not name the required columns.

  Column names are compared without regard to case and surrounding spaces; R's row names, with and without a
  name of their own, are left out.

  Raises:
    TextError: as `read_text`; quotes that do not close; a row of more cells than there are columns.
  """
  path = pathlib.Path(path)
  lines = read_text(path).split("\n")
  first = next((number for number, line in enumerate(lines) if line.strip()), None)
  if first is None:
    return None
  required = {name.casefold() for name in required}
  for delimiter in _DELIMITERS:
    try:
      header = [cell.strip().casefold() for cell in next(csv.reader([lines[first]], delimiter=delimiter))]
    except (csv.Error, StopIteration):
      continue
    if required <= set(header):
      return _table(path, lines, first, tuple(header), delimiter)
  return None


def _table(
  path: pathlib.Path, lines: Sequence[str], first: int, columns: tuple[str, ...], delimiter: str
) -> Table:
  twice = sorted({name for name in columns if name and columns.count(name) > 1})
  if twice:
    raise TextError(f"{path}, line {first + 1}: names the column {twice[0]!r} twice.")
  content = (f"{line}\n" for line in lines[first + 1 :])
  reader = csv.reader(content, delimiter=delimiter, skipinitialspace=True, strict=True)
  found, line = [], first + 2
  try:
    for cells in reader:
      if any(cell.strip() for cell in cells):
        found.append((line, [cell.strip() for cell in cells]))
      line = first + 2 + reader.line_num
  except csv.Error as error:
    raise TextError(f"{path}, line {line}: cannot be read ({error}).") from error
  if found and all(len(cells) == len(columns) + 1 for _, cells in found):
    found = [(line, cells[1:]) for line, cells in found]  # R's row names, which have no column name
  for line, cells in found:
    if len(cells) > len(columns):
      raise TextError(
        f"{path}, line {line}: has {len(cells)} cells, and the first line names {len(columns)} columns; put "
        "names that hold commas in quotes."
      )
  rows = (Row(line, dict(zip(columns, cells + [""] * len(columns)))) for line, cells in found)
  return Table(columns, tuple(rows))
