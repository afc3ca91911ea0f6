"""Price of the bound on steps in flight: the training loop with two of them, and without a bound.

  PYTHONPATH=. python experiments/benchmarks/run_ahead.py --config=configs/coco_htc.py --rounds=7 --steps=60 \
    --out=experiments/results/run_ahead.md

Before the loop dispatches a step it waits until at most two are not known to be done, so that a signal is
answered soon and a batch that cannot be read is announced in time (`training/reading.py`). Whole runs of a
config take turns, with the bound and without; the time of a step is what their logs say, without the first.
"""

import argparse
from collections.abc import Sequence
import tempfile
from unittest import mock

import jax

from experiments import rounds, tables
from frozen_vision import config_files
from frozen_vision.config import Config
from frozen_vision.planning import machines
from frozen_vision.runs import curves
from frozen_vision.training import loop, reading

_BOUNDS = {"2 steps in flight": reading.IN_FLIGHT, "no bound": 2**60}


def seconds_per_step(config: Config, bound: int) -> float:
  """Trains in a folder that goes afterwards; the time of all steps but the first, data included."""
  with (
    tempfile.TemporaryDirectory() as folder,
    mock.patch.object(reading, "IN_FLIGHT", bound),
  ):
    loop.train(config, folder)
    [(step, seconds)] = curves.read_metrics(f"{folder}/metrics.jsonl")["speed/step_time"]
  if step != config.steps:
    raise ValueError(f"The run of {config.steps} steps logged its rate at step {step}.")
  return seconds


def compare(config: Config, steps: int, number_of_rounds: int) -> str:
  """Runs the comparison and returns the table."""
  every = dict(log_every=steps, checkpoint_every=steps, eval_every=0, pictures=0, tensorboard=False)
  config = config.replace({"steps": steps, **every})
  found = rounds.reported(
    {name: lambda bound=bound: seconds_per_step(config, bound) for name, bound in _BOUNDS.items()},
    number_of_rounds,
  )
  lines = [
    f"Made by `experiments/benchmarks/run_ahead.py`: runs of {steps} steps of {config.batch_size}, "
    f"{number_of_rounds} interleaved rounds, on {jax.device_count()} x {jax.devices()[0].device_kind} and "
    f"{machines.processor()}.",
    "",
    "| loop | ms a step, median (95% interval) | of the time without a bound |",
    "|---|---|---|",
  ]
  for name, values in found.items():
    cells = [
      name,
      rounds.median([1e3 * x for x in values], "{:.1f}"),
      rounds.ratio(values, found["no bound"]),
    ]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(prog="experiments/benchmarks/run_ahead.py")
  parser.add_argument("--config", required=True, help="a config file, as of frozen_vision.main")
  parser.add_argument("--steps", type=int, default=60)
  parser.add_argument("--rounds", type=int, default=7, help="from 6 on, intervals are known")
  parser.add_argument("--out", help="Markdown file to write")
  options = parser.parse_args(arguments)
  config = config_files.load_config(options.config)
  tables.publish(compare(config, options.steps, options.rounds), options.out)


if __name__ == "__main__":
  main()
