"""Memory cost of deep supervision: Mask2Former's train step with 5 and with 10 predictions in the loss.

  PYTHONPATH=. python experiments/benchmarks/predictions_memory.py \
    --out=experiments/results/predictions_memory.md

Compiled for one device, never run: the frozen backbones of configs/ade20k_mask2former.py:swinv2_t, :swinv2_b
and :swinv2_g at 640 px, one image. Masks enter each loss at 12,544 points, so a prediction should cost its
points and its layer, not its maps.
"""

import time

from absl import app, flags

from experiments import tables
from frozen_vision import config_files
from frozen_vision.devices import sharding
from frozen_vision.planning import machines, plan

_BACKBONES = flags.DEFINE_list("backbones", ["swinv2_t", "swinv2_b", "swinv2_g"], "Variants of the config.")
_LAYERS = flags.DEFINE_list("decoder_layers", ["4", "9"], "Each makes one prediction, and one comes before.")
_SIZE = flags.DEFINE_integer("image_size", 640, "Side of the image.")
_TOPOLOGY = flags.DEFINE_string("topology", "cpu:1", "As of --mode=plan.")
_OUT = flags.DEFINE_string("out", None, "Markdown file to write; printed only, if absent.")


def memory(backbone: str, layers: int) -> tuple[dict[str, float], float]:
  """(MiB by part of a compiled train step, seconds that compiling took)."""
  config = plan.without_files(
    config_files.load_config(
      f"configs/ade20k_mask2former.py:{backbone}",
      {
        "batch_size": 1,
        "segmentation.frame": (_SIZE.value, _SIZE.value),
        "segmentation.head.decoder_layers": layers,
      },
    )
  )
  mesh = sharding.make_mesh(devices=machines.describe(_TOPOLOGY.value).devices[:1])
  program = plan.make_program(plan.build_task(config), config, mesh)
  started = time.perf_counter()
  found = program.compile().memory_analysis()
  seconds = time.perf_counter() - started
  return {
    "arguments": found.argument_size_in_bytes / 2**20,
    "temporaries": found.temp_size_in_bytes / 2**20,
  }, seconds


def _main(argv: list[str]) -> None:
  del argv
  rows = [
    "| frozen backbone | predictions | arguments | temporaries | growth | compiled in |",
    "|---" * 6 + "|",
  ]
  print("\n".join(rows), flush=True)
  for backbone in _BACKBONES.value:
    first = None
    for layers in map(int, _LAYERS.value):
      parts, seconds = memory(backbone, layers)
      growth = "" if first is None else f"{parts['temporaries'] / first - 1:+.1%}"
      first = first or parts["temporaries"]
      rows.append(
        f"| {backbone} | {layers + 1} | {parts['arguments']:,.0f} | {parts['temporaries']:,.0f} | {growth} "
        f"| {seconds:.0f} s |"
      )
      print(rows[-1], flush=True)
  text = (
    f"Made by `experiments/benchmarks/predictions_memory.py` with {tables.versions()}: MiB of "
    f"Mask2Former's train step on one image of {_SIZE.value} px, compiled for {_TOPOLOGY.value}. "
    "Arguments are frozen weights, head, optimizer and batch.\n\n" + "\n".join(rows) + "\n"
  )
  tables.write(text, _OUT.value)


if __name__ == "__main__":
  app.run(_main)
