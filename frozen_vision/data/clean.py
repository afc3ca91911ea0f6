"""Removes shared memory that loader workers of killed runs have left behind.

  python -m frozen_vision.data.clean --dry-run
  python -m frozen_vision.data.clean --workdir=DIR

Without `--dry-run`, which only counts, it removes; without `--workdir` it looks at all runs. A run removes
by itself what earlier ones in its workdir have left; this is for workdirs that are not used again. Running
processes are not touched.
"""

import argparse
from collections.abc import Sequence
import os
import sys

from frozen_vision.data import shared_memory


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m frozen_vision.data.clean",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--dry-run", action="store_true", help="only count")
  parser.add_argument("--workdir", type=os.path.expanduser, help="of one run; by default all runs")
  options = parser.parse_args(arguments)
  found = shared_memory.remove_leftovers(options.workdir, dry_run=options.dry_run)
  verb = "would be removed" if options.dry_run else "removed"
  print(f"Shared memory of killed runs: {found.segments:,} segments, {found.size / 2**20:,.1f} MiB {verb}.")
  return 0


if __name__ == "__main__":
  sys.exit(main())
