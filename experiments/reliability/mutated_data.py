"""Reads thousands of mutated lists, annotations, images, archives and videos, and counts the outcomes.

  PYTHONPATH=. python experiments/reliability/mutated_data.py --count=10000 --seed=0

Every file must be read or refused with an error that names it: no other exception, no five seconds, no
128 MiB. The files are made of small good ones by `tests.data.hostile`.
"""

import collections
import pathlib
import random
import sys
import tempfile

from absl import app, flags

from tests.data import hostile

_COUNT = flags.DEFINE_integer("count", 10_000, "Files.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the mutations.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
  rng, readers = random.Random(_SEED.value), list(hostile.READERS)
  kinds: dict[str, collections.Counter[str]] = {reader: collections.Counter() for reader in readers}
  faults, slowest, largest = [], 0.0, 0
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    hostile.make_files(folder)
    for case in range(_COUNT.value):
      reader = readers[case % len(readers)]
      outcome = hostile.try_one(reader, case // len(readers), folder, rng)
      kinds[reader][outcome.kind] += 1
      slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.peak)
      if outcome.kind == "fault":
        faults.append(f"{reader}: {outcome.said} on {outcome.data[:200]!r}")
  print(
    f"{_COUNT.value:,} files, seed {_SEED.value}: {len(faults)} faults, slowest {slowest:.1f} s, "
    f"at most {largest / 2**20:.1f} MiB"
  )
  for reader, counts in kinds.items():
    print(
      f"  {reader:14s} {counts['read']:6,d} read {counts['refused']:6,d} refused {counts['fault']:4,d} faults"
    )
  for fault in faults[:20]:
    print(f"  FAULT {fault[:400]}")
  sys.exit(bool(faults))


if __name__ == "__main__":
  app.run(main)
