"""Huge pages for what a training step on a CPU needs while it runs."""

import os
import pathlib
import platform
import sys

_SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TUNABLE = "glibc.malloc.hugetlb"


def tunables(current: str, setting: str, libc: tuple[str, str]) -> str | None:
  """The value of GLIBC_TUNABLES that makes malloc ask for huge pages; None where it would change nothing.

  Args:
    current: its value now.
    setting: of the kernel, such as "always [madvise] never": only under `madvise` must one ask.
    libc: name and version, as from `platform.libc_ver`; glibc can ask since 2.35.
  """
  name, version = libc
  if "[madvise]" not in setting or name != "glibc" or _TUNABLE in current:
    return None
  if tuple(int(part) for part in version.split(".")[:2]) < (2, 35):
    return None
  return ":".join(filter(None, [current, f"{_TUNABLE}=1"]))


def restart() -> None:
  """Starts this program again, as the same process, if its malloc should ask for huge pages and does not.

  XLA takes a step's temporaries from malloc and gives them back after it, hundreds of megabytes at a time. In
  pages of 4 KiB the kernel then spends up to a third of the CPU time on handing them out. glibc reads the
  setting when a program starts, so call this first. Elsewhere than on Linux with glibc nothing happens.
  """
  try:
    setting = _SETTING.read_text()
  except OSError:
    return
  value = tunables(os.environ.get("GLIBC_TUNABLES", ""), setting, platform.libc_ver())
  if value is not None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, sys.orig_argv, {**os.environ, "GLIBC_TUNABLES": value})
