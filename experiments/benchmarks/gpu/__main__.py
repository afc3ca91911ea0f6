"""One part of `gpu.sh`, in a process of its own: `python -m experiments.benchmarks.gpu 3 --out=build/gpu`."""

import argparse
import pathlib
import warnings

from experiments.benchmarks.gpu import (
  accuracy,
  dinov3,
  giant,
  inference,
  kernels,
  report,
  shared_pass,
  train_steps,
)

PARTS = {
  1: accuracy.PART,
  2: inference.PART,
  3: giant.PART,
  4: train_steps.PART,
  5: shared_pass.PART,
  6: kernels.PART,
  7: inference.PART_OF_FAMILIES,
  8: dinov3.PART,
}


def main() -> None:
  parser = argparse.ArgumentParser(prog="experiments.benchmarks.gpu", description=__doc__)
  parser.add_argument("part", type=int, choices=PARTS)
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the tables")
  parser.add_argument("--seconds", type=float, default=600.0, help="until this process is cut")
  parser.add_argument("--tiny", action="store_true", help="toy sizes")
  arguments = parser.parse_args()
  warnings.filterwarnings("ignore", category=DeprecationWarning)
  part = PARTS[arguments.part]
  table = report.Report(arguments.part, part, arguments.out, seconds=arguments.seconds, tiny=arguments.tiny)
  part.run(table)
  table.finish()


if __name__ == "__main__":
  main()
