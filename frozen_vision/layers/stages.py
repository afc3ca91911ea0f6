"""Networks of stages: blocks at one stride, then a merging that leads to the next."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flax import nnx
import jax
import numpy as np

from frozen_vision.ops.arrays import Array


def drop_path_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
  """Rates of stochastic depth of every stage's blocks, growing linearly from 0 at the first to `last`.

  The rule of Swin's and ConvNeXt's released code; Huang et al. 2016, section 3.

  Args:
    last: the rate of the last block of all.
    depths: blocks of each stage.
  """
  rates = iter(np.linspace(0, last, sum(depths)).tolist())
  return [[next(rates) for _ in range(depth)] for depth in depths]


def build(stage: Callable[..., nnx.Module], config: Any, *, dtype: Any, rngs: nnx.Rngs) -> nnx.List:
  """The stages of a network, `stage(config, index, rates of its blocks)`, with stochastic depth as above.

  Args:
    config: its `depths` and `drop_path_rate` count.
  """
  rates = drop_path_rates(config.drop_path_rate, config.depths)
  return nnx.List([stage(config, i, rates[i], dtype=dtype, rngs=rngs) for i in range(len(config.depths))])


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
