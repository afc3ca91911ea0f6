"""Where tests find real data and golden outputs; absent folders skip the test with a message."""

import os
import pathlib

import pytest

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def _folder(variable: str, default: str) -> pathlib.Path:
  path = pathlib.Path(os.environ.get(variable) or _ROOT.parent / "shared" / default)
  if not path.is_dir():
    pytest.skip(f"{path} is absent; set {variable} to the folder that holds it.")
  return path


def data_dir(name: str) -> pathlib.Path:
  """The real data set `name`, below $FROZEN_VISION_DATA or ../shared/data."""
  path = _folder("FROZEN_VISION_DATA", "data") / name
  if not path.exists():
    pytest.skip(f"{path} is absent.")
  return path


def golden_dir() -> pathlib.Path:
  """Golden outputs of reference implementations, $FROZEN_VISION_GOLDEN or ../shared/golden."""
  return _folder("FROZEN_VISION_GOLDEN", "golden")
