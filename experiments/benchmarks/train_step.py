"""Savings of freezing: the train step of a config as it is, and with everything training, in one run.

  PYTHONPATH=. python experiments/benchmarks/train_step.py --config=configs/coco_htc.py \
    --out=experiments/results/train_step.md

Times are medians over interleaved rounds; FLOPs and memory are the compiler's figures of the same programs
(the body of a loop counts once).
"""

import time

from absl import flags
import jax
import numpy as np

from experiments import compiled_step, tables
from frozen_vision import command_line

_CONFIG = command_line.define_config("The configuration; its data is read.")
_OUT = flags.DEFINE_string("out", None, "Markdown file to write; printed only, if absent.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Rounds of the timing.")


def _main(argv: list[str]) -> None:
  del argv
  runs = {}
  for name, trainable in (("backbone frozen", _CONFIG.value.trainable), ("everything trains", (".*",))):
    config = _CONFIG.value.replace({"trainable": trainable})
    runs[name] = {**compiled_step.prepare(config), "seconds": []}
  for _ in range(_ROUNDS.value):
    for run in runs.values():
      started = time.perf_counter()
      run["state"], scalars = run["compiled"](run["state"], run["frozen"], run["batch"])
      jax.block_until_ready(scalars)
      run["seconds"].append(time.perf_counter() - started)
  columns = ("gflop", "temporary_mb", "state_mb", "frozen_mb", "compile_s")
  rows = [
    "| step | median ms (range) | GFLOP | temporaries MB | trained parameters and optimizer MB | frozen MB "
    "| compile s |",
    "|---|" + "---|" * 6,
  ]
  for name, run in runs.items():
    times = 1e3 * np.asarray(run["seconds"])
    values = " | ".join(f"{run[column]:.1f}" for column in columns)
    rows.append(f"| {name} | {np.median(times):.0f} ({times.min():.0f} to {times.max():.0f}) | {values} |")
  text = "\n".join(rows) + "\n"
  print(text)
  tables.write(
    f"Made by `experiments/benchmarks/train_step.py`, {_ROUNDS.value} rounds, batch "
    f"{_CONFIG.value.batch_size}, on {jax.devices()[0].device_kind}.\n\n{text}",
    _OUT.value,
  )


if __name__ == "__main__":
  flags.mark_flags_as_required(["config"])
  command_line.run(_main)
