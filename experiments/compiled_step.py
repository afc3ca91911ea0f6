"""The compiled train step of a config with its arguments and figures, as the benchmarks of it need it."""

import time
from typing import Any

import jax

from frozen_vision.config import Config
from frozen_vision.freezing import partition
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import loop, optimizer
from frozen_vision.training import step as train_step


def prepare(config: Config) -> dict[str, Any]:
  """Compiles the step on the first batch of the config's data."""
  task = tasks_build.build_task(config)
  model = loop.build_model(task, config)
  tx = optimizer.build(
    config.optimizer, steps=config.steps, trainable=model.trainable, layer_of=model.layer_of
  )
  state = train_step.init_state(model.trainable, tx, seed=config.seed, ema=config.ema_decay > 0)
  with task.train_batches(0) as batches:
    batch = jax.device_put(train_step.device_batch(next(batches)))
  step = train_step.make_train_step(
    task, model.graphdef, tx, phase=task.phases[-1], ema_decay=config.ema_decay, frozen_pass=model.frozen_pass
  )
  started = time.perf_counter()
  compiled = jax.jit(step, donate_argnums=0).lower(state, model.frozen, batch).compile()
  memory = compiled.memory_analysis()
  return dict(
    compiled=compiled,
    state=state,
    frozen=model.frozen,
    batch=batch,
    compile_s=time.perf_counter() - started,
    gflop=compiled.cost_analysis()["flops"] / 1e9,
    temporary_mb=memory.temp_size_in_bytes / 1e6,
    state_mb=partition.num_bytes([state[name] for name in ("trainable", "opt_state")]) / 1e6,
    frozen_mb=partition.num_bytes(model.frozen) / 1e6,
  )
