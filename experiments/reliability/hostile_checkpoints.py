"""Opens checkpoints of PyTorch's format that were made to read foreign memory, hang, fill memory or run code.

  PYTHONPATH=. python experiments/reliability/hostile_checkpoints.py --count=200 --seed=0

Each must be refused with an error that names the file, or read as what it holds: no crash, no other
exception, no ten seconds of processor time, no two gigabytes, and nothing executed. The files are those of
`tests.files.crafted`; a process of their own with a limit on its memory reads them.
"""

import collections
import pathlib
import tempfile

from absl import flags

from experiments.reliability import campaign
from tests.files import crafted, hostile

_COUNT = flags.DEFINE_integer("count", 200, "Files.")


def main() -> None:
  rng = campaign.generator()
  outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
  faults, slowest, largest = [], 0.0, 0
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    marker, kinds = folder / "executed", {}
    for index in range(_COUNT.value):
      kind, data = crafted.craft(rng, marker)
      path = folder / f"crafted{index}.pth"
      path.write_bytes(data)
      kinds[path] = kind
    for path, (said, seconds, peak) in hostile.read_all(list(kinds), seconds=3600).items():
      outcome = said.split()[0]
      outcomes[kinds[pathlib.Path(path)], outcome] += 1
      slowest, largest = max(slowest, seconds), max(largest, peak)
      if outcome == "other" or (outcome == "refused" and pathlib.Path(path).name not in said):
        faults.append(said)
      if seconds > 10 or peak > 2048:
        faults.append(f"{path}: {seconds:.1f} s, {peak} MiB")
    executed = marker.exists()
    if executed:
      faults.append("something was executed")
  campaign.finish(
    campaign.headline(f"{_COUNT.value:,} files"),
    campaign.table(outcomes, widths=(10, 8)),
    faults,
    f"slowest {slowest:.1f} s",
    f"largest process {largest:,} MiB",
    f"{'something' if executed else 'nothing'} executed",
  )


if __name__ == "__main__":
  campaign.run(main)
