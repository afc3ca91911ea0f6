"""Comparison of states and of runs to the bit."""

import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from frozen_vision.runs import checkpoints, state_leaves


def assert_equal(found, wanted):
  """Asserts that two trees have the same leaves: their kinds, dtypes and bytes."""
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  found, wanted = (state_leaves.flatten(t)[0] for t in (found, wanted))
  assert state_leaves.describe(found) == state_leaves.describe(wanted)
  for path, a in wanted.items():
    b = found[path]
    if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    assert isinstance(a, jax.Array) == isinstance(b, jax.Array), path
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def checkpoint(workdir: str | os.PathLike) -> tuple[int, dict[str, str]]:
  """(step, {path: checksum of an array}) of the newest checkpoint, as its record has them."""
  with checkpoints.Checkpoints(workdir) as store:
    step = store.latest_step()
  path = pathlib.Path(workdir) / "checkpoints" / str(step) / "meta" / "metadata"
  return step, json.loads(path.read_text())["digests"]


def log_lines(workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """Lines of the log without what a clock says and without counts of compilations."""
  rows = []
  for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines():
    row = {
      key: value
      for key, value in json.loads(line).items()
      if not any(part in key for part in ("speed", "second", "time", "compilations"))
    }
    if set(row) - {"step"}:
      rows.append(row)
  return rows
