"""Shared by readers of untrusted files: one error, JSON with bounds, and the dtypes of `.safetensors`."""

import json
import os
from typing import Any

import ml_dtypes
import numpy as np

# Name of a dtype in a header -> the dtype.
SAFETENSORS_DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}


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
