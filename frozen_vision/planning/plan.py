"""Will it fit? The train step of a config, compiled for a machine that nobody has to own.

  python -m frozen_vision.main --config=configs/coco_htc.py:swinv2_g --workdir=/tmp/plan --mode=plan \
    --topology=v5e:8x8 --config.batch_size=64

Weights and data are shapes only: nothing is read and nothing allocated. Memory is what the compiler says of
its program; FLOPs are counted from the trace (`flops`), because a compiler counts the body of a loop once.
The same step with everything training stands beside it, so that one sees what freezing saves.
"""

from collections.abc import Callable
import dataclasses
import functools
import logging
import os
import pathlib
import re
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from frozen_vision.config import Config, ConfigLike
from frozen_vision.devices import sharding
from frozen_vision.files import atomic
from frozen_vision.freezing import partition, prepare
from frozen_vision.layers import storage as stored
from frozen_vision.planning import flops, machines
from frozen_vision.tasks import base
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import optimizer as optimizer_lib
from frozen_vision.training import step as step_lib

_logger = logging.getLogger(__name__)

Report = dict[str, Any]

# Parts of a device's memory, as they stand in plan.json and in the table.
_PARTS = {
  "frozen_weights": "frozen weights",
  "trained_parameters": "trained parameters",
  "optimizer": "optimizer and averages",
  "batch": "batch",
  "layout": "padding of their layouts",
  "temporaries": "temporaries",
  "program": "program code",
}


def plan(
  config: ConfigLike,
  workdir: str | os.PathLike[str],
  topology: str,
  *,
  mfu: float = 0.4,
  name: str = "",
  with_finetune: bool = True,
) -> Report:
  """Compiles the train step for a machine, prints a table and writes `plan.json` into the workdir.

  A step that the compiler finds too large is a result, not an error: then `fits` is False.

  Args:
    config: as for training; neither weights nor data need to exist.
    topology: as `machines.describe` has it.
    mfu: fraction of the chip's peak FLOPs that the step time is computed with.
    name: of the config, to be found again in `plan.json`.
    with_finetune: plan the same step with everything training, too, where something is frozen; it takes as
      long again.

  Returns:
    What `plan.json` holds: `fits`, `devices`, `device_memory_bytes`, `bytes_per_device` (by part, and
    `total`), `limited_by`, `advice`, `model_flops_per_step`, `step_seconds` (None where the peak is not
    known), `frozen_bytes` (of all devices), and the same of fine-tuning under `finetune` (None where the
    backbone trains anyway, or without `with_finetune`).

  Raises:
    ValueError: an unknown topology, libtpu is not installed, or a config that cannot run on so many devices.
  """
  if not 0 < mfu <= 1:
    raise ValueError(f"--mfu={mfu}: expected a fraction of the peak, above 0 and at most 1.")
  machine = machines.describe(topology)
  config = without_files(config)
  task = build_task(config)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.model, machine.devices)
  sharding.check_batch(config.batch_size, mesh, "batch_size", config.accumulate)
  _logger.info(
    "Planning %s for %s: %d devices with %s of memory each, %d classes.",
    name or config.task,
    machine.name,
    len(machine.devices),
    _size(machine.device_memory),
    len(task.classes),
  )

  examples = config.batch_size // config.accumulate // len(machine.devices)
  report: Report = {
    "config": name,
    "topology": machine.name,
    "devices": len(machine.devices),
    "mesh": dict(mesh.shape),
    "device_memory_bytes": machine.device_memory,
    "peak_flops_per_device": machine.peak_flops,
    "mfu": mfu,
    "batch_size": config.batch_size,
    "accumulate": config.accumulate,
    "examples_per_device": examples,
    "optimizer": config.mesh.optimizer,
    "policy": "frozen backbone" if config.adapters.kind == "none" else "with adapters",
    "versions": machines.versions(),
  }
  program = make_program(task, config, mesh)
  report["frozen_bytes"] = partition.num_bytes(program.frozen)
  report |= _measure(program, machine, program_flops(program), report)
  report["finetune"] = None
  if with_finetune and (program.frozen_pass or config.adapters.kind != "none"):
    _logger.info("Compiled in %.0f s; now with everything training.", report["compile_seconds"])
    open_config = finetuned(config)
    once = program_flops(make_program(task, open_config, mesh, stacked=True, remat=False))
    tuned = make_program(task, open_config, mesh, stacked=True)
    report["finetune"] = _measure(tuned, machine, once, report)
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  atomic.write_json(folder / "plan.json", report, indent=2, allow_nan=True)
  _logger.info("%s", table(report))
  return report


