"""One frozen train step of a giant backbone on this machine: memory and time.

  PYTHONPATH=. python experiments/random_backbone.py --name=swinv2_g --out=/tmp/swinv2_g_random.safetensors
  PYTHONPATH=. python experiments/benchmarks/giant.py --weights=/tmp/swinv2_g_random.safetensors \
    --out=experiments/results/giant.md

  PYTHONPATH=. python experiments/random_backbone.py --name=dinov3_vit7b16 --out=/tmp/dinov3_7b_random
  PYTHONPATH=. python experiments/benchmarks/giant.py --backbone=dinov3_vit7b16 --side=224 --storage=int8 \
    --weights=/tmp/dinov3_7b_random --out=experiments/results/giant_dinov3.md

SwinV2-G, 3 billion parameters: the recipe configs/coco_htc.py:swinv2_g at 256 px, window 16, one image with
twenty boxes. DINOv3-7B: configs/ade20k_mask2former.py:dinov3_vit7b16, on DINOv3's adapter, one image of ten
classes, but with Mask2Former's own widths: the recipe's head of 2,048 channels has 852 million parameters
with the adapter's, of which the optimizer's state alone takes 9.5 GiB. Each storage dtype is measured in a
process of its own: peak resident memory is that of the process, from its start through reading the file,
compiling and two steps. --times=False leaves times out, for a machine that has other work.
"""

import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

from absl import app, flags
import jax
import ml_collections
import numpy as np

from experiments import tables
from frozen_vision import config_files
from frozen_vision.devices import sharding
from frozen_vision.freezing import partition, prepare
from frozen_vision.planning import machines, plan
from frozen_vision.runs import checkpoints as checkpoint
from frozen_vision.runs import workdir as workdir_lib
from frozen_vision.tasks import base
from frozen_vision.training import loop, optimizer
from frozen_vision.training import step as train_step

_BACKBONE = flags.DEFINE_enum("backbone", "swinv2_g", ["swinv2_g", "dinov3_vit7b16"], "Which one.")
_WEIGHTS = flags.DEFINE_string("weights", None, "Its file, or folder of shards.", required=True)
_SIDE = flags.DEFINE_integer("side", 256, "Of the image.")
_STORAGE = flags.DEFINE_list("storage", ["bfloat16", "int8"], "Storage dtype of the weights, one row each.")
_TIMES = flags.DEFINE_bool("times", True, "Have columns of times.")
_OUT = flags.DEFINE_string("out", None, "Markdown file to write; printed only, if absent.")
_ONE = flags.DEFINE_string("one", None, "Internal: measure this one.")


_WHAT = {
  "swinv2_g": "SwinV2-G (random weights), window 16, frozen under HTC",
  "dinov3_vit7b16": "DINOv3-7B (random weights, read from shards), frozen under Mask2Former of 256 channels "
  "on DINOv3's adapter",
}


def _config(storage: str) -> ml_collections.ConfigDict:
  """The recipe at the size that is measured."""
  frame = (_SIDE.value,) * 2
  options = {
    "backbone.weights": _WEIGHTS.value,
    "backbone.dtype": "float32",
    "frozen_dtype": storage,
    "batch_size": 1,
    "accumulate": 1,
  }
  match _BACKBONE.value:
    case "swinv2_g":
      recipe = "coco_htc.py:swinv2_g"
      options |= {
        "backbone.overrides.window_sizes": (16, 16, 16, 8),
        "detection.frame": frame,
        "detection.head_dtype": "float32",
      }
    case "dinov3_vit7b16":
      recipe = "ade20k_mask2former.py:dinov3_vit7b16"
      widths = dict(hidden_dim=256, mask_dim=256, num_heads=8, encoder_ffn_dim=1024)
      options |= {
        "segmentation.frame": frame,
        "segmentation.short_sides": frame[:1],
        "segmentation.head_dtype": "float32",
        **{f"segmentation.head.{name}": value for name, value in widths.items()},
      }
  return config_files.load_config(pathlib.Path(__file__).parents[2] / "configs" / recipe, options)


