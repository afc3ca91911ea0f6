"""Where the tests of Mask2Former find transformers' outputs: committed, or computed on the spot."""

import os
import pathlib
import subprocess

import pytest

_TESTS = pathlib.Path(__file__).resolve().parent
KINDS = ("committed", "live")


def folder(kind: str, factory: pytest.TempPathFactory) -> pathlib.Path:
  """Folder of what `references/mask2former.py` wrote; "live" runs it now, with another seed."""
  if kind == "committed":
    return _TESTS / "golden"
  python = os.environ.get("FROZEN_VISION_REFERENCE_PYTHON")
  if not python:
    pytest.skip("set FROZEN_VISION_REFERENCE_PYTHON to a Python with torch, transformers and scipy.")
  path = factory.mktemp("mask2former")
  subprocess.run([python, str(_TESTS / "references" / "mask2former.py"), str(path), "1"], check=True)
  return path
