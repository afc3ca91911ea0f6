"""Kills writers of a feature cache at random moments, damages shards, and fills a disk; counts what is wrong.

  PYTHONPATH=. python experiments/reliability/killed_caches.py --kills=20 --damages=200 --seed=0

With `--full_disk=FOLDER`, an empty folder on a small file system of its own, a writer also runs until that is
full (`mount -t tmpfs -o size=4m tmpfs FOLDER` makes one). Every record that a cache gives afterwards must be
the one that was put in, a record that was there must still be there, and a damaged shard must be named.
"""

import collections
import logging
import pathlib
import random
import tempfile

from absl import flags
import numpy as np

from experiments.reliability import campaign
from frozen_vision.freezing import cache as feature_cache
from tests.freezing import test_cache

_KILLS = flags.DEFINE_integer("kills", 20, "Writers that are killed, one after the other.")
_DAMAGES = flags.DEFINE_integer("damages", 200, "Shards that are damaged.")
_FULL_DISK = flags.DEFINE_string("full_disk", None, "Empty folder on a small file system.")


class _Named(logging.Handler):
  """Keeps the messages of warnings."""

  def __init__(self):
    super().__init__(logging.WARNING)
    self.texts: list[str] = []

  def emit(self, record: logging.LogRecord) -> None:
    self.texts.append(record.getMessage())


def is_wrong(cache: feature_cache.FeatureCache, indices: np.ndarray) -> bool:
  """Whether a record is other than the one that was put in."""
  if not len(indices):
    return False
  found, wanted = cache.read(indices), test_cache.records(indices)
  return any(not np.array_equal(found[name], wanted[name]) for name in wanted)


def damages(folder: pathlib.Path, count: int, rng: random.Random) -> collections.Counter[str]:
  """Outcomes of damaging one shard at a time and writing its records again."""
  outcomes: collections.Counter[str] = collections.Counter()
  named = _Named()
  logging.getLogger("frozen_vision").addHandler(named)
  logging.getLogger("frozen_vision").propagate = False
  test_cache.fill(folder, *np.arange(200).reshape(20, 10), shard_bytes=1)
  for _ in range(count):
    path = rng.choice(test_cache.shard_paths(folder))
    campaign.damage(path, rng, removes=False)
    named.texts.clear()
    try:
      cache = feature_cache.FeatureCache(folder, test_cache.KEY)
      missing = cache.missing(range(200))
      if not any(str(path) in text for text in named.texts):
        outcomes["FAULT: not named"] += 1
      elif len(missing) != 10 or is_wrong(cache, np.setdiff1d(np.arange(200), missing)):
        outcomes["FAULT: other records are gone or wrong"] += 1
      else:
        with cache.writing() as writer:
          writer.add(missing, test_cache.records(missing))
        again = feature_cache.FeatureCache(folder, test_cache.KEY)
        whole = not len(again.missing(range(200))) and not is_wrong(again, np.arange(200))
        outcomes["named, and written again" if whole else "FAULT: not mended"] += 1
    except Exception as error:  # pylint: disable=broad-exception-caught
      outcomes[f"FAULT: {type(error).__name__}: {error}"] += 1
    if any("FAULT" in outcome for outcome in outcomes):
      break  # what follows would be of a cache that is damaged already
  return outcomes


def fill_disk(folder: pathlib.Path) -> str:
  """Writes until the disk is full, and says what is left of it."""
  cache = feature_cache.FeatureCache(folder, test_cache.KEY)
  added = 0
  try:
    with cache.writing(shard_bytes=1 << 16) as writer:
      while added < 10_000_000:
        writer.add(np.arange(added, added + 256), test_cache.records(np.arange(added, added + 256)))
        added += 256
    return "FAULT: the disk was never full"
  except OSError as error:
    found = feature_cache.FeatureCache(folder, test_cache.KEY)
    left = [path.name for path in folder.rglob("*") if path.suffix in (".partial", ".lock")]
    if left or is_wrong(found, found.indices) or not len(found):
      return f"FAULT: {len(found)} records, left behind {left}"
    return (
      f"{error.strerror}: {len(found):,} of {added:,} records are there and right, nothing is left behind"
    )


def main() -> None:
  lines, rng = [], campaign.generator()
  with tempfile.TemporaryDirectory() as name:
    try:
      counts = test_cache.kill_and_continue(pathlib.Path(name) / "kills", _KILLS.value, rng)
      lines.append(f"{_KILLS.value} kills: nothing lost or wrong; records after each: {counts}")
    except AssertionError as error:
      lines.append(f"FAULT of kills: {error}")
    found = damages(pathlib.Path(name) / "damages", _DAMAGES.value, rng)
    lines += [f"{count} of {_DAMAGES.value} damages: {outcome}" for outcome, count in sorted(found.items())]
  if _FULL_DISK.value:
    lines.append(f"full disk: {fill_disk(pathlib.Path(_FULL_DISK.value))}")
  faults = [line for line in lines if "FAULT" in line]
  title = campaign.headline(f"{_KILLS.value} kills and {_DAMAGES.value} damages")
  campaign.finish(title, [f"  {line}" for line in lines if line not in faults], faults)


if __name__ == "__main__":
  campaign.run(main)
