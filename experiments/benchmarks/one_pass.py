"""Three heads on one backbone pass against three separate models: time and memory, in one run.

  PYTHONPATH=. python experiments/benchmarks/one_pass.py --out=experiments/results/one_pass.md
  PYTHONPATH=. python experiments/benchmarks/one_pass.py --backbone=swinv2_b --image_size=512 --batch=1

The heads are those of the demos, HTC, Mask2Former and a linear segmenter, untrained: all shapes are fixed,
though the loops of RoIAlign depend on the rois. All programs are those that `frozen_vision.export` writes,
from 8-bit images to detections and label maps. Rounds alternate between the programs; the table has medians.
Memory is the compiler's: weights as the programs' arguments, and temporaries; separate models that run one
after the other need the weights of all three and the temporaries of the largest.
"""

import pathlib
import statistics
import tempfile
import time
from typing import Any

from absl import app, flags, logging
import jax
import ml_collections
import numpy as np

from configs import ade20k_mask2former, coco_htc
from experiments import tables
from frozen_vision import export
from frozen_vision.prediction import predictor as predict
from frozen_vision.runs import checkpoints as checkpoint
from frozen_vision.runs import workdir as workdir_lib
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import loop

_BACKBONE = flags.DEFINE_string("backbone", "swinv2_nano", "Variant; others have random weights.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 256, "Side of the images in pixels.")
_BATCH = flags.DEFINE_integer("batch", 4, "Images per call.")
_ROUNDS = flags.DEFINE_integer("rounds", 10, "Timed calls of each program.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the backbone.")
_OUT = flags.DEFINE_string("out", None, "Markdown file to write; printed only, if absent.")


def head_configs() -> dict[str, ml_collections.ConfigDict]:
  """The demos' heads on the backbone that the flags name."""
  configs = {
    "detect (HTC)": coco_htc.get_config(),
    "segment (Mask2Former)": ade20k_mask2former.get_config(),
    "segment (linear)": ade20k_mask2former.get_config(),
  }
  configs["segment (linear)"].segmentation.head.name = "linear"
  for config in configs.values():
    config.backbone.update(dict(name=_BACKBONE.value, dtype=_DTYPE.value))
    config.frozen_dtype = _DTYPE.value
    if _BACKBONE.value != "swinv2_nano":
      config.backbone.weights = "random"
  return configs


def save_untrained(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """A run's checkpoint with the head as it is initialised."""
  task = tasks_build.build_task(config)
  model = loop.build_model(task, config)
  with checkpoint.Checkpoints(workdir) as checkpoints:
    checkpoints.save(
      1,
      {"trainable": model.trainable, "ema": model.trainable},
      workdir_lib.make_meta(
        config=config.to_dict(), feature_key=model.feature_key, examples=0, classes=list(task.classes)
      ),
    )


def compile_program(runs: dict[str, pathlib.Path]) -> tuple[Any, tuple[Any, ...]]:
  """A compiled program of some heads, and its arguments."""
  predictor = predict.Predictor(None, runs, image_size=_IMAGE_SIZE.value)
  function, weights, _ = export.program(predictor)
  side, batch = _IMAGE_SIZE.value, _BATCH.value
  images = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)
  arguments = jax.device_put((weights, images, np.full((batch, 2), side, np.int32)))
  return jax.jit(function, keep_unused=True).lower(*arguments).compile(), arguments


def measure(programs: dict[str, tuple[Any, tuple[Any, ...]]]) -> list[dict[str, Any]]:
  """One row for each program: wall and processor time of a call, weights, temporaries."""
  walls: dict[str, list[float]] = {name: [] for name in programs}
  cpus: dict[str, list[float]] = {name: [] for name in programs}
  for call in range(_ROUNDS.value + 1):
    for name, (compiled, arguments) in programs.items():
      wall, cpu = time.perf_counter(), time.process_time()
      jax.block_until_ready(compiled(*arguments))
      if call:  # the first warms up
        walls[name].append(time.perf_counter() - wall)
        cpus[name].append(time.process_time() - cpu)
  rows = []
  for name, (compiled, arguments) in programs.items():
    rows.append(
      dict(
        name=name,
        wall=statistics.median(walls[name]) * 1e3,
        cpu=statistics.median(cpus[name]) * 1e3,
        weights=sum(leaf.nbytes for leaf in jax.tree.leaves(arguments[0])) / 1e6,
        temporaries=compiled.memory_analysis().temp_size_in_bytes / 1e6,
      )
    )
  return rows


def table(rows: list[dict[str, Any]]) -> str:
  """`rows`: the shared program first, then those of single heads; their sum is added."""
  shared, single = rows[0], rows[1:]
  total = {key: sum(row[key] for row in single) for key in ("wall", "cpu", "weights")} | dict(
    name="the three, one after the other", temporaries=max(row["temporaries"] for row in single)
  )
  lines = ["| program | ms a call | processor ms | weights MB | temporaries MB |", "|---|---|---|---|---|"]
  for row in (shared, *single, total):
    lines.append(
      f"| {row['name']} | {row['wall']:.0f} | {row['cpu']:.0f} | {row['weights']:.1f} "
      f"| {row['temporaries']:.1f} |"
    )

  def ratio(key):
    return total[key] / shared[key]

  lines += [
    "",
    (
      f"Three separate models take {ratio('wall'):.2f} times the time ({ratio('cpu'):.2f} times the "
      f"processor time) and {ratio('weights'):.2f} times the weights of one pass with three heads."
    ),
  ]
  return "\n".join(lines)


def _main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)  # Orbax says much
  with tempfile.TemporaryDirectory() as folder:
    runs = {}
    for index, (name, config) in enumerate(head_configs().items()):
      runs[name] = pathlib.Path(folder) / str(index)
      save_untrained(config, runs[name])
    programs = {"one pass, three heads": compile_program(runs)}
    for name, run in runs.items():
      programs[name] = compile_program({name: run})
    rows = measure(programs)
  device = jax.devices()[0]
  text = (
    f"Three heads on one pass of a frozen {_BACKBONE.value} ({_DTYPE.value}): {_BATCH.value} images of "
    f"{_IMAGE_SIZE.value} px on {device.device_kind} ({device.platform}), medians of {_ROUNDS.value} "
    f"calls.\n\n"
    f"{table(rows)}\n"
  )
  tables.publish(text, _OUT.value)


if __name__ == "__main__":
  app.run(_main)
