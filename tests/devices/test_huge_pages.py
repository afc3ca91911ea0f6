"""Asking the C library for huge pages."""

import os
import pathlib
import subprocess
import sys

import pytest

from frozen_vision.devices import huge_pages

_MADVISE = "always [madvise] never\n"


def test_malloc_is_told_where_the_kernel_wants_to_be_asked():
  glibc = ("glibc", "2.36")
  assert huge_pages.tunables("", _MADVISE, glibc) == "glibc.malloc.hugetlb=1"
  assert huge_pages.tunables("glibc.malloc.check=1", _MADVISE, glibc) == (
    "glibc.malloc.check=1:glibc.malloc.hugetlb=1"
  )


@pytest.mark.parametrize(
  "current, setting, libc",
  [
    ("glibc.malloc.hugetlb=0", _MADVISE, ("glibc", "2.36")),  # the user's own choice
    ("", "[always] madvise never\n", ("glibc", "2.36")),
    ("", "always madvise [never]\n", ("glibc", "2.36")),
    ("", _MADVISE, ("glibc", "2.31")),
    ("", _MADVISE, ("", "")),  # musl
  ],
)
def test_nothing_is_changed_elsewhere(current, setting, libc):
  assert huge_pages.tunables(current, setting, libc) is None


def test_a_program_starts_again_once_as_the_same_process(tmp_path):
  setting = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
  if not setting.exists() or "[madvise]" not in setting.read_text():
    pytest.skip("this kernel gives huge pages always or never")
  script = tmp_path / "script.py"
  script.write_text(
    "import os, sys\nfrom frozen_vision.devices import huge_pages\nprint('start', os.getpid())\n"
    "huge_pages.restart()\nprint('end', os.getpid(), os.environ['GLIBC_TUNABLES'], sys.argv[1:])\n"
  )
  environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
  environment["PYTHONPATH"] = str(pathlib.Path(__file__).resolve().parents[2])
  process = subprocess.Popen(
    [sys.executable, script, "--flag=a b"], env=environment, stdout=subprocess.PIPE, text=True
  )
  lines = process.communicate()[0].splitlines()
  assert process.returncode == 0
  assert lines == [f"start {process.pid}"] * 2 + [f"end {process.pid} glibc.malloc.hugetlb=1 ['--flag=a b']"]
