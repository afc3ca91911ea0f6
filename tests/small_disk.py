"""Programs that see a small disk at a folder: a tmpfs in a mount namespace of their own."""

from collections.abc import Sequence
import functools
import pathlib
import subprocess

import pytest


def command(
  folder: pathlib.Path | str, size: str, arguments: Sequence[str], *, kept: pathlib.Path | None = None
) -> list[str]:
  """The command that runs another one with a disk of `size`, such as 300k, at an existing folder.

  The test is skipped where no such disk can be mounted.

  Args:
    size: in bytes; further options of the mount may follow, as in `300k,ro`.
    kept: where what lies on the disk at the end is copied to; None copies nothing.
  """
  if not _is_possible():
    pytest.skip("needs a small disk")
  script = (
    'folder=$1; size=$2; kept=$3; shift 3; mount -t tmpfs -o size="$size" none "$folder" || exit 99; '
    '"$@"; status=$?; test -z "$kept" || cp -r "$folder" "$kept"; exit $status'
  )
  return ["unshare", "-Urm", "sh", "-c", script, "sh", str(folder), size, str(kept or ""), *arguments]


@functools.cache
def _is_possible() -> bool:
  try:
    mounted = subprocess.run(
      ["unshare", "-Urm", "sh", "-c", "mount -t tmpfs -o size=64k none /tmp"], capture_output=True
    )
  except OSError:
    return False
  return mounted.returncode == 0
