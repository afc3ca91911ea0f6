"""Part 8: frozen DINOv3: masks from the L, probes on features, and the forward pass of the 7B.

The mask decoder is PMT's (`frozen_vision.heads.plain_mask_decoder`), whose authors state 141 images/s of
DINOv3-L at 640 px on an H100, for COCO's panoptic segmentation.
"""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.gpu import giant, models, programs, report, shared_pass, timing
from frozen_vision.probes import basis, knn, logistic

_GRID = np.logspace(-6, 5, 45)  # as `probes.linear.GRID`, whose module reads data


def run(table: report.Report) -> None:
  _masks(table)
  _probes(table)
  giant.measure(table, models.Backbone("dinov3_vit7b16"), (64,) if table.tiny else (640, 1024), what="the 7B")


def _masks(table: report.Report) -> None:
  """Images of 8 bits to a class for every pixel."""
  sizes, side = (programs.TOY, 64) if table.tiny else (programs.Sizes(), 640)
  head = programs.PlainMaskSegmentation(sizes)
  backbone = models.Backbone("dinov3_vitl16").folded(tiny=table.tiny)
  graphdef, state = nnx.split(programs.build_head(head, backbone.feature_specs))
  predict = shared_pass.predict({"masks": head}, {"masks": graphdef})
  for batch in (1,) if table.tiny else (1, 8):
    images = jax.random.randint(jax.random.key(0), (batch, side, side, 3), 0, 256, jnp.uint8)
    arguments = (backbone, {"masks": state}, images, jnp.full((batch, 2), side, jnp.int32))
    [program] = timing.compile_all({"": (predict, arguments)}, quick=table.tiny).values()
    if isinstance(program, Exception):
      raise program
    [seconds] = timing.interleave(
      {"": timing.repeat(program.call, *arguments)},
      rounds=2 if table.tiny else 9,
      round_s=0.0 if table.tiny else 0.4,
      seconds=table.seconds_left() / 4,
    ).values()
    table.add(
      what=f"L with a plain mask decoder, batch {batch}",
      storage="bfloat16",
      pixels=side,
      **giant.figures(table, program, seconds, batch),
    )


def _probes(table: report.Report) -> None:
  """Embeddings of the L's width with classes that overlap: the grid of 45 regressions, and neighbours."""
  examples, width, classes = (240, 16, 3) if table.tiny else (10_000, 1024, 100)
  rng = np.random.default_rng(0)
  labels = np.arange(examples) % classes
  features = rng.standard_normal((classes, width))[labels] + 8 * rng.standard_normal((examples, width))
  features = features.astype(np.float32)
  truth = labels[:, None] == np.arange(classes)

  def grid() -> None:
    found = basis.principal(features)
    for fit in logistic.path(found.coordinates(features), truth, _GRID):
      jax.block_until_ready(fit.weights)

  def neighbours() -> None:
    knn.top1(features, labels, features, labels)

  size = f"{examples:,} x {width:,}"
  _probe(table, f"45 logistic regressions on {size}, {classes} classes", grid)
  _probe(table, f"nearest neighbours of {size} among themselves", neighbours)


def _probe(table: report.Report, what: str, call: Callable[[], Any]) -> None:
  def run_times(times: int) -> None:
    for _ in range(times):
      call()

  [seconds] = timing.interleave(
    {"": run_times}, rounds=2 if table.tiny else 3, round_s=0.0, seconds=10.0
  ).values()
  table.add(what=what, storage="float32", ms=timing.milliseconds(seconds))


PART = report.Part(
  "Frozen DINOv3: the 7B, masks from the L, probes on features of the L's width",
  dict(what="what") | giant.COLUMNS,
  run,
)
