"""Folders that tests read: golden outputs, and real data, which a checkout may be without."""

import os
import pathlib

import pytest

_TESTS = pathlib.Path(__file__).resolve().parent


def data_dir(name: str) -> pathlib.Path:
  """The real data set `name` below $FROZEN_VISION_DATA or `../shared/data`; its absence skips the test."""
  root = os.environ.get("FROZEN_VISION_DATA") or _TESTS.parents[1] / "shared" / "data"
  path = pathlib.Path(root) / name
  if not path.exists():
    pytest.skip(f"{path} is absent; FROZEN_VISION_DATA names the folder with real data.")
  return path


def golden_dir() -> pathlib.Path:
  """Golden outputs of reference implementations: `tests/golden`, or the folder $FROZEN_VISION_GOLDEN."""
  path = pathlib.Path(os.environ.get("FROZEN_VISION_GOLDEN") or _TESTS / "golden")
  if not path.is_dir():
    raise FileNotFoundError(f"FROZEN_VISION_GOLDEN names {path}, which is not a folder.")
  return path


def faults_dir(name: str) -> pathlib.Path:
  """The small inputs `name` that go wrong, below $FROZEN_VISION_FAULTS or `../shared/faults`, or a skip."""
  root = os.environ.get("FROZEN_VISION_FAULTS") or _TESTS.parents[1] / "shared" / "faults"
  path = pathlib.Path(root) / name
  if not path.exists():
    pytest.skip(f"{path} is absent; FROZEN_VISION_FAULTS names the folder with small faulty inputs.")
  return path
