"""The documentation builds without a warning, and has a page for every module."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

import frozen_vision as fv
from frozen_vision import command_line

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


_WRITTEN = [_ROOT / "README.md", *sorted((_ROOT / "docs" / "pages").glob("*.md"))]


@pytest.mark.parametrize("page", _WRITTEN, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
  text = page.read_text()
  named = re.findall(r"`((?:frozen_vision|configs|experiments|tests|docs)/[\w/.]+)[`:]", text)
  linked = re.findall(r"\]\(((?!https?:)[^)#]+)\)", text)
  generated = {"names.md"}  # by docs/api_pages.py
  assert not sorted(path for path in named if not (_ROOT / path).exists())
  assert not sorted(path for path in linked if not (page.parent / path).exists() and path not in generated)


@pytest.mark.parametrize("page", _WRITTEN, ids=lambda page: page.name)
def test_the_commands_of_a_page_set_options_that_exist(page):
  blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
  for command in "\n".join(blocks).replace("\\\n", " ").splitlines():
    source = re.search(r"--config=(configs/\S+)", command)
    if source:
      _, changes = command_line.split(shlex.split(command))
      fv.load_config(_ROOT / source[1], changes)


def test_the_readme_is_short():
  assert len((_ROOT / "README.md").read_text().split()) <= 1000
