"""Measures the cost of checksums in a save and a restore of a checkpoint.

  PYTHONPATH=. python experiments/benchmarks/checkpoint_checksums.py --gigabytes=1 --folder=/tmp

Saves float32 leaves of the sizes that a head with Adam has, waits until they are on disk, and restores them,
with and without checksums in turn. Prints medians: seconds until the loop may go on after `save`, until
everything is on disk, and of a restore. Run it on a quiet machine; the disk's cache holds what was written.
"""

import json
import pathlib
import statistics
import tempfile
import time
from unittest import mock

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np

from frozen_vision.runs import checkpoints, digests, records

_GIGABYTES = flags.DEFINE_float("gigabytes", 1.0, "Bytes of the state, in 10^9.")
_FOLDER = flags.DEFINE_string("folder", None, "Where to write; a temporary folder by default.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Saves and restores of each kind.")
_LEAF = 4 << 20  # numbers of the largest leaf


def make_state(gigabytes: float) -> dict[str, jax.Array]:
  """Leaves of 16 MiB, and a small one for every ten of them."""
  count = max(1, round(gigabytes * 1e9 / (4 * _LEAF)))
  rng = np.random.default_rng(0)
  state = {}
  for index in range(count):
    state[f"kernel{index}"] = jnp.asarray(rng.standard_normal(_LEAF, np.float32).reshape(-1, 1024))
    if index % 10 == 0:
      state[f"bias{index}"] = jnp.asarray(rng.standard_normal(256, np.float32))
  return jax.block_until_ready(state)


def measure(state: dict[str, jax.Array], folder: pathlib.Path, step: int) -> dict[str, float]:
  """Seconds of one save and one restore."""
  template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
  with checkpoints.Checkpoints(folder, keep=1) as store:
    started = time.perf_counter()
    store.save(step, state, {})
    returned = time.perf_counter()
    store.wait()
    written = time.perf_counter()
    jax.block_until_ready(store.restore(template, step)[0])
    restored = time.perf_counter()
  return {
    "save returns": returned - started,
    "on disk": written - started,
    "restore": restored - written,
  }


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
  state = make_state(_GIGABYTES.value)
  size = sum(leaf.nbytes for leaf in state.values()) / 1e9
  rows: dict[str, list[dict[str, float]]] = {"with": [], "without": []}
  with tempfile.TemporaryDirectory(dir=_FOLDER.value) as folder:
    for number in range(2 * _ROUNDS.value):
      kind = ("with", "without")[number % 2]
      # Without digests in its record a checkpoint is not compared.
      absent = mock.patch.object(digests, "of_leaves", lambda leaves: {})
      unchecked = mock.patch.object(records, "damaged", lambda record, arrays: [])
      if kind == "with":
        row = measure(state, pathlib.Path(folder) / kind, number)
      else:
        with absent, unchecked:
          row = measure(state, pathlib.Path(folder) / kind, number)
      rows[kind].append(row)
  print(f"{size:.2f} GB in {len(state)} leaves, {jax.default_backend()}; seconds, medians of {_ROUNDS.value}")
  medians = {
    kind: {name: round(statistics.median(row[name] for row in found), 3) for name in found[0]}
    for kind, found in rows.items()
  }
  for kind, found in medians.items():
    print(f"  {kind:8s}" + "".join(f"  {name} {value:.3f}" for name, value in found.items()))
  print(json.dumps({"gigabytes": round(size, 3), **medians}))


if __name__ == "__main__":
  app.run(main)
