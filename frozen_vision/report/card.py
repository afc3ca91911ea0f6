"""The card of a backbone: what it costs, whatever it is used for."""

import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from frozen_vision.config import Config
from frozen_vision.files import trees
from frozen_vision.freezing import prepare
from frozen_vision.planning import flops, machines
from frozen_vision.report import entries

SIDE = 224
_BATCH = 8
_SECONDS = 5.0  # that images are timed for, after a first pass
_LEAST = 3  # passes


def make(entry: entries.Entry) -> dict[str, Any]:
  """Counts and times a backbone, frozen and folded, on images of `SIDE` pixels.

  Returns:
    `variant`, `weights` (its fingerprint), `licence`, `parameters`, `storage_bytes` of the frozen program and
    `storage` in words, `flops` of one image, `images_per_second` with the `machine` and `batch` it was
    timed with, `embed_dim`, `strides` and `channels` of its maps, `mean` and `std` of its input.

  Raises:
    ValueError, OSError: weights that cannot be read.
  """
  backbone = prepare.Backbones().of(Config(backbone=entry.options))
  module, program = backbone.module, backbone.program
  images = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
  leaves = [leaf for leaf in jax.tree.leaves(program) if hasattr(leaf, "dtype")]
  preprocessing = module.preprocessing
  return {
    "variant": entry.options.name,
    "weights": backbone.key["weights"],
    "licence": entry.licence,
    "parameters": sum(math.prod(leaf.shape) for leaf in _weights(module)),
    "storage": backbone.storage,
    "storage_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
    "flops": flops.count(lambda program, images: program.embed(images), program, images),
    "images_per_second": _speed(program),
    "machine": f"{machines.processor()}, {jax.default_backend()}",
    "batch": _BATCH,
    "side": SIDE,
    "embed_dim": module.embed_dim,
    "strides": [spec.stride for spec in module.feature_specs],
    "channels": [spec.channels for spec in module.feature_specs],
    "mean": [float(value) for value in np.ravel(preprocessing.mean)],
    "std": [float(value) for value in np.ravel(preprocessing.std)],
  }


def _weights(module: Any) -> list[Any]:
  return jax.tree.leaves(trees.weights(module))


def _speed(program: Any) -> float:
  """Images per second: the median over passes of one batch, after one that compiles."""
  embed = jax.jit(lambda program, images: program.embed(images))
  images = jnp.asarray(np.random.default_rng(0).normal(size=(_BATCH, SIDE, SIDE, 3)), jnp.float32)
  jax.block_until_ready(embed(program, images))
  seconds: list[float] = []
  while len(seconds) < _LEAST or sum(seconds) < _SECONDS:
    started = time.perf_counter()
    jax.block_until_ready(embed(program, images))
    seconds.append(time.perf_counter() - started)
  return _BATCH / statistics.median(seconds)