@dataclasses.dataclass(frozen=True)
class Program:
  """A train step, and shapes and shardings of what it is called with.

  Attributes:
    step: `train_step(state, frozen, batch)`.
    state, frozen, batch: its arguments, `jax.ShapeDtypeStruct`s with shardings.
    mesh: that it runs on.
    frozen_pass: whether the backbone is wholly frozen.
  """

  step: Callable[..., Any]
  state: step_lib.State
  frozen: nnx.State
  batch: base.Batch
  mesh: jax.sharding.Mesh
  frozen_pass: bool

  @functools.cached_property
  def traced(self) -> Any:
    """The step after tracing, before lowering."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
    step = jax.jit(self.step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(self.mesh)))
    with jax.set_mesh(self.mesh):
      return step.trace(self.state, self.frozen, self.batch)

  def compile(self) -> jax.stages.Compiled:
    with jax.set_mesh(self.mesh):
      return self.traced.lower().compile()


def make_program(
  task: base.Task,
  config: ConfigLike,
  mesh: jax.sharding.Mesh,
  *,
  stacked: bool = False,
  remat: bool = True,
) -> Program:
  """The train step of a config as `training.loop.train` runs it, on shapes.

  Args:
    task: that of the config.
    mesh: its devices need not exist.
    stacked: a backbone that trains is run as a frozen one is: blocks scanned, biases as tables. What one
      block needs exists once then, which is the least that fine-tuning costs.
    remat: stacked blocks are computed again on the way back.
  """
  config = tasks_build.read_config(config)
  # The file of shipped weights says which windows they were trained with; others are planned without a file.
  backbone = (
    prepare.open_source(config.backbone, config.seed).module
    if config.backbone.weights == "shipped"
    else prepare.abstract_source(config.backbone)
  )
  model = prepare.prepare(
    functools.partial(nnx.eval_shape, task.build_model),
    backbone,
    trainable=config.trainable,
    adapters=config.adapters,
    storage=config.frozen_dtype,
    fold=config.backbone.fold,
    trained_as=(lambda backbone: stored.shapes(backbone, "stacked", remat=remat)) if stacked else None,
    teacher=nnx.eval_shape(task.build_teacher),
    fold_teacher=task.folds_teacher,
  )
  frozen = model.frozen
  if mesh.devices.flat[0].platform == "tpu":  # fold keeps bfloat16 as bits where jax runs, which is a CPU
    frozen = jax.tree.map(lambda leaf: _retyped(leaf, jnp.uint16, jnp.bfloat16), frozen)
  tx = optimizer_lib.of_run(config, model)

  def init_state(trainable: nnx.State, mutable: nnx.State, frozen: nnx.State) -> step_lib.State:
    own = task.initial_state(nnx.merge(model.graphdef, trainable, mutable, frozen))
    return step_lib.init_state(
      trainable, tx, seed=config.seed, ema=config.ema_decay > 0, mutable=mutable, task_state=own
    )

  state = jax.eval_shape(init_state, model.trainable, model.mutable, frozen)
  step = step_lib.make_train_step(
    task,
    model.graphdef,
    tx,
    phase=task.phases[-1],
    accumulate=config.accumulate,
    ema_decay=task.average_decay or config.ema_decay,
    averaged_teacher=task.averaged_teacher,
    frozen_pass=model.frozen_pass,
  )  # of several phases the last one has the largest images
  over, rules = config.mesh.frozen, model.sharding_rules
  example = {key: np.asarray(value) for key, value in task.blank_example().items()}
  batch = {
    key: jax.ShapeDtypeStruct((config.batch_size, *value.shape), value.dtype)
    for key, value in step_lib.device_batch(example).items()
  }
  return Program(
    step,
    _placed(state, sharding.state_shardings(state, mesh, over, rules, config.mesh.optimizer)),
    _placed(frozen, sharding.frozen_shardings(frozen, mesh, over, rules)),
    _placed(batch, {key: sharding.batch_sharding(mesh) for key in batch}),
    mesh,
    model.frozen_pass,
  )


def build_task(config: ConfigLike) -> base.Task:
  """The config's task; with data that need nothing, or without any, for the usual number of classes."""
  config = tasks_build.read_config(config)
  task_class = tasks_build.task_class(config.task)
  if getattr(config.section, "data", "") in task_class.built_in_data:
    return tasks_build.build_task(config)
  names = (f"class {index}" for index in range(task_class.nominal_classes))
  return tasks_build.build_task(config, base.named_classes(names))


