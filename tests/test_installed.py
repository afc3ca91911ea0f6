"""The package as it is installed from a wheel, outside of any checkout."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

from frozen_vision import config_files

_ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """A wheel of the working tree, built from a copy: building leaves files beside its source."""
  folder = tmp_path_factory.mktemp("wheel")
  for name in ("frozen_vision", "configs"):
    shutil.copytree(_ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
    shutil.copy(_ROOT / name, folder / "source")
  options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
  subprocess.run(
    [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, folder / "source"], check=True
  )
  [path] = folder.glob("*.whl")
  return path


@pytest.mark.slow
def test_the_wheel_has_every_module_and_config_and_what_ships(wheel):
  files = set(zipfile.ZipFile(wheel).namelist())
  modules = {path.relative_to(_ROOT).as_posix() for path in (_ROOT / "frozen_vision").rglob("*.py")}
  assert modules <= files
  assert {f"frozen_vision/configs/{path.name}" for path in (_ROOT / "configs").glob("*.py")} <= files
  assert {
    "frozen_vision/backbones/weights/swinv2_nano.safetensors",
    "frozen_vision/report/style.css",
  } <= files
  assert "frozen_vision/data/detection/photos/instances.json" in files and "frozen_vision/py.typed" in files
  assert not [name for name in files if name.startswith(("tests/", "configs/", "experiments/"))]


@pytest.mark.slow
def test_configs_are_found_and_what_can_be_run_is_said(wheel, tmp_path):
  site = tmp_path / "site"
  zipfile.ZipFile(wheel).extractall(site)
  environment = {**os.environ, "PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}

  def run(*arguments):
    return subprocess.run(
      [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )

  program = (
    "import frozen_vision as fv\nprint(fv.__file__)\n"
    "for source in ('coco_htc:files', 'configs/coco_htc.py:recipe=files'):\n"
    "  print(fv.load_config(source).detection.data)"
  )
  result = run("-c", program)
  assert result.stdout.split() == [str(site / "frozen_vision" / "__init__.py"), "files", "files"], (
    result.stderr
  )
  result = run("-m", "frozen_vision.main")
  assert result.returncode == 0
  for text in ("--mode=evaluate", "--mode=predict", "--mode=plan", *config_files.shipped()):
    assert text in result.stdout, result.stdout
  result = run("-m", "frozen_vision.main", "--config=coco_htk", "--workdir=w")
  assert result.returncode == 1 and result.stdout == ""
  assert "coco_htk: no such file. Shipped: ade20k_mask2former, " in result.stderr


def test_shipped_configs_of_a_checkout_are_those_of_its_folder():
  assert set(config_files.shipped().values()) == set((_ROOT / "configs").glob("*.py"))
  described = config_files.describe()
  assert described.keys() == config_files.shipped().keys() and all(described.values())
