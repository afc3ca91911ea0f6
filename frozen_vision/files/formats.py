"""Shared by every reader of untrusted files: one error, and JSON with bounds."""

import json
import os
from typing import Any


class FileFormatError(ValueError):
  """A file that is damaged, hostile, or of another format than its reader's; the text names the file."""

  def __init__(self, path: str | os.PathLike, problem: str):
    """Args: path: the file. problem: what is wrong with it, as the rest of a sentence that begins with it."""
    super().__init__(f"{os.fspath(path)} {problem}")
    self.path = os.fspath(path)


def parse_json(text: str | bytes, path: str | os.PathLike, what: str) -> Any:
  """Parses JSON of a file.

  Args:
    path: the file, for the error.
    what: the part of it that the text is, such as `its header`.

  Raises:
    FileFormatError: no JSON, or nested too deeply.
  """
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    reason = "it is nested too deeply" if isinstance(error, RecursionError) else f"{error}"
    raise FileFormatError(path, f"cannot be read: {what} is not JSON ({reason}).") from error
