"""Downloads from a server that misbehaves in every way we know, and says what became of each file.

  PYTHONPATH=. python experiments/reliability/server_behaviours.py

The server is a real one on this machine (`tests.files.servers`, which lists the behaviours). A download must
give the whole file or none, within its stated time, and leave nothing that spoils the next one. Times are
shortened from minutes to half a second. Nothing here is random.
"""

import pathlib
import tempfile

from absl import logging

from experiments.reliability import campaign
from frozen_vision.files import download
from tests.files import servers


def main() -> None:
  logging.set_verbosity(logging.ERROR)
  for name, value in servers.SETTINGS.items():
    setattr(download, name, value)
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
  campaign.finish(
    f"{len(servers.BEHAVIOURS)} behaviours",
    [f"  {'the server':36s} {'with a digest':14s} without one", *lines],
    faults,
    f"slowest {slowest:.1f} s of at most {servers.MOST_SECONDS:.1f} s",
  )


if __name__ == "__main__":
  campaign.run(main)
