"""Part 6: the kernels that take most of the time of parts 2 and 4."""

from collections.abc import Callable
import pathlib
import tempfile
import time

import jax

from experiments.benchmarks.gpu import inference, kernel_times, models, report, timing, train_steps
from experiments.benchmarks.gpu import programs as programs_lib

_COUNT = 10


def run(table: report.Report) -> None:
  repeats = 1 if table.tiny else 5
  for label, prepare in _programs(tiny=table.tiny).items():
    try:
      call = prepare()
      call(1)  # compiled, and warm
      with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
          started = time.perf_counter()
          call(repeats)
          wall = time.perf_counter() - started
        kernels = kernel_times.read(pathlib.Path(folder))
    except jax.errors.JaxRuntimeError as error:
      table.note(f"{label}: {report.first_line(error)}")
      continue
    if not kernels:
      table.note(
        f"{label}: the trace has no events of the device; its profiler may be switched off for this user."
      )
      continue
    total = sum(kernel.seconds for kernel in kernels)
    for rank, kernel in enumerate(kernels[:_COUNT], start=1):
      table.add(
        program=label,
        rank=rank,
        kernel=kernel.name[:100],
        calls=kernel.calls / repeats,
        ms=1e3 * kernel.seconds / repeats,
        fraction=100 * kernel.seconds / total,
        operation=kernel.operation[:100],
      )
    rest = sum(kernel.seconds for kernel in kernels[_COUNT:])
    table.add(
      program=label,
      kernel=f"the other {max(0, len(kernels) - _COUNT)}",
      ms=1e3 * rest / repeats,
      fraction=100 * rest / total,
    )
    table.note(
      f"{label}: {1e3 * wall / repeats:.2f} ms a call while profiled; its kernels add up to "
      f"{1e3 * total / repeats:.2f} ms."
    )


def _programs(*, tiny: bool) -> dict[str, Callable[[], timing.Run]]:
  """{label: what compiles the program and gives a call of it}; inference first, the giant last."""
  labelled = {}
  for case in inference.cases(tiny=tiny):
    batch = case.batches[0]
    labelled[f"{case.backbone.name}, {case.image_size} px, batch {batch}"] = lambda case=case: _inference(
      case, tiny
    )
  cases = [case for case in train_steps.waves(tiny=tiny)[0] if not case.everything]
  for case in cases:
    label = f"{case.head} on frozen {case.backbone.name}, {case.side} px, batch {case.batch}"
    labelled[label] = lambda case=case: _train_step(case, tiny)
  if tiny:
    return dict(list(labelled.items())[1:3])
  return labelled


def _inference(case: inference.Case, tiny: bool) -> timing.Run:
  folded = case.backbone.folded(tiny=tiny)
  images = models.random_images(case.batches[0], case.image_size)
  [program] = timing.compile_all(
    {"": (inference.embed, (folded, models.image_shape(case.batches[0], case.image_size)))}, quick=tiny
  ).values()
  if isinstance(program, Exception):
    raise program
  return timing.repeat(program.call, folded, images)


def _train_step(case: train_steps.Case, tiny: bool) -> timing.Run:
  step = programs_lib.build_train_step(case.workload, case.backbone.folded(tiny=tiny))
  [program] = timing.compile_all(
    {"": (step.step, train_steps.arguments(case, step))}, donate=True, quick=tiny
  ).values()
  if isinstance(program, Exception):
    raise program
  return train_steps.Stepper(case, step, program).run


PART = report.Part(
  "The costliest kernels, from the profiler's trace",
  dict(
    program="program",
    rank="rank",
    kernel="kernel",
    calls="calls",
    ms="ms a call",
    fraction="% of kernel time",
    operation="the operation that took most of it",
  ),
  run,
)
