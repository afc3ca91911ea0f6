"""Part 3: the forward pass of a frozen SwinV2-G at the sizes of detection, window 32."""

from collections.abc import Sequence
import statistics
from typing import Any

import jax

from experiments.benchmarks.gpu import models, report, timing

_STORAGE = ("bfloat16", "int8")


def forward(folded: Any, images: jax.Array) -> tuple[jax.Array, ...]:
  """The measured program: images on the device to the features of every level."""
  return folded(images)


def run(table: report.Report) -> None:
  backbone = models.for_detection("swinv2_g", tiny=table.tiny)
  measure(table, backbone, (64,) if table.tiny else (640, 1024, 1536))


def measure(table: report.Report, backbone: models.Backbone, sides: Sequence[int], **row: Any) -> None:
  """Adds rows of one image of each side, for weights of each storage; `row` is part of all."""
  for storage in _STORAGE:
    folded = backbone.folded(tiny=table.tiny, storage=storage)
    compiled = timing.compile_all(
      {side: (forward, (folded, models.image_shape(1, side))) for side in sides}, quick=table.tiny
    )
    for side, program in compiled.items():
      place = row | dict(storage=storage, pixels=side)
      if isinstance(program, Exception):
        table.add(**place)
        table.note(f"{storage}, {side} px: {report.first_line(program)}")
        continue
      run_program = timing.repeat(program.call, folded, models.random_images(1, side))
      try:
        [seconds] = timing.interleave(
          {"": run_program}, rounds=6, round_s=0.0 if table.tiny else 0.4, seconds=table.seconds_left() / 4
        ).values()
      except jax.errors.JaxRuntimeError as error:
        table.add(**place)
        table.note(f"{storage}, {side} px: {report.first_line(error)}")
        continue
      table.add(**place, **figures(table, program, seconds))
    del folded, compiled


def figures(
  table: report.Report, program: timing.Compiled, seconds: Sequence[float], images: int = 1
) -> dict[str, Any]:
  """What `COLUMNS` say of a program on so many images, from the seconds of its calls."""
  median = statistics.median(seconds)
  return dict(
    ms=timing.milliseconds(seconds),
    rate=images / median,
    tflop=program.flops / 1e12,
    mfu=table.utilisation(program.flops, median),
    gib=program.bytes / 2**30,
    weights=program.weight_bytes / 2**30,
    compile_s=program.compile_s,
  )


COLUMNS = dict(
  storage="storage dtype of the weights",
  pixels="px",
  ms="ms (range)",
  rate="images/s",
  tflop="TFLOP",
  mfu="MFU %",
  gib="peak GiB",
  weights="of these arguments GiB",
  compile_s="compile s",
)
PART = report.Part("Forward pass of SwinV2-G, one image, window 32, products in bfloat16", COLUMNS, run)
