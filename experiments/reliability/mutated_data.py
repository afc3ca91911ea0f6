"""Reads thousands of mutated lists, annotations, images, archives and videos, and counts the outcomes.

  PYTHONPATH=. python experiments/reliability/mutated_data.py --count=10000 --seed=0

Every file must be read or refused with an error that names it: no other exception, no five seconds, no
128 MiB. The files are made of small good ones by `tests.data.hostile`.
"""

import collections
import pathlib
import tempfile

from absl import flags

from experiments.reliability import campaign
from tests.data import hostile

_COUNT = flags.DEFINE_integer("count", 10_000, "Files.")


def main() -> None:
  rng, readers = campaign.generator(), list(hostile.READERS)
  outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
  faults, slowest, largest = [], 0.0, 0
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    hostile.make_files(folder)
    for case in range(_COUNT.value):
      reader = readers[case % len(readers)]
      outcome = hostile.try_one(reader, case // len(readers), folder, rng)
      outcomes[reader, outcome.kind] += 1
      slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.peak)
      if outcome.kind == "fault":
        faults.append(f"{reader}: {outcome.said} on {outcome.data[:200]!r}")
  campaign.finish(
    campaign.headline(f"{_COUNT.value:,} files"),
    campaign.table(outcomes, widths=(14, 8)),
    faults,
    f"slowest {slowest:.1f} s",
    f"at most {largest / 2**20:.1f} MiB",
  )


if __name__ == "__main__":
  campaign.run(main)
