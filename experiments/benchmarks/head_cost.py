"""Cost of head capacity on a frozen backbone: {FPN, BiFPN x 1..9} x {Mask R-CNN, Cascade, HTC} on T, B and
G shapes.

  PYTHONPATH=. python experiments/benchmarks/head_cost.py
  PYTHONPATH=. python experiments/benchmarks/head_cost.py --measure --image=512 --dtype=float32 --rounds=1 \
    --out=experiments/results/head_cost.md

Parameters and FLOPs come from traces, nothing is compiled; --measure compiles every train step, on features
that are given as inputs, and adds its time and its peak memory: at 512 px about a minute a row on one core.
Without the backbone in the program, the giant needs no memory for it. FLOPs are those of matrix products and
convolutions. RoIAlign's loops over tiles depend on the rois; they are computed for rois of the distribution
that `sample_rois` draws, and stand in a column and a table of their own.
"""

import os
import re
import time
from typing import Any

from absl import app, flags
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from experiments import tables
from frozen_vision.backbones import families
from frozen_vision.config import OptimizerOptions
from frozen_vision.freezing import partition
from frozen_vision.heads.htc import config as htc_config
from frozen_vision.heads.htc import htc
from frozen_vision.necks.build import build_neck
from frozen_vision.ops import roi_align as roi_ops
from frozen_vision.planning import flops, machines
from frozen_vision.tasks import base
from frozen_vision.training import optimizer
from frozen_vision.training import step as train_step

_HEADS = {
  "mask_rcnn": htc_config.mask_rcnn,
  "cascade_mask_rcnn": htc_config.cascade_mask_rcnn,
  "htc": htc_config.htc,
}
_NECKS = ["fpn", *(f"bifpn{repeats}" for repeats in range(1, 10))]
_BACKBONES = flags.DEFINE_list("backbones", ["swinv2_t", "swinv2_b", "swinv2_g"], "Whose feature shapes.")
_NECK = flags.DEFINE_list("necks", _NECKS, "fpn, bifpnN (N repeats), or bifpnNs (depthwise-separable).")
_HEAD = flags.DEFINE_list("heads", list(_HEADS), "Presets of the head.")
_IMAGE = flags.DEFINE_integer("image", 1536, "Image side in pixels.")
_BATCH = flags.DEFINE_integer("batch", 1, "Images per step.")
_OBJECTS = flags.DEFINE_integer("objects", 100, "Rows of boxes and masks per image.")
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["bfloat16", "float32"], "Of features and of the head's products."
)
_MEASURE = flags.DEFINE_bool("measure", False, "Compile each train step: its time and its peak memory.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed steps; of several, one more comes before them.")
_OUT = flags.DEFINE_string("out", None, "Markdown file to write; printed only, if absent.")


class NeckAndHead(nnx.Module):
  """The modules that train."""

  def __init__(self, specs: Any, neck: str, head: htc_config.HTCConfig, dtype: Any, rngs: nnx.Rngs):
    match = re.fullmatch(r"(fpn|bifpn)(\d*)(s?)", neck)
    if match is None or (match[1] == "bifpn") != bool(match[2]):
      raise ValueError(f"--necks has {neck!r}; known: {_NECKS}, and bifpn1s, ...")
    options = dict(repeats=int(match[2]), separable=bool(match[3])) if match[2] else {}
    self.neck = build_neck(match[1], specs, **options, dtype=dtype, rngs=rngs)
    self.head = htc.HTC(self.neck.feature_specs, head, dtype=dtype, rngs=rngs)


class _Given:
  """As much of a task as the train step needs where features are given."""

  def prepare(self, batch: base.Batch, rng: jax.Array, phase: None) -> base.Batch:
    return batch

  def loss(
    self, model: NeckAndHead, batch: base.Batch, features: base.Features, rng: jax.Array, state: None
  ) -> base.Losses:
    return base.Losses(*model.head.losses(model.neck(features), batch, rng))


