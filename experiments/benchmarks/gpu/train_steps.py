"""Part 4: train steps of HTC, Mask2Former and Video Swin, backbones frozen, and a backbone that trains."""

import dataclasses
import statistics
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.gpu import models, programs, report, timing


@dataclasses.dataclass(frozen=True)
class Case:
  """One row of the table.

  Attributes:
    head: its name in the table.
    workload: what trains.
    backbone: which one, and its windows.
    side: of the images in pixels.
    batch: images or clips.
    everything: the backbone trains too.
  """

  head: str
  workload: programs.Workload
  backbone: models.Backbone
  side: int
  batch: int
  everything: bool = False

  @property
  def key(self) -> tuple[Any, ...]:
    """Cases with one key have one backbone in memory."""
    return self.backbone, self.everything


def waves(*, tiny: bool) -> list[list[Case]]:
  """Cases in order of importance; those of one wave compile at the same time, and then run one by one."""
  sizes = programs.TOY if tiny else programs.Sizes()
  base = models.for_detection("swinv2_b", tiny=tiny)
  giant = models.for_detection("swinv2_g", tiny=tiny)

  def htc(backbone: models.Backbone, side: int, batch: int, everything: bool = False) -> Case:
    return Case("HTC", programs.Detection(sizes), backbone, side, batch, everything)

  def mask2former(backbone: models.Backbone, side: int, batch: int) -> Case:
    return Case("Mask2Former", programs.Segmentation(sizes), backbone, side, batch)

  def video(backbone: models.Backbone, side: int, batch: int, frames: int, everything: bool = False) -> Case:
    head = f"Video Swin, {frames} frames"
    return Case(head, programs.Action(sizes, frames), backbone, side, batch, everything)

  if tiny:
    return [
      [htc(base, 64, 1), video(base, 64, 1, 2), video(base, 64, 1, 2, everything=True)],
      [mask2former(giant, 64, 1)],
    ]
  frames = models.swinv2("swinv2_b", (16, 16, 16, 8), (12, 12, 12, 6))
  return [
    [htc(base, 1024, 1), htc(base, 1024, 1, everything=True), htc(giant, 1024, 1)],
    [
      htc(base, 1024, 4),
      htc(base, 1024, 4, everything=True),
      mask2former(base, 640, 1),
      mask2former(base, 640, 4),
      video(frames, 256, 4, 8),
      video(frames, 256, 4, 16),
    ],
    [htc(giant, 1536, 1), htc(base, 1536, 1), htc(giant, 1024, 4), mask2former(giant, 640, 1)],
    [htc(base, 1024, 2), htc(base, 1024, 2, everything=True), htc(giant, 1024, 2)],
    [htc(base, 1536, 2), htc(base, 1536, 4), htc(giant, 1536, 2), htc(base, 1024, 8)],
  ]


def run(table: report.Report) -> None:
  backbones: dict[Any, Any] = {}
  for wave in waves(tiny=table.tiny):
    for case in wave:
      if case.key not in backbones:
        make = case.backbone.unfolded if case.everything else case.backbone.folded
        backbones[case.key] = make(tiny=table.tiny)
    steps = {
      case: programs.build_train_step(case.workload, backbones[case.key], everything=case.everything)
      for case in wave
    }
    compiled = timing.compile_all(
      {case: (step.step, arguments(case, step)) for case, step in steps.items()},
      donate=True,
      quick=table.tiny,
    )
    for case in wave:
      measure(table, case, steps[case], compiled[case])
    del steps, compiled
  table.note(
    "FLOPs are those of matrix products and convolutions, without the loops of RoIAlign. Peak memory is the "
    "compiler's: arguments, outputs and temporaries."
  )


def arguments(case: Case, step: programs.TrainStep) -> tuple[Any, ...]:
  """Shapes and dtypes that the step is compiled for."""
  return jax.eval_shape(step.make_state), step.frozen, case.workload.batch(case.batch, case.side)


def measure(table: report.Report, case: Case, step: programs.TrainStep, compiled: Any) -> None:
  """Adds the row of a case; one without figures, and a note, where it does not fit the device."""
  row = dict(
    head=case.head,
    backbone=case.backbone.name,
    trains="everything" if case.everything else "head",
    pixels=case.side,
    batch=case.batch,
  )
  try:
    if isinstance(compiled, Exception):
      raise compiled
    stepper = Stepper(case, step, compiled)
    [seconds] = timing.interleave(
      {"": stepper.run}, rounds=2 if table.tiny else 6, round_s=0.0 if table.tiny else 0.3, seconds=10.0
    ).values()
  except jax.errors.JaxRuntimeError as error:
    table.add(**row)
    name = f"{case.head} on {case.backbone.name}, {case.side} px, batch {case.batch}"
    table.note(f"{name}: {report.first_line(error)}")
    return
  median = statistics.median(seconds)
  table.add(
    **row,
    rate=case.batch / median,
    ms=timing.milliseconds(seconds),
    tflop=compiled.flops / 1e12,
    mfu=table.utilisation(compiled.flops, median),
    gib=compiled.bytes / 2**30,
    compile_s=compiled.compile_s,
    loss=stepper.loss,
  )


class Stepper:
  """Runs a compiled step again and again on one batch, and keeps its state."""

  def __init__(self, case: Case, step: programs.TrainStep, compiled: timing.Compiled):
    self._call, self._frozen = compiled.call, step.frozen
    self._state = step.make_state()
    self._batch = jax.device_put(case.workload.batch(case.batch, case.side))
    self.loss = float("nan")

  def run(self, times: int) -> None:
    for _ in range(times):
      self._state, scalars = self._call(self._state, self._frozen, self._batch)
    self.loss = float(scalars["loss"])
    if not np.isfinite(self.loss):
      raise FloatingPointError(f"The loss is {self.loss}.")


PART = report.Part(
  "Train steps with AdamW, heads in bfloat16, backbones folded in bfloat16 where they are frozen",
  dict(
    head="head",
    backbone="backbone",
    trains="trains",
    pixels="px",
    batch="batch",
    rate="images/s",
    ms="ms a step (range)",
    tflop="TFLOP a step",
    mfu="MFU %",
    gib="peak GiB",
    compile_s="compile s",
    loss="loss at the end",
  ),
  run,
)
