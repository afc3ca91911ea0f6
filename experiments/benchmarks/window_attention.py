"""Memory of SwinV2's attention in windows: XLA's program, and the kernel that keeps scores on the chip.

  PYTHONPATH=. python experiments/benchmarks/window_attention.py --out=experiments/results/window_attention.md
  PYTHONPATH=. python experiments/benchmarks/window_attention.py --tiny   # seconds, needs no libtpu

Compiles one shifted attention of a stage of SwinV2-G for one TPU chip that nobody has to own (libtpu), as a
block has it: the shift, queries, keys and values of one image's map, attention, and the shift back. Nothing
is run.

Bytes moved are the compiler's count of what its operations read and write in the chip's memory. It counts
the body of a loop once; here each body is compiled by itself and counted as often as it runs.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import itertools
import math
from typing import Any
from unittest import mock

import jax
from jax.extend import core
import jax.numpy as jnp

from experiments import tables
from frozen_vision.backbones.swinv2 import config as swinv2_config
from frozen_vision.backbones.swinv2 import window_kernel, windows
from frozen_vision.devices import sharding
from frozen_vision.planning import machines

# Image side, and window side in cells.
_SETTINGS = {"HTC": (1536, 32), "Mask2Former": (640, 40), "Mask2Former, large": (896, 56)}


@dataclasses.dataclass(frozen=True)
class Case:
  """One attention: a map of `side` x `side` cells in windows of `window` x `window`."""

  side: int
  window: int
  heads: int
  channels: int

  @property
  def inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """One image's map; weights of queries, keys and values; scale; bias of every relative position."""
    offsets = (2 * min(self.window, self.side) - 1) ** 2
    return (
      jax.ShapeDtypeStruct((1, self.side, self.side, self.channels), jnp.bfloat16),
      jax.ShapeDtypeStruct((self.channels, 3 * self.channels), jnp.bfloat16),
      jax.ShapeDtypeStruct((self.heads,), jnp.float32),
      jax.ShapeDtypeStruct((offsets, self.heads), jnp.float32),
    )

  def by_xla(self, x: jax.Array, weights: jax.Array, scale: jax.Array, table: jax.Array) -> jax.Array:
    bias = windows.pair_bias(table, (min(self.window, self.side),) * 2)

    def attention(x, window, regions):
      return windows.cosine_attention(x @ weights, window, scale, bias, regions)

    return windows.attend_in_windows(x, self.window, True, attention, self.heads)

  def by_kernel(self, x: jax.Array, weights: jax.Array, scale: jax.Array, table: jax.Array) -> jax.Array:
    def attention(x, window, shift):
      by_head = windows.table_by_head(table, window)
      return windows.attention_on_chip(x @ weights, window, scale, by_head, shift)

    return windows.attend_on_chip(x, self.window, True, attention)


def measure(
  function: Callable[..., Any], inputs: Sequence[jax.ShapeDtypeStruct], device: jax.Device
) -> tuple[int, float]:
  """(bytes of temporaries, bytes moved) of a function compiled for a device."""
  mesh = sharding.make_mesh(devices=[device])
  with jax.set_mesh(mesh):
    temporaries, moved, _ = _costs(jax.make_jaxpr(function)(*inputs), mesh)
  return temporaries, moved


def _costs(program: core.ClosedJaxpr, mesh: jax.sharding.Mesh) -> tuple[int, float, float]:
  """Bytes of temporaries, bytes moved, and those that the compiler counts: of a loop, one run of its body."""
  place = sharding.replicated(mesh)
  inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in program.in_avals]
  compiled = jax.jit(core.jaxpr_as_fun(program)).lower(*inputs).compile()
  counted = compiled.cost_analysis()["bytes accessed"]
  moved = counted
  for body, times in _loops(program.jaxpr):
    _, of_body, counted_of_body = _costs(body, mesh)
    moved += times * of_body - counted_of_body
  return compiled.memory_analysis().temp_size_in_bytes, moved, counted


def _loops(program: core.Jaxpr) -> Iterator[tuple[core.ClosedJaxpr, int]]:
  """The outermost loops of a program: body, and how often it runs."""
  for equation in program.eqns:
    if equation.primitive.name == "scan":
      yield equation.params["jaxpr"], equation.params["length"]
    elif equation.primitive.name != "pallas_call":  # the kernel says itself what it moves
      for value in itertools.chain.from_iterable(
        value if isinstance(value, tuple | list) else [value] for value in equation.params.values()
      ):
        if isinstance(value, core.ClosedJaxpr | core.Jaxpr):
          yield from _loops(getattr(value, "jaxpr", value))


def _cases(config: swinv2_config.SwinV2Config, image: int, window: int, stages: Sequence[int]) -> list[Case]:
  return [
    Case(image // (4 * 2**stage), window, config.num_heads[stage], config.stage_channels(stage))
    for stage in stages
  ]


def main(arguments: Sequence[str] | None = None) -> str:
  """Compiles, and returns the table."""
  parser = argparse.ArgumentParser(prog="experiments/benchmarks/window_attention.py")
  parser.add_argument("--topology", default="v5e:1x1", help="as of --mode=plan")
  parser.add_argument("--stages", default="1,3", help="of SwinV2-G, from 1; the third has 42 of 50 blocks")
  parser.add_argument("--tiny", action="store_true", help="a small backbone for the CPU, kernel interpreted")
  parser.add_argument("--out", help="Markdown file to write")
  options = parser.parse_args(arguments)
  name, topology, settings = "swinv2_g", options.topology, _SETTINGS
  if options.tiny:
    name, topology, settings = "swinv2_nano", "cpu:1", {"any": (64, 8)}
  stages = [int(stage) - 1 for stage in options.stages.split(",")]
  device = machines.describe(topology).devices[0]
  with mock.patch.object(window_kernel, "INTERPRET", options.tiny):
    rows = _rows(swinv2_config.VARIANTS[name], settings, stages, device)
  lines = [
    f"Made by `experiments/benchmarks/window_attention.py` with {tables.versions()}: one shifted attention "
    f"of {name}, forward, bfloat16, one image, compiled for one chip of {topology}, never run.",
    "",
    "| head | image px | stage | map | window | heads | scores, float32 GiB | temporaries MiB: XLA | kernel "
    "| moved GiB: XLA | kernel |",
    "|---" * 11 + "|",
    *rows,
  ]
  text = "\n".join(lines) + "\n"
  tables.publish(text, options.out)
  return text


def _rows(
  config: swinv2_config.SwinV2Config,
  settings: Mapping[str, tuple[int, int]],
  stages: Sequence[int],
  device: jax.Device,
) -> list[str]:
  rows = []
  for head, (image, window) in settings.items():
    for stage, case in zip(stages, _cases(config, image, window, stages), strict=True):
      found = [measure(function, case.inputs, device) for function in (case.by_xla, case.by_kernel)]
      inside = min(case.window, case.side)
      scores = case.heads * math.ceil(case.side / inside) ** 2 * inside**4 * 4
      cells = [head, image, stage + 1, f"{case.side} x {case.side}", inside, case.heads, scores / 2**30]
      cells[-1] = f"{cells[-1]:.2g}"
      cells += [f"{temporaries / 2**20:,.0f}" for temporaries, _ in found]
      cells += [f"{moved / 2**30:.3g}" for _, moved in found]
      rows.append(f"| {' | '.join(map(str, cells))} |")
      print(rows[-1], flush=True)
  return rows


if __name__ == "__main__":
  main()