def make_inputs(specs: Any) -> tuple[dict[str, np.ndarray], tuple[jax.Array, ...]]:
  """A batch of 20 objects per image and random features."""
  side, batch, rows = _IMAGE.value, _BATCH.value, _OBJECTS.value
  rng = np.random.default_rng(0)
  boxes = np.zeros((batch, rows, 4), np.float32)
  boxes[:, :20] = sample_rois(rng, batch * 20, side).reshape(batch, 20, 4)
  targets = dict(
    image_size=np.full((batch, 2), side, np.int32),
    boxes=boxes,
    labels=np.zeros((batch, rows), np.int32),
    valid=np.broadcast_to(np.arange(rows) < 20, (batch, rows)),
    masks=np.zeros((batch, rows, side, -(-side // 8)), np.uint8),
  )
  sizes = [(batch, -(-side // spec.stride), -(-side // spec.stride), spec.channels) for spec in specs]

  def make(i, shape):
    return jax.random.normal(jax.random.key(i), shape, jnp.dtype(_DTYPE.value))

  if not _MEASURE.value:

    def make(i, shape):
      return jax.ShapeDtypeStruct(shape, jnp.dtype(_DTYPE.value))

  return targets, tuple(make(i, shape) for i, shape in enumerate(sizes))


def sample_rois(rng: np.random.Generator, count: int, side: int) -> np.ndarray:
  """xyxy: the root of the area log-uniform from 1/48 to 1/2 of the image's side, height over width from 1/2
  to 2."""
  root = side * np.exp(rng.uniform(np.log(1 / 48), np.log(1 / 2), count))
  ratio = np.exp(rng.uniform(np.log(1 / 2), np.log(2), count) / 2)
  sides = np.minimum(np.stack([root / ratio, root * ratio], -1), side)
  low = rng.uniform(0, 1, (count, 2)) * (side - sides)
  return np.concatenate([low, low + sides], -1).astype(np.float32)


def roi_align_flops(rois: np.ndarray, bins: int, ratio: int | None, channels: int) -> tuple[float, float]:
  """FLOPs of RoIAlign forward on one image: (as we run it, on tiles; as four products per sample point)."""
  config, tile, chunk = htc_config.HTCConfig(), 16, 64
  sampling = roi_ops.Sampling(bins, ratio)
  levels = np.asarray(roi_ops.assign_levels(rois, config.roi_levels, config.finest_scale))
  stride = 4 * 2.0**levels
  extent = (rois[:, 2:] - rois[:, :2]) / stride[:, None]
  start = rois[:, :2] / stride[:, None] - 0.5
  size = np.ceil(_IMAGE.value / stride).astype(np.int32)
  x, y = (
    roi_ops.make_line(
      jnp.asarray(start[None, :, i]), jnp.asarray(extent[None, :, i]), size[None], tile, sampling
    )
    for i in (0, 1)
  )
  rounds = roi_ops.tiled_order(y, x, chunk)[2].sum()
  tiles = float(rounds) * chunk * 2 * bins * tile * channels * (tile + bins)
  counts = np.asarray(sampling.counts(jnp.asarray(extent)), np.float64)
  return tiles, float(8 * bins**2 * channels * counts.prod(-1).sum())


def cost(specs: Any, neck: str, head: str) -> dict[str, float]:
  """One row of the table."""
  config = _HEADS[head]()

  def build_it():
    return NeckAndHead(specs, neck, config, jnp.dtype(_DTYPE.value), nnx.Rngs(0))

  model = build_it() if _MEASURE.value else nnx.eval_shape(build_it)
  graphdef, trainable = nnx.split(model)
  tx = optimizer.build(OptimizerOptions(), steps=1000, trainable=trainable, layer_of=lambda path: 0)

  def init(params):
    return train_step.init_state(params, tx, seed=0, ema=False)

  state = init(trainable) if _MEASURE.value else jax.eval_shape(init, trainable)
  step = train_step.make_train_step(_Given(), graphdef, tx, frozen_pass=False, given_features=True)
  batch, features = make_inputs(specs)
  rng = np.random.default_rng(1)
  # Positive rois alone have masks; forward and backward cost the same. A mask head that is fed by earlier
  # ones sees the same crops as they do.
  slots = int(config.roi_samples * config.roi_positive_fraction)
  pooled = 0.0
  for bins, count in ((config.box_roi_size, config.roi_samples), (config.mask_roi_size, slots)):
    rois = sample_rois(rng, count, _IMAGE.value)
    channels = model.head.feature_specs[0].channels
    pooled += 2 * config.num_stages * roi_align_flops(rois, bins, config.sampling_ratio, channels)[0]
  row = dict(
    parameters=sum(leaf.size for leaf in jax.tree.leaves(trainable)) / 1e6,
    neck=sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model.neck))) / 1e6,
    products=flops.count(step, state, nnx.State({}), batch, features) / 1e9,
    roi_align=_BATCH.value * pooled / 1e9,
  )
  return row | (_measure(step, state, batch, features) if _MEASURE.value else {})


def _measure(step: Any, state: Any, batch: Any, features: Any) -> dict[str, float]:
  batch = jax.device_put(batch)
  started = time.perf_counter()
  compiled = jax.jit(step, donate_argnums=0).lower(state, nnx.State({}), batch, features).compile()
  compile_s = time.perf_counter() - started
  memory = compiled.memory_analysis()
  peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
  seconds = []
  warm_up = int(_ROUNDS.value > 1)
  for _ in range(warm_up + _ROUNDS.value):
    started = time.perf_counter()
    state, scalars = compiled(state, nnx.State({}), batch, features)
    jax.block_until_ready(scalars)
    seconds.append(time.perf_counter() - started)
  return dict(
    ms=1e3 * float(np.median(seconds[warm_up:])),
    peak_mb=(peak - memory.alias_size_in_bytes) / 1e6,
    features_mb=sum(x.nbytes for x in features) / 1e6,
    state_mb=partition.num_bytes(state) / 1e6,
    compile_s=compile_s,
  )


def backbone_forward(name: str) -> tuple[Any, float, float]:
  """(feature specs, millions of parameters, GFLOP of a forward pass with windows of 32), from a trace."""
  shape = jax.ShapeDtypeStruct((_BATCH.value, _IMAGE.value, _IMAGE.value, 3), jnp.float32)
  backbone = nnx.eval_shape(
    lambda: families.build_backbone(
      name, window_size=32, pretrained_window_sizes=(12, 12, 12, 6), dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
  )
  graphdef, state = nnx.split(backbone)
  forward = flops.count(lambda state, images: nnx.merge(graphdef, state)(images), state, shape)
  return backbone.feature_specs, sum(leaf.size for leaf in jax.tree.leaves(state)) / 1e6, forward / 1e9


def roi_align_table() -> list[str]:
  """Fixed and adaptive sampling of 512 rois for boxes and 128 for masks, forward, 256 channels."""
  rows = [
    "| rois | sampling | GFLOP as run here, on tiles | GFLOP as four products per sample point |",
    "|---|---|---|---|",
  ]
  for count, bins in ((512, 7), (128, 14)):
    for ratio, name in ((2, "fixed, 2 x 2 points per bin"), (None, "adaptive, as mmdet")):
      rois = sample_rois(np.random.default_rng(1), count, _IMAGE.value)
      tiles, sampled = roi_align_flops(rois, bins, ratio, 256)
      rows.append(f"| {count}, {bins} x {bins} | {name} | {tiles / 1e9:.2f} | {sampled / 1e9:.2f} |")
  return rows


def _main(argv: list[str]) -> None:
  del argv
  columns = {
    "parameters": "trained M",
    "neck": "of these in the neck M",
    "products": "head GFLOP",
    "roi_align": "RoIAlign GFLOP",
  }
  timed = ""
  if _MEASURE.value:
    columns |= {
      "ms": "ms",
      "peak_mb": "peak MB",
      "features_mb": "of this features MB",
      "state_mb": "of this parameters and optimizer MB",
      "compile_s": "compile s",
    }
    timed = f", {'one timed step' if _ROUNDS.value == 1 else f'the median of {_ROUNDS.value} timed steps'}"
  rows = [
    "| frozen backbone | its M | its GFLOP, forward | neck | head | " + " | ".join(columns.values()) + " |",
    "|---|---|---|---|---|" + "---|" * len(columns),
  ]
  print("\n".join(rows), flush=True)
  # A kind of CPU is called cpu.
  kind = jax.devices()[0].device_kind
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  where = f"{cores} core{'s' * (cores > 1)} of {machines.processor()}" if kind == "cpu" else kind
  made_by = (
    "Made by `experiments/benchmarks/head_cost.py`: a train step of neck and head on given features of "
    f"{_BATCH.value} image(s) at {_IMAGE.value} px, {_OBJECTS.value} rows of objects, {_DTYPE.value}, on "
    f"{where}{timed}."
  )
  pooling = ["RoIAlign on one image, forward (backward costs the same):", "", *roi_align_table()]
  for name in _BACKBONES.value:
    specs, size, forward = backbone_forward(name)
    for neck in _NECK.value:
      for head in _HEAD.value:
        row = cost(specs, neck, head)
        values = " | ".join(f"{row[key]:,.1f}" for key in columns)
        rows.append(f"| {name} | {size:,.1f} | {forward:,.0f} | {neck} | {head} | {values} |")
        print(rows[-1], flush=True)
        tables.write("\n".join([made_by, "", *rows, "", *pooling, ""]), _OUT.value)
  print("\n".join(pooling))


if __name__ == "__main__":
  app.run(_main)
