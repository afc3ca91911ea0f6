"""Checksums see one flipped bit and do not see how an array is sharded."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from frozen_vision.runs import digests

_ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
  "dtype", [np.float32, np.float64, np.int8, np.bool_, ml_dtypes.bfloat16, np.complex64]
)
def test_every_bit_counts(dtype):
  rng = np.random.default_rng(0)
  array = rng.integers(0, 2, (5, 7, 3)).astype(dtype)
  before = digests.of_leaves({"w": array})["w"]
  seen = {before}
  raw = array.view(np.uint8).reshape(-1)
  for byte in range(0, raw.size, 5):
    for bit in range(8):
      raw[byte] ^= 1 << bit
      seen.add(digests.of_leaves({"w": array})["w"])
      raw[byte] ^= 1 << bit
  assert len(seen) == 1 + 8 * len(range(0, raw.size, 5))
  assert digests.of_leaves({"w": array})["w"] == before


def test_order_and_length_count():
  numbers = np.arange(200_000, dtype=np.float32)  # several blocks
  swapped = numbers.copy()
  swapped[[3, 150_000]] = swapped[[150_000, 3]]
  found = digests.of_leaves({"a": numbers, "b": swapped, "c": numbers[::-1], "d": jnp.asarray(numbers)})
  assert len(set(found.values())) == 3 and found["a"] == found["d"]


def test_records_are_compared_whatever_their_order():
  assert digests.of_record({"a": 1, "b": {"c": float("nan"), "d": 2}}) == digests.of_record(
    {"b": {"d": 2, "c": float("nan")}, "a": 1}
  )
  assert digests.of_record({"a": 1}) != digests.of_record({"a": 1.0})


_MESHES = """
import itertools, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from frozen_vision.runs import digests
w = np.random.default_rng(0).standard_normal((8, 4, 16)).astype(np.float32)
key = jax.random.split(jax.random.key(3), 8)
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
seen = set()
for spec in itertools.product((None, "a", "b"), repeat=3):
  if len([axis for axis in spec if axis]) == len({axis for axis in spec if axis}):
    seen.add(digests.of_leaves({"w": jax.device_put(w, NamedSharding(mesh, P(*spec)))})["w"])
assert seen == {digests.of_leaves({"w": w})["w"]}, seen
shardings = [NamedSharding(mesh, P(axis)) for axis in (None, "a")]
keys = {digests.of_leaves({"k": jax.device_put(key, sharding)})["k"] for sharding in shardings}
assert len(keys) == 1
"""


def test_no_mesh_changes_a_checksum():
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(_ROOT),
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
  }
  subprocess.run([sys.executable, "-c", _MESHES], check=True, env=environment)
  assert jax.process_count() == 1
