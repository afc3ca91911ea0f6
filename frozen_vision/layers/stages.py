"""Networks of stages: blocks at one stride, then a merging that leads to the next."""

from collections.abc import Iterable
from typing import Any

import jax

from frozen_vision.ops.arrays import Array


def features(stages: Iterable[Any], x: Array, rng: Array | None) -> tuple[Array, ...]:
  """Runs all stages and returns the output of each, before its merging.

  Args:
    stages: modules with `blocks`, called with the map and a key or None, and `downsample`, None in the last.
    x: the map that enters the first stage, channels last.
    rng: key of stochastic depth, of which every block gets its own; None is deterministic.
  """
  maps = []
  index = 0
  for stage in stages:
    for block in stage.blocks:
      x = block(x, None if rng is None else jax.random.fold_in(rng, index))
      index += 1
    maps.append(x)
    if stage.downsample is not None:
      x = stage.downsample(x)
  return tuple(maps)
