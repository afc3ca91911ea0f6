"""Runs grids of the frozen study: what suits a frozen backbone, what makes it flexible, what size brings.

  PYTHONPATH=. python experiments/frozen_study/run.py --grid=pretraining --workdir=/tmp/study

`grids.py` has the grids in tables: `pretraining`; `heads_detection`, `heads_segmentation`, `heads_action` and
`inside`; `size`; `shared`, the upper bound; and of other papers `reuse_...` (Proper Reuse, 2204.00484) and
`pretraining_tuned` (feature distillation, 2205.14141). Without --grid all are run.

A cell is one run of a variant, a task and a seed, as in `--mode=report`: in a process of its own, and never
run again when it is finished. Grids share a workdir, and cells that are in several of them. `GRID.md`, with a
verdict on each statement of a paper, `.html` and `.json` are written to WORKDIR/pages, or --out.

  --weights=FOLDER    weights of experiments/pretrained_weights.py that do not ship with the package
  --data=FOLDER       with coco_subset, cifar10_jpeg and caltech101, for the grids that read data
  --only=LABEL,LABEL  some variants      --collect  run nothing, make the pages from what is there
  --print_commands    a command for every cell that is to be run; with --budget=paper the runs at full scale
  --separate          every cell computes its own features, to compare the time; in a workdir of its own
  --costs             also count FLOPs of a step and the memory of its temporaries, by compiling it
"""

from frozen_vision.devices import huge_pages

if __name__ == "__main__":
  huge_pages.restart()  # before the imports below, which take seconds

import argparse
from collections.abc import Sequence
import json
import logging
import pathlib
import shlex
import sys

from experiments.frozen_study import costs, findings, grids, paper, parts, plans, recipes
from frozen_vision.files import lock
from frozen_vision.report import command, single, words

_SCRIPT = str(pathlib.Path(__file__).resolve())


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line; `runner` becomes the command of one cell, but for the grid and the cell."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--grid", default="", help=f"of {', '.join(grids.GRIDS)}, separated by commas")
  parser.add_argument("--workdir", type=_path, required=True)
  parser.add_argument("--weights", type=_path)
  parser.add_argument("--data", type=_path)
  parser.add_argument("--out", type=_path)
  parser.add_argument("--only", default="")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--budget", choices=["demo", "small", "paper"], default="demo")
  parser.add_argument("--option", action="append", default=[], help="RECIPE:OPTION=VALUE, of all variants")
  parser.add_argument("--separate", action="store_true")
  parser.add_argument("--tiny", action="store_true", help="two steps on a handful of examples")
  parser.add_argument("--costs", action="store_true")
  parser.add_argument("--collect", action="store_true")
  parser.add_argument("--print_commands", action="store_true")
  parser.add_argument("--cell", help="run this one alone: LABEL/RECIPE/SEED")
  asked = parser.parse_args(arguments)
  asked.grid = [name for name in asked.grid.split(",") if name] or list(grids.GRIDS)
  asked.only = [label for label in asked.only.split(",") if label]
  if unknown := sorted(set(asked.grid) - set(grids.GRIDS)):
    parser.error(f"--grid has {', '.join(unknown)}; known: {', '.join(grids.GRIDS)}")
  labels = {variant.label for name in asked.grid for variant in grids.GRIDS[name].variants}
  if unknown := sorted(set(asked.only) - labels):
    parser.error(f"--only has {', '.join(unknown)}; known: {', '.join(sorted(labels))}")
  if asked.cell and len(asked.grid) != 1:
    parser.error("--cell needs --grid")
  if asked.budget == "paper" and not asked.print_commands:
    parser.error("--budget=paper is for --print_commands: its runs need many accelerators")
  asked.runner = _runner(asked)
  return asked


def _path(text: str) -> pathlib.Path:
  return pathlib.Path(text).expanduser().absolute()


def _runner(asked: argparse.Namespace) -> tuple[str, ...]:
  flags = [
    f"--{name}={getattr(asked, name)}" for name in ("workdir", "weights", "data") if getattr(asked, name)
  ]
  flags += [f"--seeds={asked.seeds}", f"--budget={asked.budget}"]
  flags += [f"--only={','.join(asked.only)}"] * bool(asked.only) + ["--tiny"] * asked.tiny
  flags += ["--separate"] * asked.separate
  return ("python", _SCRIPT, *flags, *(f"--option={option}" for option in asked.option))


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; the exit status is 1 if a cell failed."""
  asked = read_arguments(arguments)
  failed = False
  for name in asked.grid:
    if asked.budget == "paper":
      for line in paper.commands(name, asked.workdir):
        print(shlex.join(line))
      continue
    plan, absent = plans.make_plan(name, asked)
    if recipes.PART in plans.needs(grids.GRIDS[name]):
      parts.of_cifar10(asked.data, asked.workdir / "parts")
    try:
      if asked.cell:
        single.run(plan, plan.cell(asked.cell))
        return 0
      if asked.print_commands:
        command.print_commands(plan)
        continue
      found = [] if asked.collect else command.run(plan)
    except single.Interrupted as error:
      print(error, file=sys.stderr)
      return single.INTERRUPTED
    except lock.LockedError as error:
      print(error, file=sys.stderr)
      return single.LOCKED
    failed |= any(each.state != "finished" for each in found)
    measured = costs.measure(plan) if asked.costs else costs.read(plan)
    path = findings.write(name, plan, absent, measured, asked.out or asked.workdir / "pages")
    counts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    print(f"{name}: {words.state(counts)} {path}", flush=True)
  return int(failed)


if __name__ == "__main__":
  logging.basicConfig(
    level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
  )
  logging.getLogger("frozen_vision").setLevel(logging.INFO)
  sys.exit(main())
