"""What freezing saves: the train step of a config as it is, and with everything training, in one run.

  PYTHONPATH=. python experiments/benchmarks/train_step.py --config=configs/coco_htc.py \
    --out=experiments/results/train_step.md

Times are medians over interleaved rounds; FLOPs and memory are the compiler's figures of the same programs
(the body of a loop counts once).
"""

import pathlib
import time

from absl import app
from absl import flags
import jax
import ml_collections
from ml_collections import config_flags
import numpy as np

from frozen_vision import freeze
from frozen_vision import optimizer
from frozen_vision import train
from frozen_vision import train_step
from frozen_vision.tasks import build as tasks_build

_CONFIG = config_flags.DEFINE_config_file("config", None, "The configuration; its data is read.")
_OUT = flags.DEFINE_string("out", None, "Markdown file to write; printed only, if absent.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Rounds of the timing.")


def prepare(config: ml_collections.ConfigDict) -> dict:
  """The compiled step with its arguments and figures."""
  task = tasks_build.build_task(config)
  model = train.build_model(task, config)
  tx = optimizer.build(
      config.optimizer, steps=config.steps, trainable=model.trainable, layer_of=task.layer_of)
  state = train_step.init_state(model.trainable, tx, seed=config.seed, ema=config.ema_decay > 0)
  with task.train_batches(0) as batches:
    batch = jax.device_put(train_step.device_batch(next(batches)))
  step = train_step.make_train_step(
      task, model.graphdef, tx, ema_decay=config.ema_decay, frozen_pass=model.frozen_pass)
  started = time.perf_counter()
  compiled = jax.jit(step, donate_argnums=0).lower(state, model.frozen, batch).compile()
  memory = compiled.memory_analysis()
  return dict(
      compiled=compiled, state=state, frozen=model.frozen, batch=batch, seconds=[],
      compile_s=time.perf_counter() - started, gflop=compiled.cost_analysis()["flops"] / 1e9,
      temporary_mb=memory.temp_size_in_bytes / 1e6,
      state_mb=freeze.num_bytes([state[name] for name in ("trainable", "opt_state")]) / 1e6,
      frozen_mb=freeze.num_bytes(model.frozen) / 1e6)


def _main(argv: list[str]) -> None:
  del argv
  runs = {}
  for name, trainable in (("backbone frozen", _CONFIG.value.trainable), ("everything trains", (".*",))):
    config = ml_collections.ConfigDict(_CONFIG.value.to_dict())
    config.trainable = trainable
    runs[name] = prepare(config)
  for _ in range(_ROUNDS.value):
    for run in runs.values():
      started = time.perf_counter()
      run["state"], scalars = run["compiled"](run["state"], run["frozen"], run["batch"])
      jax.block_until_ready(scalars)
      run["seconds"].append(time.perf_counter() - started)
  columns = ("gflop", "temporary_mb", "state_mb", "frozen_mb", "compile_s")
  rows = [
      "| step | median ms (range) | GFLOP | temporaries MB | trained parameters and optimizer MB | frozen MB "
      "| compile s |", "|---|" + "---|" * 6]
  for name, run in runs.items():
    times = 1e3 * np.asarray(run["seconds"])
    values = " | ".join(f"{run[column]:.1f}" for column in columns)
    rows.append(f"| {name} | {np.median(times):.0f} ({times.min():.0f} to {times.max():.0f}) | {values} |")
  text = "\n".join(rows) + "\n"
  print(text)
  if _OUT.value:
    pathlib.Path(_OUT.value).write_text(
        f"Made by `experiments/benchmarks/train_step.py`, {_ROUNDS.value} rounds, batch "
        f"{_CONFIG.value.batch_size}, on {jax.devices()[0].device_kind}.\n\n{text}")


if __name__ == "__main__":
  flags.mark_flags_as_required(["config"])
  app.run(_main)
