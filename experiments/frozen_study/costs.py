"""FLOPs of a training step and the memory of its temporaries, of every variant and recipe of a grid.

Each is traced and compiled on shapes for one CPU device, as in `--mode=plan`; nothing is run. Results are
kept in WORKDIR/costs, so that a variant is compiled once.
"""

import hashlib
import json
from typing import Any

from frozen_vision.config import Config
from frozen_vision.devices import sharding
from frozen_vision.files import atomic
from frozen_vision.planning import machines
from frozen_vision.planning import plan as planning
from frozen_vision.report import cells


def measure(plan: cells.Plan) -> dict[str, dict[str, float]]:
  """{LABEL/RECIPE: `flops` and bytes of `temporaries` of one step} of the trained recipes of a grid."""
  found = {}
  for entry in plan.backbones:
    for recipe in plan.rows:
      if plan.known[recipe].kind == "train":
        found[f"{entry.label}/{recipe}"] = _of(plan, cells.Cell(entry, recipe, 0), compile_it=True)
  return found


def read(plan: cells.Plan) -> dict[str, dict[str, float]]:
  """What `measure` has kept."""
  found = {}
  for entry in plan.backbones:
    for recipe in plan.rows:
      if plan.known[recipe].kind == "train":
        cost = _of(plan, cells.Cell(entry, recipe, 0), compile_it=False)
        if cost:
          found[f"{entry.label}/{recipe}"] = cost
  return found


def _of(plan: cells.Plan, cell: cells.Cell, *, compile_it: bool) -> dict[str, Any]:
  fingerprint = json.dumps(plan.fingerprint(cell), sort_keys=True, default=str)
  digest = hashlib.sha256(fingerprint.encode()).hexdigest()[:24]
  path = plan.workdir / "costs" / f"{digest}.json"
  if path.is_file():
    return json.loads(path.read_text(encoding="utf-8"))
  if not compile_it:
    return {}
  cost = of_step(plan.config(cell))
  path.parent.mkdir(parents=True, exist_ok=True)
  atomic.write_json(path, cost)
  return cost


def of_step(config: Config) -> dict[str, float]:
  """`flops`, counted from the trace, and bytes of `temporaries`, by the compiler, of one training step."""
  config = planning.without_files(config)
  mesh = sharding.make_mesh(devices=machines.describe("cpu:1").devices)
  program = planning.make_program(planning.build_task(config), config, mesh)
  memory = program.compile().memory_analysis()
  return {"flops": float(planning.program_flops(program)), "temporaries": float(memory.temp_size_in_bytes)}
