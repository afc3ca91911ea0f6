"""Part 5: HTC, Mask2Former and a linear segmenter on one backbone pass, against a pass for each."""

from collections.abc import Callable, Mapping
import statistics
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from experiments.benchmarks.gpu import models, programs, report, timing


def predict(
  heads: Mapping[str, programs.Workload], graphdefs: Mapping[str, nnx.GraphDef]
) -> Callable[[Any, Mapping[str, nnx.State], jax.Array, jax.Array], dict[str, Any]]:
  """(backbone, {head: its state}, images, image sizes) -> predictions of these heads on one pass."""

  def apply(
    backbone: Any, states: Mapping[str, nnx.State], images: jax.Array, image_size: jax.Array
  ) -> dict[str, Any]:
    features = backbone(backbone.preprocessing.normalise(images, image_size))
    return {
      name: head.predict(nnx.merge(graphdefs[name], states[name]), images, image_size, features)
      for name, head in heads.items()
    }

  return apply


def run(table: report.Report) -> None:
  sizes = programs.TOY if table.tiny else programs.Sizes()
  batch, side = (1, 64) if table.tiny else (4, 640)
  heads = {
    "HTC": programs.Detection(sizes),
    "Mask2Former": programs.Segmentation(sizes),
    "linear": programs.LinearSegmentation(sizes),
  }
  backbone = models.for_detection("swinv2_b", tiny=table.tiny).folded(tiny=table.tiny)
  graphdefs, states = {}, {}
  for name, head in heads.items():
    graphdefs[name], states[name] = nnx.split(programs.build_head(head, backbone.feature_specs))
  images = jax.random.randint(jax.random.key(0), (batch, side, side, 3), 0, 256, jnp.uint8)
  image_size = jnp.full((batch, 2), side, jnp.int32)
  chosen = {"three heads, one pass": list(heads), **{f"{name} alone": [name] for name in heads}}
  arguments = {
    label: (backbone, {name: states[name] for name in names}, images, image_size)
    for label, names in chosen.items()
  }
  compiled = timing.compile_all(
    {
      label: (predict({name: heads[name] for name in names}, graphdefs), arguments[label])
      for label, names in chosen.items()
    },
    quick=table.tiny,
  )
  for program in compiled.values():
    if isinstance(program, Exception):
      raise program
  taken = timing.interleave(
    {label: timing.repeat(program.call, *arguments[label]) for label, program in compiled.items()},
    rounds=6 if table.tiny else 11,
    round_s=0.0 if table.tiny else 0.2,
    seconds=table.seconds_left() / 2,
  )
  together, *alone = chosen
  summed = [sum(times) for times in zip(*(taken[label] for label in alone))]
  for label, seconds in taken.items():
    program = compiled[label]
    median = statistics.median(seconds)
    table.add(
      program=label,
      rate=batch / median,
      ms=timing.milliseconds(seconds),
      mfu=table.utilisation(program.flops, median),
      weights=program.weight_bytes / 2**20,
      temporaries=program.temporary_bytes / 2**20,
      compile_s=program.compile_s,
    )
  table.add(
    program="the three alone, one after the other",
    rate=batch / statistics.median(summed),
    ms=timing.milliseconds(summed),
    mfu=table.utilisation(sum(compiled[label].flops for label in alone), statistics.median(summed)),
    weights=sum(compiled[label].weight_bytes for label in alone) / 2**20,
    temporaries=max(compiled[label].temporary_bytes for label in alone) / 2**20,
    ratio=timing.ratio(summed, taken[together]),
  )
  table.note(
    f"SwinV2-B, frozen and folded in bfloat16, {batch} image(s) of {side} px: from 8-bit images to "
    "predictions."
  )


PART = report.Part(
  "Three heads on one backbone pass against three passes",
  dict(
    program="program",
    rate="images/s",
    ms="ms (range)",
    ratio="times as long as one pass (95% interval)",
    mfu="MFU %",
    weights="arguments MiB",
    temporaries="temporaries MiB",
    compile_s="compile s",
  ),
  run,
)
