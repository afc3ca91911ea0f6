"""Damages checkpoints of a run hundreds of times, and counts what a restore makes of it.

  JAX_PLATFORMS=cpu PYTHONPATH=. python experiments/reliability/damaged_checkpoints.py --count=500 --seed=0

A damage is a flipped bit, a byte that is another, a truncation, a repeated block, zeros, or a removed file,
in any file of the newer of two checkpoints. A restore must give the newer state unchanged, or name the
damage and give the older one. Anything else is silent damage or a raw exception, and a fault.
"""

import collections
import pathlib
import random
import shutil
import sys
import tempfile
import warnings

from absl import app, flags, logging
import jax
import numpy as np

from frozen_vision.runs import checkpoints, state_leaves
from tests.runs import states

_COUNT = flags.DEFINE_integer("count", 500, "Damages.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the damages.")


def damage(path: pathlib.Path, rng: random.Random) -> str:
  """Damages a file and says how."""
  data = bytearray(path.read_bytes())
  at = rng.randrange(len(data)) if data else 0
  kind = rng.choice(("bit", "byte", "truncated", "repeated", "zeros", "removed"))
  match kind:
    case "bit" if data:
      data[at] ^= 1 << rng.randrange(8)
    case "byte" if data:
      data[at] = rng.randrange(256)
    case "truncated":
      del data[at:]
    case "repeated":
      data[at:at] = data[max(0, at - 64) : at]
    case "zeros":
      data[at : at + 64] = bytes(len(data[at : at + 64]))
    case "removed":
      path.unlink()
      return kind
  path.write_bytes(data)
  return kind


def digest_of(state: dict) -> list[bytes]:
  """Every leaf as bytes."""
  leaves, _ = state_leaves.flatten(state)
  found = []
  for leaf in leaves.values():
    is_key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    found.append(np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes())
  return found


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
  logging.set_verbosity(logging.FATAL)
  rng = random.Random(_SEED.value)
  outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
  faults = []
  wanted = {step: digest_of(states.make(step)) for step in (1, 2)}
  with tempfile.TemporaryDirectory() as name:
    good, folder = pathlib.Path(name) / "good", pathlib.Path(name) / "damaged"
    states.save(good, 1, 2)
    files = sorted(
      path.relative_to(good) for path in (good / "checkpoints" / "2").rglob("*") if path.is_file()
    )
    for number in range(_COUNT.value):
      shutil.copytree(good, folder)
      file = files[number % len(files)]
      kind = damage(folder / file, rng)
      with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
          with checkpoints.Checkpoints(folder) as store:
            restored, meta = store.restore(states.abstract(states.make()))
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
  print(f"{_COUNT.value:,} damages, seed {_SEED.value}")
  for (kind, outcome), count in sorted(outcomes.items()):
    print(f"  {kind:10s} {outcome:32s} {count:5,d}")
  for fault in faults[:20]:
    print(f"  FAULT {fault}")
  sys.exit(bool(faults))


if __name__ == "__main__":
  app.run(main)