def without_files(config: ConfigLike) -> Config:
  """The config with random weights in the place of those that must be found or fetched."""
  config = tasks_build.read_config(config)
  changes = {} if config.backbone.weights == "shipped" else {"backbone.weights": "random"}
  if hasattr(config.section, "init"):
    changes[f"{config.task}.init.path"] = ""
  if getattr(getattr(config.section, "teacher", None), "weights", "shipped") != "shipped":
    changes[f"{config.task}.teacher.weights"] = "random"
  return config.replace(changes)


def finetuned(config: ConfigLike) -> Config:
  """The config with everything training. Decay by layer changes neither memory nor FLOPs."""
  return tasks_build.read_config(config).replace(
    {"trainable": (".*",), "optimizer.layer_decay": 1.0, "adapters.kind": "none"}
  )


def program_flops(program: Program) -> int:
  """FLOPs of matrix products in one step of all devices; without RoIAlign's, which depend on the rois."""
  return flops.count_jaxpr(program.traced.jaxpr.jaxpr)


def needed_bytes(message: str) -> int | None:
  """Bytes that a program needs on a device, by the compiler's refusal; None if it is of another kind."""
  for pattern in (
    r"Ran out of memory in memory space hbm\. Used ([\d.]+)([BKMGT]) of",
    r"Ran out of memory on HBM, the total memory required for .*? \(([\d.]+)([BKMGT])\)",
  ):
    match = re.search(pattern, message)
    if match:
      return int(float(match[1]) * 1024 ** "BKMGT".index(match[2]))
  return None


def table(report: Report) -> str:
  """The report as text, frozen and fine-tuned side by side."""
  columns = {"as configured": report}
  if report["finetune"]:
    columns = {report["policy"]: report, "fine-tuned": report["finetune"]}
  memory = report["device_memory_bytes"]

  def fits(column: Report) -> str:
    over = column["bytes_per_device"]["total"] - memory
    return "yes" if column["fits"] else f"no, {_size(over)} too much"

  rows: dict[str, Callable[[Report], str]] = {
    words: lambda column, part=part: _size(column["bytes_per_device"][part]) for part, words in _PARTS.items()
  }
  rows |= {
    "total": lambda column: _size(column["bytes_per_device"]["total"]),
    "memory of a device": lambda column: _size(memory),
    "fits": fits,
    "step of all devices": lambda column: _work(column["model_flops_per_step"]),
  }
  if report["peak_flops_per_device"]:
    rows[f"its time at {report['mfu']:.0%} MFU"] = lambda column: f"{column['step_seconds']:.3g} s"
  mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items())

  def line(words, values):
    return f"{words:<26}" + "".join(f"{value:>22}" for value in values)

  return "\n".join(
    [
      f"{report['config']} on {report['topology']} ({mesh}), batch {report['batch_size']}: "
      f"{report['examples_per_device']} at a time on each of {report['devices']} devices.",
      line("per device", columns),
      *(line(words, [cell(column) for column in columns.values()]) for words, cell in rows.items()),
      *(
        f"{words.capitalize()}: most memory is {_PARTS[column['limited_by']]}. {column['advice']}"
        for words, column in columns.items()
      ),
    ]
  )


