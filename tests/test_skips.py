"""A skip fails the run unless its reason is listed."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests import skips

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def _run(folder: pathlib.Path, message: str) -> subprocess.CompletedProcess:
  """Runs one passing and one skipped test under the hooks of `tests/conftest.py`."""
  (folder / "conftest.py").write_text(
    "from tests.conftest import pytest_sessionfinish, pytest_terminal_summary\n"
  )
  (folder / "test_two.py").write_text(
    f"import pytest\ndef test_runs(): pass\ndef test_is_skipped(): pytest.skip({message!r})\n"
  )
  command = [
    sys.executable,
    "-m",
    "pytest",
    "-q",
    "-p",
    "no:cacheprovider",
    "--rootdir",
    str(folder),
    str(folder),
  ]
  environment = {**os.environ, "PYTHONPATH": str(_ROOT), "FROZEN_VISION_TEST_TYPES": "0"}
  return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_listed_reason_is_counted_and_passes(tmp_path):
  done = _run(tmp_path, "set FROZEN_VISION_DATA to a folder")
  assert done.returncode == 0, done.stdout
  assert f"1 {skips.explanation('FROZEN_VISION_DATA')}" in done.stdout


def test_any_other_reason_fails_the_run(tmp_path):
  done = _run(tmp_path, "not today")
  assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
  assert "not today" in done.stdout and "test_is_skipped" in done.stdout
