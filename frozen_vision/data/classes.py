"""Lists of class names: how `classes.json` is read, and in what two lists differ."""

from collections.abc import Mapping, Sequence
import os
import pathlib
from typing import Any

from frozen_vision.data import names, text_files

MAX_CLASSES = 100_000
# PASCAL VOC's, in the order in which its results are listed.
VOC = tuple(
  "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
  "pottedplant sheep sofa train tvmonitor".split()
)
_SHOWN = 5


def read_classes(path: str | os.PathLike[str]) -> list[str]:
  """The class names of a JSON list, in the order of their labels.

  Raises:
    TextError: unreadable, another kind of content, an empty name, or a name twice; names the file.
  """
  path = pathlib.Path(path)
  content = text_files.read_json(path)
  if not isinstance(content, list):
    raise text_files.TextError(f"{path} must hold a JSON list of class names; found a {_kind(content)}.")
  if not 1 <= len(content) <= MAX_CLASSES:
    raise text_files.TextError(f"{path} has {len(content)} class names; expected 1 to {MAX_CLASSES}.")
  for position, name in enumerate(content):
    if not isinstance(name, str) or not name.strip():
      raise text_files.TextError(
        f"{path} must hold a JSON list of class names; entry {position} is {str(name)[:60]!r}."
      )
  classes = [name.strip() for name in content]
  if len(set(classes)) < len(classes):
    twice = next(name for name in classes if classes.count(name) > 1)
    raise text_files.TextError(f"{path} names the class {twice!r} twice.")
  return classes


def find_classes(*folders: pathlib.Path) -> list[str] | None:
  """The class names of the first `classes.json` in these folders; None if there is none."""
  for folder in folders:
    if (folder / "classes.json").is_file():
      return read_classes(folder / "classes.json")
  return None


def numbers(labels: Sequence[str], classes: Sequence[str]) -> list[int | None]:
  """The position of each label among the classes, in any Unicode form; None for a label that is no class."""
  lookup, position = names.Lookup(classes), {name: number for number, name in enumerate(classes)}
  found = {label: position.get(lookup.find(label)) for label in set(labels)}
  return [found[label] for label in labels]


def difference(
  expected: Sequence[str | Mapping[str, Any]], found: Sequence[str | Mapping[str, Any]]
) -> str | None:
  """In what a class list differs from the expected one, as a clause; None where both are the same.

  Args:
    expected, found: in the order of labels: names, or objects with `name` and perhaps `id`, as checkpoints
      hold them. Ids are compared where both lists have them.
  """
  wanted, given = _names(expected), _names(found)
  if wanted != given:
    if sorted(wanted) == sorted(given):
      first = next(i for i, pair in enumerate(zip(wanted, given)) if pair[0] != pair[1])
      return (
        f"the same names in another order (class {first} is {given[first]!r}, expected {wanted[first]!r})"
      )
    parts = []
    for what, missing in (("lacks", set(wanted) - set(given)), ("adds", set(given) - set(wanted))):
      if missing:
        listed = ", ".join(repr(name) for name in sorted(missing)[:_SHOWN])
        parts.append(f"{what} {listed}{', ...' if len(missing) > _SHOWN else ''}")
    return f"{len(given)} classes in place of {len(wanted)}: it {' and '.join(parts) or 'repeats names'}"
  for position, (one, other) in enumerate(zip(expected, found)):
    ids = [entry.get("id") for entry in (one, other) if isinstance(entry, Mapping)]
    if len(ids) == 2 and None not in ids and ids[0] != ids[1]:
      return f"other ids (class {position}, {wanted[position]!r}, has the id {ids[1]}, expected {ids[0]})"
  return None


def _names(classes: Sequence[str | Mapping[str, Any]]) -> list[str]:
  return [entry if isinstance(entry, str) else str(entry["name"]) for entry in classes]


def _kind(value: Any) -> str:
  return {dict: "JSON object", str: "text"}.get(type(value), type(value).__name__)
