"""Compiling several programs at once, and timing them in turns."""

from collections.abc import Callable, Mapping, Sequence
import concurrent.futures
import dataclasses
import math
import os
import statistics
import time
from typing import Any

import jax
import numpy as np

from experiments import intervals
from frozen_vision.planning import flops as flops_lib

# Runs the program so many times and waits until the device is done.
Run = Callable[[int], None]
# Half the time of compiling on a CPU with jax 0.10; jax 0.12 no longer has it.
_QUICK = {"xla_cpu_use_fusion_emitters": False}


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A compiled program and what the compiler says of it.

  Attributes:
    call: the program.
    flops: of its matrix products and convolutions, counted from the trace; loops of unknown length are zero.
    compile_s: seconds; short where the persistent cache has the program.
    bytes: peak of device memory by the compiler: arguments, outputs, temporaries; donated arguments once.
    weight_bytes: of the arguments.
    temporary_bytes: of the temporaries.
  """

  call: Any
  flops: int
  compile_s: float
  bytes: int
  weight_bytes: int
  temporary_bytes: int


def compile_all(
  programs: Mapping[Any, tuple[Callable, Sequence[Any]]], *, donate: bool = False, quick: bool = False
) -> dict[Any, Any]:
  """Traces programs one after the other, and compiles them at the same time.

  Args:
    programs: {name: (function, arguments)}; arguments are arrays or `jax.ShapeDtypeStruct`s in any tree.
    donate: the first argument of each is donated.
    quick: compile faster to slower programs, where the compiler has an option for it.

  Returns:
    {name: Compiled, or the exception of a program that the compiler refuses}.
  """
  traced = {
    name: jax.jit(function, donate_argnums=(0,) if donate else ()).trace(*arguments)
    for name, (function, arguments) in programs.items()
  }

  def build(name: str) -> Any:
    lowered = traced[name].lower()
    started = time.perf_counter()
    try:
      compiled = _compile(lowered, quick)
    except jax.errors.JaxRuntimeError as error:
      return error
    memory = compiled.memory_analysis()
    size = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    return Compiled(
      compiled,
      flops_lib.count_jaxpr(traced[name].jaxpr.jaxpr),
      time.perf_counter() - started,
      size - memory.alias_size_in_bytes,
      memory.argument_size_in_bytes,
      memory.temp_size_in_bytes,
    )

  with concurrent.futures.ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
    return dict(zip(programs, pool.map(build, programs)))


def _compile(lowered: jax.stages.Lowered, quick: bool) -> jax.stages.Compiled:
  if quick:
    try:
      return lowered.compile(compiler_options=_QUICK)
    except jax.errors.JaxRuntimeError as error:
      if "No such compile option" not in str(error):
        raise
  return lowered.compile()


def repeat(call: Callable[..., Any], *arguments: Any) -> Run:
  """Runs a program on the same arguments, one call queued behind the other."""

  def run(times: int) -> None:
    for _ in range(times):
      output = call(*arguments)
    jax.block_until_ready(output)

  return run


def interleave(
  runs: Mapping[str, Run], *, rounds: int, round_s: float, seconds: float = math.inf
) -> dict[str, list[float]]:
  """Times programs in turns, each round beginning with another one.

  Args:
    rounds: at most; after `seconds` no further round starts.
    round_s: how long one program runs in a round, at least one call.

  Returns:
    {name: seconds a call, one for each round}.
  """
  started = time.perf_counter()
  calls = {}
  for name, run in runs.items():
    run(1)
    single = time.perf_counter()
    run(1)
    calls[name] = max(1, round(round_s / max(time.perf_counter() - single, 1e-6)))
  names, taken = list(runs), {name: [] for name in runs}
  for turn in range(rounds):
    if turn and time.perf_counter() - started > seconds:
      break
    first = turn % len(names)
    for name in names[first:] + names[:first]:
      before = time.perf_counter()
      runs[name](calls[name])
      taken[name].append((time.perf_counter() - before) / calls[name])
  return taken


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> str:
  """`1.52 (1.48 to 1.60)`: times as long as ours within a round, median and 95% interval."""
  median, low, high = intervals.median_interval(np.asarray(theirs) / np.asarray(ours))
  return f"{median:.2f}" if math.isnan(low) else f"{median:.2f} ({low:.2f} to {high:.2f})"


def milliseconds(seconds: Sequence[float]) -> str:
  """`12.3 (12.1 to 12.9)`: median and range."""
  scaled = [1e3 * value for value in seconds]
  return f"{statistics.median(scaled):.2f} ({min(scaled):.2f} to {max(scaled):.2f})"
