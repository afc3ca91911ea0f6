"""Reads thousands of mutated weight files of every format, and counts what became of them.

  PYTHONPATH=. python experiments/reliability/mutated_weights.py --count=10000 --seed=0

Every file must be read or refused with an error that names it: no crash, no other exception, no ten seconds
of processor time, no two gigabytes. The files are made of small good ones by
`tests.files.test_hostile_files`, and are read by a process of their own with a limit on its memory.
"""

import collections
import pathlib
import tempfile

from absl import flags

from experiments.reliability import campaign
from tests.files import hostile, test_hostile_files

_COUNT = flags.DEFINE_integer("count", 10_000, "Files.")
_BATCH = 1000  # files of one process


def main() -> None:
  rng = campaign.generator()
  outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
  faults, slowest, largest = [], 0.0, 0
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    good = test_hostile_files.good_files(folder)
    for first in range(0, _COUNT.value, _BATCH):
      files = []
      for index in range(first, min(first + _BATCH, _COUNT.value)):
        suffix, data = good[index % len(good)]
        path = folder / f"mutant{index}{suffix}"
        path.write_bytes(test_hostile_files.mutate(data, rng))
        files.append(path)
      for path, (said, seconds, peak) in hostile.read_all(files, seconds=3600).items():
        path = pathlib.Path(path)
        kind = said.split()[0]
        outcomes[path.suffix, kind] += 1
        slowest, largest = max(slowest, seconds), max(largest, peak)
        if kind == "other" and "is empty" not in said or kind != "read" and path.name not in said:
          faults.append(said)
        path.unlink()
  campaign.finish(
    campaign.headline(f"{_COUNT.value:,} files"),
    campaign.table(outcomes, widths=(14, 8)),
    faults,
    f"slowest {slowest:.1f} s",
    f"largest process {largest:,} MiB",
  )


if __name__ == "__main__":
  campaign.run(main)
