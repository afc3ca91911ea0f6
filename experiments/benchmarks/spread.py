"""Frozen blocks on many chips: weights gathered for each block, or chips that share the work of a block.

  PYTHONPATH=. python experiments/benchmarks/spread.py --out=experiments/results/spread.md

Compiles a plain and a shifted block of the third stage of SwinV2-G, forward, with one image a chip, for TPU
slices that nobody has to own (libtpu). `gathered` is what the library does: images are split over all chips,
weights too, and every block's are gathered before it works. `tensor parallel` leaves weights in parts, as
Megatron-LM does (arXiv 1909.08053): heads and hidden units are split over the chips of a group, all of which
work on all images of the group, and two sums over the group a block put the parts together.

What a chip receives is counted in the compiled program.
"""

import math
import re
from typing import Any

from absl import app, flags
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from experiments import tables
from frozen_vision.backbones.swinv2 import config as swinv2_config
from frozen_vision.backbones.swinv2 import windows
from frozen_vision.devices import sharding
from frozen_vision.planning import machines

_TOPOLOGIES = flags.DEFINE_list("topologies", ["v5e:2x4", "v5e:8x8"], "Slices.")
_IMAGE = flags.DEFINE_integer("image", 1536, "Image side in pixels.")
_WINDOW = flags.DEFINE_integer("window", 32, "Window side in cells of stride 16.")
_OUT = flags.DEFINE_string("out", None, "Markdown file to write; printed only, if absent.")

_GIANT, _STAGE = swinv2_config.VARIANTS["swinv2_g"], 2
_BYTES = {"bf16": 2, "f32": 4}
# Axes that are split over the chips of a group: outputs of the first matrix, inputs of the second.
_PARTS = {"q": -1, "k": -1, "v": -1, "fc1": -1, "proj": -2, "fc2": -2}


def shapes(channels: int) -> dict[str, tuple[int, int]]:
  """Shapes of a block's matrices; its vectors are left out."""
  return {
    **{name: (channels, channels) for name in ("q", "k", "v", "proj")},
    "fc1": (channels, 4 * channels),
    "fc2": (4 * channels, channels),
  }


def block(x: jax.Array, weights: dict[str, jax.Array], *, heads: int, shifted: bool) -> jax.Array:
  """A block in post-norm order, with plain norms and without biases."""

  def norm(x):
    return jax.nn.standardize(x.astype(jnp.float32), axis=-1).astype(x.dtype)

  scale = jnp.full(heads, 10.0)

  def attention(x, window, regions):
    qkv = jnp.concatenate([x @ weights[name] for name in "qkv"], axis=-1)
    cells = math.prod(window)
    return windows.cosine_attention(qkv, window, scale, jnp.zeros((heads, cells, cells)), regions)

  x = x + norm(windows.attend_in_windows(x, _WINDOW.value, shifted, attention, heads) @ weights["proj"])
  return x + norm(jax.nn.gelu(x @ weights["fc1"]) @ weights["fc2"])


def compiled(devices: Any, layout: str, model: int) -> tuple[jax.stages.Compiled, int]:
  """(two blocks on as many images as devices, bytes of the two blocks' weights on a device)."""
  mesh = sharding.make_mesh(-1, model, devices)
  channels, heads = _GIANT.embed_dim * 2**_STAGE, _GIANT.num_heads[_STAGE]
  if layout == "gathered":

    def where(name: str) -> PartitionSpec:
      return PartitionSpec(None, sharding.AXES)

    batch = PartitionSpec(sharding.AXES)
  else:

    def where(name):
      return PartitionSpec(*((None, "model") if _PARTS[name] == -1 else ("model", None)))

    batch = PartitionSpec("data")

  def leaf(shape, spec):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

  weights = [{name: leaf(shape, where(name)) for name, shape in shapes(channels).items()} for _ in range(2)]
  side = _IMAGE.value // 16
  image = leaf((len(devices), side, side, channels), batch)

  def forward(x, weights):
    for number, leaves in enumerate(weights):
      leaves = sharding.gathered(leaves) if layout == "gathered" else leaves
      x = block(x, leaves, heads=heads, shifted=number % 2 == 1)
      x = jax.lax.with_sharding_constraint(x, batch)
    return x

  with jax.set_mesh(mesh):
    program = jax.jit(forward, out_shardings=image.sharding).lower(image, weights).compile()
  held = sum(
    2 * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaves in weights for leaf in leaves.values()
  )
  return program, held


def received_bytes(text: str, group: int) -> dict[str, float]:
  """Bytes that one of `group` chips receives, by collective operation, along a ring: of a gathered array what
  it lacks, of a sum twice as much (parts of sums, then the sums of the other parts).
  """
  channels = {}
  for line in text.splitlines():
    match = re.search(r" = (.+?) (all-gather|all-reduce)\(.*channel_id=(\d+)", line)
    if match is not None:
      # One that works while others do stands in the program once for each of them, under one channel.
      channels[match[3]] = (
        match[2],
        sum(
          _BYTES[kind] * math.prod(map(int, sizes.split(",")))
          for kind, sizes in re.findall(r"(\w+)\[([0-9,]+)\]", match[1])
        ),
      )
  others = set(re.findall(r" (reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text))
  if others or not channels:
    raise ValueError(f"The program has {sorted(others) or 'no collectives'}: that is not counted here.")
  received: dict[str, float] = {}
  for name, size in channels.values():
    passes = 2 if name == "all-reduce" else 1
    received[name] = received.get(name, 0) + passes * size * (group - 1) / group
  return received


def _main(argv: list[str]) -> None:
  del argv
  rows = [
    "| slice | layout | chips in a group | weights of a block MiB | temporaries MiB | received a block MiB |",
    "|---" * 6 + "|",
  ]
  for topology in _TOPOLOGIES.value:
    devices = machines.describe(topology).devices
    for layout, model in (("gathered", 1), ("tensor parallel", 8), ("tensor parallel", 4)):
      program, held = compiled(devices, layout, model)
      group = len(devices) if layout == "gathered" else model
      received = received_bytes(program.as_text(), group)
      parts = ", ".join(f"{name} {size / 2 / 2**20:.0f}" for name, size in sorted(received.items()))
      rows.append(
        f"| {topology} | {layout} | {group} | {held / 2 / 2**20:.1f} "
        f"| {program.memory_analysis().temp_size_in_bytes / 2**20:.0f} | {parts} |"
      )
      print(rows[-1], flush=True)
  text = "\n".join(
    [
      f"Made by `experiments/benchmarks/spread.py` with {tables.versions()}: a block of SwinV2-G's "
      f"third stage, forward, bfloat16, one image of {_IMAGE.value} px a chip, window {_WINDOW.value}; a "
      "plain and a shifted block compiled together, halved. Per chip; compiled on a CPU, never run.",
      "",
      *rows,
      "",
    ]
  )
  tables.publish(text, _OUT.value)


if __name__ == "__main__":
  app.run(_main)
