"""Paths that an option names."""

import os
import pathlib

from frozen_vision.files import checkpoint_file


def existing_path(path: str | os.PathLike, option: str, how: str = "") -> pathlib.Path:
  """The path, if it exists; of `FILE:PART` (`files.checkpoint_file`), if the file does.

  Raises:
    FileNotFoundError: names the option, the absolute path that was looked at, and `how` to get it.
  """
  found = pathlib.Path(path).expanduser()
  if not checkpoint_file.split_part(found)[0].exists():
    raise FileNotFoundError(
      f"config.{option}: {found.absolute()} does not exist. "
      f"{how or 'Give an existing path with --config.' + option + '=PATH.'}"
    )
  return found
