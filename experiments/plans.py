"""Plans of giant backbones with each head on slices that people rent; what a device holds of frozen weights.

  PYTHONPATH=. python experiments/plans.py --out=experiments/results/plans.md
  PYTHONPATH=. python experiments/plans.py --only=htc --topologies=v5e:8x8
  PYTHONPATH=. python experiments/plans.py --only=7b_htc,7b_mask2former,7b_video --topologies=v5e:8x8,v6e:4x4
  PYTHONPATH=. python experiments/plans.py --shares --out=experiments/results/frozen_shares.md

Each row is `--mode=plan` in a process of its own, which takes 5 to 40 minutes; its `plan.json` stays in
--workdir, and a row that is there already is not planned again. The table has all rows that are there. Needs
libtpu (pip install 'frozen_vision[tpu]'), no TPU.
"""

import json
import math
import pathlib
import subprocess
import sys
import time

from absl import app, flags
from flax import nnx
import jax
import jax.numpy as jnp

from experiments import tables
from frozen_vision.backbones import families
from frozen_vision.devices import sharding
from frozen_vision.freezing import partition
from frozen_vision.layers import storage as stored
from frozen_vision.planning import machines

_TOPOLOGIES = flags.DEFINE_list("topologies", ["v5e:8x8", "v5p:4x4x4", "v6e:4x4"], "Slices.")
_ONLY = flags.DEFINE_list("only", [], "Rows of the table by name; those of SwinV2-G if empty.")
_WORKDIR = flags.DEFINE_string("workdir", "experiments/results/plans", "Where each plan.json stays.")
_PER_CHIP = flags.DEFINE_integer("per_chip", 1, "Examples (images or clips) on a chip.")
_SHARES = flags.DEFINE_bool("shares", False, "What one of 1 to 256 chips holds of frozen weights, instead.")
_OUT = flags.DEFINE_string("out", None, "Markdown file to write; printed only, if absent.")

_WINDOWS = "--config.backbone.overrides.window_sizes=({0},{0},{0},{0})"
# Of DINOv3, planned when --only names them.
_PLAIN_ROWS = {
  f"{short}_{head}": (f"{title}, {what}", [f"--config=configs/{config}:backbone={backbone}", *options])
  for short, title, backbone in (
    ("7b", "DINOv3-7B", "dinov3_vit7b16"),
    ("vitl", "DINOv3-L", "dinov3_vitl16"),
  )
  for head, what, config, options in (
    ("htc", "HTC, 1024 px", "coco_htc.py", []),
    ("mask2former", "Mask2Former, 896 px", "ade20k_mask2former.py", []),
    (
      "video",
      "Video Swin, 16 frames of 384 px",
      "kinetics_video_swin.py",
      ["--config.action.image_size=384", "--config.action.short_side=438"],
    ),
  )
}
# By name: what it is, and the command's options.
ROWS = {
  "htc": ("HTC, 1536 px, window 32", ["--config=configs/coco_htc.py:swinv2_g"]),
  "mask2former_640": ("Mask2Former, 640 px, window 40", ["--config=configs/ade20k_mask2former.py:swinv2_g"]),
  "mask2former_896": (
    "Mask2Former, 896 px, window 56",
    [
      "--config=configs/ade20k_mask2former.py:swinv2_g",
      "--config.segmentation.frame=(896,896)",
      _WINDOWS.format(56),
    ],
  ),
  "video_8": (
    "Video Swin, 8 frames of 384 px",
    ["--config=configs/kinetics_video_swin.py:swinv2_g", "--config.action.frames=8"],
  ),
  "video_16": ("Video Swin, 16 frames of 384 px", ["--config=configs/kinetics_video_swin.py:swinv2_g"]),
  **_PLAIN_ROWS,
}
# Beside --topologies, the smallest slice: fine-tuning must be told not to fit.
_SMALL = ("htc", "v5e:2x2")


def command(name: str, topology: str, folder: pathlib.Path) -> list[str]:
  """The command that plans one row."""
  devices = math.prod(int(side) for side in topology.split(":")[1].split("x"))
  return [
    "python",
    "-m",
    "frozen_vision.main",
    *ROWS[name][1],
    f"--config.batch_size={devices * _PER_CHIP.value}",
    "--mode=plan",
    f"--topology={topology}",
    f"--workdir={folder}",
  ]


def plans() -> None:
  """Makes the plans that are asked for and not there, and writes the table after each."""
  names = _ONLY.value or [name for name in ROWS if name not in _PLAIN_ROWS]
  pairs = [(name, topology) for topology in _TOPOLOGIES.value for name in names]
  if not _ONLY.value:
    pairs.append(_SMALL)
  for name, topology in pairs:
    folder = _folder(name, topology)
    if not (folder / "plan.json").exists():
      subprocess.run([sys.executable, *command(name, topology, folder)[1:]], check=True)
    tables.publish(table(), _OUT.value)


