"""Finds the image files of a COCO-format file, and checks that they are what their records say."""

from collections.abc import Sequence
import dataclasses
import pathlib

from frozen_vision.data import findings, image_checks
from frozen_vision.data import images as image_io
from frozen_vision.data import names as data_names
from frozen_vision.data.detection import coco_annotations as checks


def check_files(
  rows: Sequence[checks.ImageRow],
  folder: pathlib.Path,
  problems: findings.Findings,
  *,
  sizes: bool,
  contents: bool,
) -> list[checks.ImageRow]:
  """The rows whose file is there and passes the checks, under the name that it has on disk."""
  files, kept = data_names.Files(folder), []
  for row in rows:
    path = files.find(row.file_name)
    if path is None:
      problems.add("image_missing", row.file_name)
      continue
    if path != folder / row.file_name:
      problems.add("image_renamed", row.file_name)
      row = dataclasses.replace(row, file_name=path.relative_to(folder).as_posix())
    error = _wrong_size(row, path) if sizes else None
    if error is not None:
      kind = "image_size" if error.kind == "wrong size" else "image_unreadable"
      problems.add(kind, str(error))
    else:
      kept.append(row)
  if contents:
    names = [row.file_name for row in kept]
    errors = image_checks.check_files((folder / name for name in names), names)
    kept = [kept[index] for index in problems.add_errors("image_unreadable", errors)]
  return kept


def _wrong_size(row: checks.ImageRow, path: pathlib.Path) -> image_io.ImageError | None:
  try:
    image_checks.check_size(image_io.read_size(path, name=row.file_name), dataclasses.asdict(row), path)
  except image_io.ImageError as error:
    return error
  return None