def measure(storage: str) -> dict[str, float]:
  config = _config(storage)
  task = plan.build_task(config)
  mesh = sharding.make_mesh(1, 1)
  started = time.perf_counter()
  model = loop.build_model(task, config, mesh)
  loaded = time.perf_counter() - started
  loaded_peak = _peak_gib()
  tx = optimizer.build(
    config.optimizer, steps=config.steps, trainable=model.trainable, layer_of=model.layer_of
  )
  state = train_step.init_state(model.trainable, tx, seed=0, ema=False, mutable=model.mutable)
  batch = train_step.device_batch({key: value[None] for key, value in _example(task).items()})
  step = train_step.make_train_step(task, model.graphdef, tx, frozen_pass=model.frozen_pass)
  started = time.perf_counter()
  compiled = jax.jit(step, donate_argnums=0).lower(state, model.frozen, batch).compile()
  compile_s = time.perf_counter() - started
  seconds = []
  for _ in range(2):
    started = time.perf_counter()
    state, scalars = compiled(state, model.frozen, batch)
    loss = float(scalars["loss"])
    seconds.append(time.perf_counter() - started)
    if not np.isfinite(loss):
      raise FloatingPointError(f"The loss is {loss}.")
  memory = compiled.memory_analysis()
  return dict(
    storage=storage,
    frozen_gib=partition.num_bytes(model.frozen) / 2**30,
    state_gib=partition.num_bytes(state) / 2**30,
    temporary_gib=memory.temp_size_in_bytes / 2**30,
    load_s=loaded,
    loaded_peak_gib=loaded_peak,
    compile_s=compile_s,
    step_s=min(seconds),
    loss=loss,
    peak_gib=_peak_gib(),
    checkpoint_gib=_checkpoint_bytes(state, config, task, model) / 2**30,
  )


def _checkpoint_bytes(
  state: train_step.State, config: ml_collections.ConfigDict, task: base.Task, model: prepare.Model
) -> int:
  """Bytes of a checkpoint on disk, as a run saves it."""
  meta = workdir_lib.make_meta(
    config=config.to_dict(), feature_key=model.feature_key, examples=2, classes=list(task.classes)
  )
  with tempfile.TemporaryDirectory() as folder:
    with checkpoint.Checkpoints(folder, asynchronous=False) as checkpoints:
      checkpoints.save(2, state, meta)
    return sum(path.stat().st_size for path in pathlib.Path(folder).rglob("*") if path.is_file())


def _example(task: base.Task) -> dict[str, np.ndarray]:
  """Noise, with boxes and full masks at random positions, or with ten classes in stripes."""
  example, side = task.blank_example(), _SIDE.value
  rng = np.random.default_rng(0)
  example["image"] = rng.integers(0, 256, example["image"].shape, np.uint8)
  example["image_size"] = np.array([side, side], np.int32)
  if "segment_labels" in example:
    example["labels"] = np.broadcast_to(np.arange(side) * 10 // side, (side, side)).astype(np.uint8)
    example["segment_labels"][:10] = np.arange(10)
    example["segment_valid"][:10] = True
    return example
  corners = rng.uniform(0, side * 0.7, (20, 2))
  example["boxes"][:20] = np.concatenate([corners, corners + rng.uniform(16, side * 0.3, (20, 2))], axis=1)
  example["labels"][:20] = rng.integers(0, 80, 20)
  example["valid"][:20] = True
  example["masks"][:20] = 255
  return example


def _peak_gib() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
  if _ONE.value:
    print(json.dumps(measure(_ONE.value)))
    return
  rows = []
  for storage in _STORAGE.value:
    output = subprocess.run(
      [sys.executable, *sys.argv, f"--one={storage}"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    rows.append(json.loads(output.splitlines()[-1]))
  times = dict(load_s="load s", compile_s="compile s", step_s="step s") if _TIMES.value else {}
  lines = [
    f"Made by `experiments/benchmarks/giant.py`: {_WHAT[_BACKBONE.value]}, "
    f"batch 1 at {_SIDE.value} px, on {machines.processor()} with {jax.device_count()} device; "
    f"jax {jax.__version__}." + ("" if times else " Times were not measured."),
    "",
    "| stored as | frozen GiB | trained state GiB | checkpoint / trained state | temporaries GiB | "
    "peak resident GiB, loading | peak resident GiB, all |"
    + "".join(f" {title} |" for title in times.values()),
    "|---" * (7 + len(times)) + "|",
  ]
  lines += [
    f"| {row['storage']} | {row['frozen_gib']:.2f} | {row['state_gib']:.2f} | "
    f"{row['checkpoint_gib'] / row['state_gib']:.3f} | {row['temporary_gib']:.2f} | "
    f"{row['loaded_peak_gib']:.2f} | {row['peak_gib']:.2f} |"
    + "".join(f" {row[name]:.1f} |" for name in times)
    for row in rows
  ]
  text = "\n".join(lines) + "\n"
  tables.publish(text, _OUT.value)


if __name__ == "__main__":
  app.run(main)