def _measure(program: Program, machine: machines.Machine, step_flops: int, setting: Report) -> Report:
  """Memory by part, FLOPs, time, and what to do about them, of one program."""
  parts = {
    "frozen_weights": sharding.local_bytes(program.frozen),
    "trained_parameters": sharding.local_bytes(program.state["trainable"]),
    "optimizer": sharding.local_bytes(
      {key: leaf for key, leaf in program.state.items() if key != "trainable"}
    ),
    "batch": sharding.local_bytes(program.batch),
    "layout": 0,
    "temporaries": 0,
    "program": 0,
  }
  arguments = sum(parts.values())
  started = time.perf_counter()
  try:
    memory = program.compile().memory_analysis()
  except jax.errors.JaxRuntimeError as error:
    needed = needed_bytes(str(error))
    if needed is None:
      raise
    parts["temporaries"] = max(needed - arguments, 0)
    compiled = False
  else:
    parts["layout"] = max(memory.argument_size_in_bytes - arguments, 0)
    parts["temporaries"] = (
      memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    )
    parts["program"] = memory.generated_code_size_in_bytes
    compiled = True
  total = sum(parts.values())
  peak = machine.peak_flops
  report = {
    "fits": compiled and total <= machine.device_memory,
    "bytes_per_device": parts | {"total": total},
    "limited_by": max(parts, key=parts.get),
    "model_flops_per_step": step_flops,
    "step_seconds": step_flops / (len(machine.devices) * peak * setting["mfu"]) if peak else None,
    "compile_seconds": time.perf_counter() - started,
  }
  return report | {"advice": _advice(report, setting)}


def _advice(report: Report, setting: Report) -> str:
  """Advice that makes the largest part smaller."""
  match report["limited_by"]:
    case "frozen_weights":
      return (
        "More devices share them where config.mesh.frozen is all; config.frozen_dtype=int8 halves what "
        "bfloat16 takes."
      )
    case "optimizer" if setting["devices"] > 1 and setting["optimizer"] == "replicated":
      return (
        "That of heads is replicated: shard it over the devices (config.mesh.optimizer=sharded), or train "
        "without an average (config.ema_decay=0)."
      )
    case "trained_parameters" | "optimizer":
      return (
        "Heads are replicated: train fewer parameters (config.trainable), or without an average "
        "(config.ema_decay=0); what trains of a backbone is sharded over all devices, so more of them help."
      )
    case "batch":
      return "Take fewer examples a device (config.batch_size, config.accumulate), or smaller frames."
  if setting["examples_per_device"] > 1:
    return (
      f"Of {setting['examples_per_device']} examples at a time on a device fewer need less: lower "
      "config.batch_size, or split it into micro-batches with config.accumulate."
    )
  return (
    "There is one example on a device already: take smaller frames or windows, or a chip with more memory."
  )


def _retyped(leaf: jax.ShapeDtypeStruct, old: Any, new: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, new) if leaf.dtype == old else leaf


def _placed(tree: Any, shardings: Any) -> Any:
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, shardings
  )


def _size(num_bytes: int) -> str:
  if num_bytes < 2**30 / 10:
    return f"{num_bytes / 2**20:,.2f} MiB"
  return f"{num_bytes / 2**30:,.2f} GiB"


def _work(count: int) -> str:
  return f"{count / 1e9:,.3g} GFLOP" if count < 1e11 else f"{count / 1e12:,.1f} TFLOP"
