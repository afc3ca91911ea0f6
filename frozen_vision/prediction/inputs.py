"""Finds the files to predict on: folders, files and patterns become one list, each file with a name."""

import collections
from collections.abc import Iterable, Mapping
import dataclasses
import logging
import os
import pathlib

from frozen_vision.data import images, names
from frozen_vision.data.video import decoding

_logger = logging.getLogger(__name__)

_SUFFIXES = images.SUFFIXES | decoding.SUFFIXES
_WILDCARDS = frozenset("*?[")


@dataclasses.dataclass(frozen=True)
class Input:
  """A file to predict on.

  Attributes:
    path: where it is.
    file_name: how results name the file: its path below the folder that was given.
    name: what pictures and label maps are called, a relative path without ending (`names.output_name`).
    media: "image" or "video".
  """

  path: pathlib.Path
  file_name: str
  name: str
  media: str


def find_inputs(inputs: Iterable[str | os.PathLike], *, exclude: pathlib.Path | None = None) -> list[Input]:
  """Lists the images and videos below folders, and single files, in order, each with a name of its own.

  Args:
    inputs: folders, files, or patterns. A folder stands for all files in it with the ending of an image or a
      video; a file that is named itself is taken whatever its ending.
    exclude: a folder of results that is not looked into.

  Raises:
    FileNotFoundError: something that does not exist, or nothing usable in all of it.
  """
  inputs = list(inputs)
  found: dict[pathlib.Path, pathlib.Path] = {}  # file: its path below the folder that was given
  others = 0
  for entry in inputs:
    for path in _matches(entry):
      if not path.is_dir():
        found.setdefault(path, pathlib.Path(path.name))
        continue
      inside = [
        file
        for file in names.files_below(path)
        if exclude is None or not file.resolve().is_relative_to(exclude.resolve())
      ]
      usable = [file for file in inside if file.suffix.lower() in _SUFFIXES]
      others += len(inside) - len(usable)
      for file in usable:
        found.setdefault(file, file.relative_to(path))
  if others:
    _logger.info("%d files that are neither images nor videos by their ending are left out.", others)
  if not found:
    raise FileNotFoundError(f"No image and no video in {', '.join(map(str, inputs))}.")
  return _named(found)


def _matches(entry: str | os.PathLike) -> list[pathlib.Path]:
  """The existing paths that an entry of the command line means: itself, or all that fit its pattern."""
  path = pathlib.Path(entry).expanduser()
  paths = [path]
  if not path.exists() and _WILDCARDS & set(str(path)):
    below = pathlib.Path(path.anchor)
    paths = [
      pathlib.Path(match) for match in sorted(map(str, below.glob(str(path.relative_to(path.anchor)))))
    ]
  if not paths or not paths[0].exists():
    raise FileNotFoundError(f"--inputs={entry}: {path.absolute()} does not exist.")
  return paths


def _named(found: Mapping[pathlib.Path, pathlib.Path]) -> list[Input]:
  """Inputs with unique names: the path below its folder, with ending or a number only where that is needed.

  Args:
    found: {file: its path below the folder that was given}.
  """
  stems = collections.Counter(str(relative.with_suffix("")) for relative in found.values())
  paths = collections.Counter(found.values())
  result, taken = [], set()
  for path, relative in found.items():
    stem = str(relative.with_suffix(""))
    name = names.output_name(stem if stems[stem] == 1 else str(relative))
    unique, number = name, 2
    while unique in taken:  # the same path below two folders
      unique, number = f"{name}-{number}", number + 1
    taken.add(unique)
    file_name = str(relative if paths[relative] == 1 else path)
    media = "video" if path.suffix.lower() in decoding.SUFFIXES else "image"
    result.append(Input(path, file_name, unique, media))
  return result
