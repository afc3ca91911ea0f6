"""Gain of huge pages for a train step on a CPU, as `frozen_vision.main` asks the C library for them.

  PYTHONPATH=. python experiments/benchmarks/huge_pages.py --config=configs/coco_htc.py \
    --out=experiments/results/huge_pages.md

The same step in processes that take turns, with GLIBC_TUNABLES=glibc.malloc.hugetlb=0 and =1. glibc reads it
when a process starts.
"""

import json
import os
import resource
import subprocess
import sys
import time

from absl import flags
import jax
import numpy as np

from experiments import compiled_step, tables
from frozen_vision import command_line
from frozen_vision.planning import machines

_CONFIG = command_line.define_config("The configuration; its data is read.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Processes of each kind.")
_STEPS = flags.DEFINE_integer("steps", 20, "Steps that a process is timed for.")
_CHILD = flags.DEFINE_bool("child", False, "Measure in this process and print the figures.")
_OUT = flags.DEFINE_string("out", None, "Markdown file to write; printed only, if absent.")

_FIGURES = ("ms a step", "of CPU time in the kernel, ms", "page faults")


def measure() -> list[float]:
  """The figures of this process: medians and means over a step."""
  run = compiled_step.prepare(_CONFIG.value)
  state, seconds = run["state"], []
  for step in range(_STEPS.value + 2):
    if step == 2:  # the first ones touch memory for the first time
      before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.perf_counter()
    state, scalars = run["compiled"](state, run["frozen"], run["batch"])
    jax.block_until_ready((state, scalars))
    seconds.append(time.perf_counter() - started)
  after = resource.getrusage(resource.RUSAGE_SELF)
  return [
    1e3 * float(np.median(seconds[2:])),
    1e3 * (after.ru_stime - before.ru_stime) / _STEPS.value,
    (after.ru_minflt - before.ru_minflt) / _STEPS.value,
  ]


def _main(argv: list[str]) -> None:
  del argv
  if _CHILD.value:
    print(json.dumps(measure()))
    return
  found = {"4 KiB pages": [], "huge pages": []}
  for _ in range(_ROUNDS.value):
    for number, rows in enumerate(found.values()):
      environment = os.environ | {"GLIBC_TUNABLES": f"glibc.malloc.hugetlb={number}"}
      process = subprocess.run(
        [sys.executable, *sys.argv, "--child"], env=environment, check=True, capture_output=True, text=True
      )
      rows.append(json.loads(process.stdout.splitlines()[-1]))
      print(list(found)[number], rows[-1], flush=True)
  lines = ["| pages | " + " | ".join(_FIGURES) + " |", "|---" * (len(_FIGURES) + 1) + "|"]
  for name, rows in found.items():
    cells = [f"{np.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})" for values in zip(*rows)]
    lines.append(f"| {name} | " + " | ".join(cells) + " |")
  name = _CONFIG.source
  text = (
    f"Made by `experiments/benchmarks/huge_pages.py --config={name}` on {machines.processor()}: the train "
    f"step, median (smallest to largest) of {_ROUNDS.value} processes each, taking turns.\n\n"
    + "\n".join(lines)
    + "\n"
  )
  tables.publish(text, _OUT.value)


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  command_line.run(_main)
