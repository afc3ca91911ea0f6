"""Damages checkpoints of a run hundreds of times, and counts what a restore makes of it.

  JAX_PLATFORMS=cpu PYTHONPATH=. python experiments/reliability/damaged_checkpoints.py --count=500 --seed=0

A damage is a flipped bit, a byte that is another, a truncation, a repeated block, zeros, an emptied or a
removed file, in any file of the newer of two checkpoints. A restore must give the newer state unchanged, or
name the damage and give the older one. Anything else is silent damage or a raw exception, and a fault.
"""

import collections
import pathlib
import shutil
import tempfile
import warnings

from absl import flags, logging
import jax
import numpy as np

from experiments.reliability import campaign
from frozen_vision.runs import checkpoints, state_leaves
from tests.runs import states

_COUNT = flags.DEFINE_integer("count", 500, "Damages.")


def digest_of(state: dict) -> list[bytes]:
  """Every leaf as bytes."""
  leaves, _ = state_leaves.flatten(state)
  found = []
  for leaf in leaves.values():
    is_key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    found.append(np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes())
  return found


def main() -> None:
  logging.set_verbosity(logging.FATAL)
  rng = campaign.generator()
  outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
  faults = []
  wanted = {step: digest_of(states.make(step)) for step in (1, 2)}
  abstract = states.abstract(states.make())
  with tempfile.TemporaryDirectory() as name:
    good, folder = pathlib.Path(name) / "good", pathlib.Path(name) / "damaged"
    states.save(good, 1, 2)
    files = sorted(
      path.relative_to(good)
      for path in (good / "checkpoints" / "2").rglob("*")
      if path.is_file() and path.stat().st_size
    )
    for number in range(_COUNT.value):
      shutil.copytree(good, folder)
      file = files[number % len(files)]
      kind = campaign.damage(folder / file, rng, removes=True)
      with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
          with checkpoints.Checkpoints(folder) as store:
            restored, meta = store.restore(abstract)
          named = any("checkpoints/2" in str(one.message) for one in caught)
          if digest_of(restored) != wanted[meta["step"]]:
            outcome = "SILENT"
          elif meta["step"] == 2:
            outcome = "unchanged"
          else:
            outcome = "named, the one before taken" if named else "SILENT, the one before taken"
        except Exception as error:  # what must not happen
          outcome = f"RAISED {type(error).__name__}"
      outcomes[kind, outcome] += 1
      if outcome.isupper() or outcome.split()[0].rstrip(",").isupper():
        faults.append(f"{number}: {file} {kind}: {outcome}")
      shutil.rmtree(folder)
  campaign.finish(campaign.headline(f"{_COUNT.value:,} damages"), campaign.table(outcomes), faults)


if __name__ == "__main__":
  campaign.run(main)
