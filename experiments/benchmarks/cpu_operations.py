"""Convolutions and attention in the form that they have on a CPU, against jax's own, operation by operation.

  JAX_PLATFORMS=cpu PYTHONPATH=. python experiments/benchmarks/cpu_operations.py \
    --out=experiments/results/cpu_operations.md

Ours are `frozen_vision.ops.convolution.convolve` and `frozen_vision.layers.attention.attention`, jax's
`jax.lax.conv_general_dilated` and `jax.nn.dot_product_attention`. Both run in every round, on the same
float32 arrays, and their outputs are compared first. A ratio is taken within each round.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import rounds, tables
from frozen_vision.layers.attention import attention
from frozen_vision.ops import convolution


@dataclasses.dataclass(frozen=True)
class Pair:
  """One operation on given arrays in both forms.

  Attributes:
    title: what it is, in words.
    by_jax, ours: functions of `arguments`.
  """

  title: str
  by_jax: Callable[..., Any]
  ours: Callable[..., Any]
  arguments: tuple[jax.Array, ...]


def _convolution(batch: int, side: int, inputs: int, outputs: int, size: int, *, groups: int = 1) -> Pair:
  rng = np.random.default_rng(0)
  x = rng.standard_normal((batch, side, side, inputs)).astype(np.float32)
  kernel = rng.standard_normal((size, size, inputs // groups, outputs)).astype(np.float32)
  by_jax = functools.partial(
    jax.lax.conv_general_dilated,
    window_strides=(1, 1),
    padding="SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
  )
  ours = functools.partial(convolution.convolve, groups=groups)
  kind = "depthwise convolution" if groups > 1 else "convolution"
  title = f"{kind} {size} x {size}, {inputs} to {outputs} channels, {batch} maps of {side} x {side}"
  return Pair(title, by_jax, ours, (jnp.asarray(x), jnp.asarray(kernel)))


def _attention(batch: int, tokens: int, heads: int, size: int = 64) -> Pair:
  shape = (batch, tokens, heads, size)
  arrays = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
  title = f"attention, {heads} heads of {size}, {batch} x {tokens} tokens"
  return Pair(title, jax.nn.dot_product_attention, attention, tuple(jnp.asarray(x) for x in arrays))


def pairs(tiny: bool) -> Iterator[tuple[Pair, bool]]:
  """(operation, whether its gradient is measured, too)."""
  if tiny:
    yield _convolution(1, 8, 8, 4, 1), False
    yield _convolution(1, 8, 4, 4, 3), True
    yield _attention(1, 17, 2, 8), True
    return
  for side, inputs, outputs in (
    (56, 256, 64),
    (56, 64, 256),
    (28, 512, 128),
    (14, 1024, 256),
    (7, 2048, 512),
  ):
    yield _convolution(4, side, inputs, outputs, 1), False
  for side, channels in ((112, 32), (28, 240)):
    yield _convolution(4, side, channels, channels, 3, groups=channels), False
  for batch, side, channels in ((8, 32, 64), (4, 80, 64), (4, 40, 256), (256, 7, 64)):
    yield _convolution(batch, side, channels, channels, 3), True
  for batch, tokens, heads in ((4, 197, 6), (4, 577, 6), (4, 1370, 6)):
    yield _attention(batch, tokens, heads), True


def compare(pair: Pair, number_of_rounds: int, *, gradient: bool) -> str:
  """A row of the table.

  Raises:
    ValueError: both forms differ.
  """
  functions = {"jax": pair.by_jax, "ours": pair.ours}
  if gradient:
    weights = jnp.asarray(
      np.random.default_rng(1).standard_normal(jax.eval_shape(pair.by_jax, *pair.arguments).shape),
      jnp.float32,
    )
    functions = {
      name: functools.partial(_gradients, function, weights) for name, function in functions.items()
    }
  jitted = {name: jax.jit(function) for name, function in functions.items()}
  found = {name: function(*pair.arguments) for name, function in jitted.items()}
  for ours, wanted in zip(jax.tree.leaves(found["ours"]), jax.tree.leaves(found["jax"]), strict=True):
    if not np.allclose(ours, wanted, rtol=1e-4, atol=1e-4 * float(jnp.abs(wanted).max())):
      raise ValueError(f"{pair.title}: both forms differ by {float(jnp.abs(ours - wanted).max())}.")
  seconds = rounds.interleaved(
    {name: lambda f=f: jax.block_until_ready(f(*pair.arguments)) for name, f in jitted.items()},
    number_of_rounds,
  )
  milliseconds = (f"{1e3 * np.median(seconds[name]):.2f}" for name in ("jax", "ours"))
  title = f"gradients of: {pair.title}" if gradient else pair.title
  return f"| {title} | {' | '.join(milliseconds)} | {rounds.ratio(seconds['jax'], seconds['ours'])} |"


def _gradients(function: Callable[..., jax.Array], weights: jax.Array, *arguments: jax.Array) -> Any:
  return jax.vjp(function, *arguments)[1](weights)


def main(arguments: Sequence[str] | None = None) -> str:
  """Prints the table; see the flags."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds")
  parser.add_argument("--tiny", action="store_true", help="small shapes, to try it")
  parser.add_argument("--out", help="Markdown file to write")
  options = parser.parse_args(arguments)
  rows = []
  for pair, with_gradient in pairs(options.tiny):
    for gradient in (False, True)[: 1 + with_gradient]:
      rows.append(compare(pair, options.rounds, gradient=gradient))
      print(rows[-1], flush=True)
  text = "\n".join(
    [
      f"Made by `experiments/benchmarks/cpu_operations.py` on {jax.devices()[0].platform} with "
      f"{tables.versions()}: float32, {options.rounds} interleaved rounds.",
      "",
      "| operation | jax, ms | ours, ms | times faster (95% interval) |",
      "|---|---|---|---|",
      *rows,
      "",
    ]
  )
  tables.write(text, options.out)
  return text


if __name__ == "__main__":
  main()