def table() -> str:
  """(versions, rows, commands) of all plans in --workdir."""
  rows = [
    "| slice | head and input | what trains | frozen | trained | optimizer | batch | temporaries | other "
    "| total | of | fits | TFLOP a step | step at 40% MFU | compiled in |",
    "|---" * 15 + "|",
  ]
  commands, versions = [], set()
  topologies = [*dict.fromkeys([*_TOPOLOGIES.default, *_TOPOLOGIES.value, _SMALL[1]])]
  for name, topology in [(name, topology) for topology in topologies for name in ROWS]:
    path = _folder(name, topology) / "plan.json"
    if not path.exists():
      continue
    report = json.loads(path.read_text())
    versions |= set(report["versions"].items())
    commands.append(" ".join(_quoted(part) for part in command(name, topology, pathlib.Path("/tmp/plan"))))
    for what, part in (("head", report), ("everything", report["finetune"])):
      parts = part["bytes_per_device"]

      def size(*keys):
        return f"{sum(parts[key] for key in keys) / 2**30:.2f}"

      memory = report["device_memory_bytes"]
      fits = "yes" if part["fits"] else f"**no**, {(parts['total'] - memory) / 2**30:.2f} too much"
      rows.append(
        "| "
        + " | ".join(
          [
            topology,
            ROWS[name][0],
            what,
            size("frozen_weights"),
            size("trained_parameters"),
            size("optimizer"),
            size("batch"),
            size("temporaries"),
            size("layout", "program"),
            size("total"),
            f"{memory / 2**30:.2f}",
            fits,
            f"{part['model_flops_per_step'] / 1e12:,.0f}",
            f"{part['step_seconds']:.2f} s",
            f"{part['compile_seconds']:.0f} s",
          ]
        )
        + " |"
      )
  return "\n".join(
    [
      f"Made by `experiments/plans.py` with {', '.join(' '.join(pair) for pair in sorted(versions))}; "
      "compiled on a CPU, never run.",
      "",
      f"GiB per chip, {_PER_CHIP.value} image or clip a chip, bfloat16 frozen weights sharded over all. "
      "`everything`: the same step with all parameters training in float32, blocks scanned and computed "
      "again on the way back. Of a step that does not fit the compiler says the total only: what the "
      "arguments do not explain stands under temporaries.",
      "",
      *rows,
      "",
      "```sh",
      *commands,
      "```",
      "",
    ]
  )


def shares() -> str:
  """A table of the arguments' bytes of the compiled forward pass on one of N chips, beside an N-th of all."""
  rows = ["| slice | chips | MiB per chip | an N-th of all | ratio |", "|---" * 5 + "|"]
  # Before anything else uses jax.
  slices = [machines.describe(f"v5e:{size}") for size in machines.CHIPS["v5e"].slices]
  backbone = families.abstract_backbone(
    "swinv2_g", window_size=16, pretrained_window_sizes=(12, 12, 12, 6), dtype=jnp.bfloat16
  )

  # Bits stand for bfloat16 on CPU alone.
  def dtype(leaf):
    return jnp.bfloat16 if leaf.dtype == jnp.uint16 else leaf.dtype

  folded = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype(leaf)), stored.shapes(backbone, storage="bfloat16")
  )
  graphdef, state = nnx.split(folded)
  whole = partition.num_bytes(state)
  for part in slices:
    count, mesh = len(part.devices), sharding.make_mesh(devices=part.devices)
    placed = jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
      state,
      sharding.frozen_shardings(state, mesh, rules={"backbone": backbone.sharding_rules}),
    )
    image = jax.ShapeDtypeStruct((count, 256, 256, 3), jnp.bfloat16, sharding=sharding.batch_sharding(mesh))
    forward = jax.jit(
      lambda state, images: nnx.merge(graphdef, state)(images)[-1].sum(),
      out_shardings=sharding.replicated(mesh),
    )
    started = time.perf_counter()
    with jax.set_mesh(mesh):
      compiled = forward.lower(placed, image).compile()
    image_bytes = 2 * math.prod(image.sharding.shard_shape(image.shape))
    held = compiled.memory_analysis().argument_size_in_bytes - image_bytes
    share = whole / count
    rows.append(
      f"| {part.name} | {count} | {held / 2**20:,.1f} | {share / 2**20:,.1f} | {held / share:.3f} |"
    )
    print(rows[-1], f"compiled in {time.perf_counter() - started:.0f} s", flush=True)
  return "\n".join(
    [
      f"Made by `experiments/plans.py --shares` with {tables.versions()}; compiled on a CPU, never run.",
      "",
      "Arguments of the compiled forward pass of a frozen SwinV2-G (bfloat16, window 16, 256 px, one image a "
      "chip), without the image.",
      "",
      *rows,
      "",
    ]
  )


def _folder(name: str, topology: str) -> pathlib.Path:
  more = f"-x{_PER_CHIP.value}" if _PER_CHIP.value > 1 else ""
  return pathlib.Path(_WORKDIR.value) / f"{name}-{topology.replace(':', '-')}{more}"


def _quoted(part: str) -> str:
  return f'"{part}"' if "(" in part else part


def _main(argv: list[str]) -> None:
  del argv
  unknown = set(_ONLY.value) - set(ROWS)
  if unknown:
    raise app.UsageError(f"--only has {sorted(unknown)}; known: {', '.join(ROWS)}.")
  if _SHARES.value:
    tables.publish(shares(), _OUT.value)
  else:
    plans()


if __name__ == "__main__":
  app.run(_main)
