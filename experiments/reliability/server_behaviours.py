"""Downloads from a server that misbehaves in every way we know, and says what became of each file.

  PYTHONPATH=. python experiments/reliability/server_behaviours.py

The server is a real one on this machine (`tests.files.servers`, which lists the behaviours). A download must
give the whole file or none, within its stated time, and leave nothing that spoils the next one. Times are
shortened from minutes to half a second. Nothing here is random.
"""

import pathlib
import sys
import tempfile

from absl import app, logging

from frozen_vision.files import download
from tests.files import servers


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
  logging.set_verbosity(logging.ERROR)
  for name, seconds in servers.TIMES.items():
    setattr(download, name, seconds)
  faults, slowest, lines = [], 0.0, []
  for behaviour in servers.BEHAVIOURS:
    outcomes = []
    for has_digest in (True, False):
      with tempfile.TemporaryDirectory() as folder:
        outcome, seconds, wrong = servers.try_one(behaviour, pathlib.Path(folder), has_digest=has_digest)
      outcomes.append(outcome)
      slowest = max(slowest, seconds)
      faults += [f"{behaviour}: {one}" for one in wrong]
    lines.append(f"  {behaviour:36s} {outcomes[0]:14s} {outcomes[1]}")
  print(
    f"{len(servers.BEHAVIOURS)} behaviours: {len(faults)} faults, slowest {slowest:.1f} s of at most "
    f"{servers.MOST_SECONDS:.1f} s\n  {'the server':36s} {'with a digest':14s} without one"
  )
  print("\n".join(lines))
  for fault in faults[:20]:
    print(f"  FAULT {fault}")
  sys.exit(bool(faults))


if __name__ == "__main__":
  app.run(main)
