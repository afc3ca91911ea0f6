"""FLOPs of a training step of Proper Reuse's four detectors: frozen, fine-tuned, and frozen with adapters.

  PYTHONPATH=. python experiments/training_flops.py --out=experiments/results/training_flops.md

Steps of one image are traced on shapes: nothing is compiled or run, and no weights or data are needed. Matrix
products and convolutions count, two FLOPs a multiply-add, and scanned blocks as often as they run
(`planning.flops`); of a step with an unrolled backbone, whose loops are few, the figure of the lowered
program, by XLA's cost analysis, stands beside it. Each detector takes about two minutes; `--detectors=fpn`
traces one. `--memory` also compiles the step for one CPU device and gives its temporaries: minutes more.
"""

from typing import Any

from absl import app, flags
import jax

from experiments import tables
from frozen_vision import config_files
from frozen_vision.devices import sharding
from frozen_vision.planning import machines, plan

_DETECTORS = flags.DEFINE_list("detectors", [], "Rows by name, such as fpn; all if empty.")
_SIDE = flags.DEFINE_integer("side", 0, "Side of the frame in pixels; the recipe's if 0.")
_MEMORY = flags.DEFINE_bool("memory", False, "Compile, and give the bytes of temporaries.")
_OUT = flags.DEFINE_string("out", None, "Markdown file to write; printed only, if absent.")

# By name: title, detector of the recipe, backbone, and GFLOP fine-tuned and frozen in figure 1 of the paper,
# read by eye.
DETECTORS = {
  "fpn": ("RS-101, FPN", "fpn", "resnet_rs101", (2420, 1575)),
  "nas_fpn": ("RS-101, NAS-FPN", "nas_fpn", "resnet_rs101", (2130, 1265)),
  "cascade50": ("RS-50, NAS-FPN, cascade", "cascade", "resnet_rs50", (2880, 2060)),
  "cascade101": ("RS-101, NAS-FPN, cascade", "cascade", "resnet_rs101", (3960, 2410)),
}
# What differs from the recipe.
POLICIES: dict[str, dict[str, Any]] = {
  "frozen": {},
  "fine-tuned": {"trainable": (".*",)},
  "adapters": {"adapters.kind": "bottleneck", "adapters.remat": False},
  "adapters, blocks computed again": {"adapters.kind": "bottleneck", "adapters.remat": True},
}


def step_flops(name: str, policy: str) -> dict[str, float]:
  """FLOPs of a step of one image, and what trains.

  Returns:
    `counted`; `lowered`, XLA's, where the backbone is unrolled, else NaN; `parameters` that train; with
    --memory `temporaries` in bytes, else NaN.
  """
  _, detector, backbone, _ = DETECTORS[name]
  config = config_files.load_config(f"configs/coco_proper_reuse.py:detector={detector}")
  side = {"detection.frame": (_SIDE.value,) * 2} if _SIDE.value else {}
  config = plan.without_files(config.replace({"backbone.name": backbone, "batch_size": 1, **side}))
  config = config.replace(POLICIES[policy])
  mesh = sharding.make_mesh(devices=machines.describe("cpu:1").devices)
  program = plan.make_program(plan.build_task(config), config, mesh)
  found = dict(counted=plan.program_flops(program), lowered=float("nan"), temporaries=float("nan"))
  found["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(program.state["trainable"]))
  if policy in ("frozen", "fine-tuned"):
    unrolled = plan.make_program(plan.build_task(config), config.replace({"backbone.fold": False}), mesh)
    with jax.set_mesh(mesh):
      found["lowered"] = unrolled.traced.lower().cost_analysis()["flops"]
  if _MEMORY.value:
    found["temporaries"] = program.compile().memory_analysis().temp_size_in_bytes
  return found


def table(rows: dict[tuple[str, str], dict[str, float]]) -> str:
  """Markdown of `step_flops` by (detector, policy)."""
  lines = [
    f"GFLOP of a training step of one image, traced with {tables.versions()}; 80 classes, no masks. Counted: "
    "matrix products and convolutions. Lowered: XLA's figure for the lowered, unrolled program. Percentages "
    "are of the fine-tuned step; the paper's are of figure 1, read by eye.",
    "",
    "| detector | what trains | million parameters | counted | saved | lowered | saved | paper | saved |",
    "|---" * 9 + "|",
  ]
  for (name, policy), row in rows.items():
    title, _, _, (tuned, frozen) = DETECTORS[name]
    whole = rows[name, "fine-tuned"]
    paper = {"fine-tuned": tuned, "frozen": frozen}.get(policy, float("nan"))
    cells = [title, policy, f"{row['parameters'] / 1e6:.1f}"]
    for value, of in (
      (row["counted"] / 1e9, whole["counted"] / 1e9),
      (row["lowered"] / 1e9, whole["lowered"] / 1e9),
      (paper, tuned),
    ):
      known = value == value
      cells += [f"{value:,.0f}" if known else "", f"{1 - value / of:.0%}" if known and value != of else ""]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def main(_: list[str]) -> None:
  unknown = set(_DETECTORS.value) - set(DETECTORS)
  if unknown:
    raise app.UsageError(f"--detectors has {sorted(unknown)}; known: {', '.join(DETECTORS)}.")
  rows = {}
  for name in _DETECTORS.value or DETECTORS:
    for policy in POLICIES:
      rows[name, policy] = step_flops(name, policy)
      print(name, policy, rows[name, policy], flush=True)
  tables.publish(table(rows), _OUT.value)


if __name__ == "__main__":
  app.run(main)
