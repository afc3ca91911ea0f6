"""Runs the scripts in `tests/references`, which need PyTorch, in a process of their own."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

_SCRIPTS = pathlib.Path(__file__).resolve().parent / "references"


def run(script: str, folder: pathlib.Path, *arguments: str, packages: tuple[str, ...]) -> pathlib.Path:
  """Runs a script that writes into `folder`, and returns the folder.

  It runs in $FROZEN_VISION_REFERENCE_PYTHON, or in this interpreter if it has the packages; otherwise the
  test is skipped.

  Args:
    script: its file name.
    arguments: after the folder.
    packages: what the script imports.
  """
  python = os.environ.get("FROZEN_VISION_REFERENCE_PYTHON")
  if not python:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
      pytest.skip(f"{absent} not installed; set FROZEN_VISION_REFERENCE_PYTHON to a Python that has them.")
    python = sys.executable
  subprocess.run([python, str(_SCRIPTS / script), str(folder), *arguments], check=True)
  return folder
