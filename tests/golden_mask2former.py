"""Transformers' outputs for the tests of Mask2Former: committed, or computed on the spot."""

import pathlib

import pytest

from tests import reference_scripts

_TESTS = pathlib.Path(__file__).resolve().parent
KINDS = ("committed", "live")


def folder(kind: str, factory: pytest.TempPathFactory) -> pathlib.Path:
  """Folder of what `references/mask2former.py` wrote; "live" runs it now, with another seed."""
  if kind == "committed":
    return _TESTS / "golden"
  path = factory.mktemp("mask2former")
  return reference_scripts.run("mask2former.py", path, "1", packages=("torch", "transformers", "scipy"))
