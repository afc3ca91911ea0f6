"""The documentation builds without a warning, and has a page for every module."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

import frozen_vision as fv

_ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(tmp_path):
  site = tmp_path / "site"
  result = subprocess.run(
    [
      sys.executable,
      "-m",
      "mkdocs",
      "build",
      "--strict",
      "--config-file",
      "docs/mkdocs.yml",
      "--site-dir",
      site,
    ],
    cwd=_ROOT,
    env={**os.environ, "PYTHONPATH": str(_ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=600,
  )
  assert result.returncode == 0 and "WARNING" not in result.stdout, result.stdout
  package = pathlib.Path(fv.__file__).parent
  for path in package.rglob("*.py"):
    page = path.relative_to(package).with_suffix(".html")
    if page.name == "__init__.html":
      page = page.with_name("index.html")
    if page != pathlib.Path("index.html"):
      assert (site / "modules" / page).exists(), page
  # Arguments and what is raised are set as such, and links lead somewhere.
  text = (site / "modules/backbones/families.html").read_text()
  for wanted in (
    "Parameters:",
    "Raises:",
    "FileNotFoundError",
    "frozen_vision.backbones.families.load_backbone",
  ):
    assert wanted in text, wanted
  names = (site / "names.html").read_text()
  for name in fv.__all__:
    assert f"fv.{name}" in names, name
  for target in re.findall(r'href="(modules/[^"#]+)#', names):
    assert (site / target).exists(), target
  assert len(re.findall(r'href="modules/[^"]+#frozen_vision\.', names)) >= len(fv.__all__)


def test_the_pages_name_no_folder_of_a_machine():
  for path in (_ROOT / "docs").rglob("*.md"):
    assert not re.search(r"(?<![\w.])/(home|root|work|Users|opt)/", path.read_text()), path
