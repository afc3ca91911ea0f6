"""Plans of large frozen backbones with each head on slices that people rent; what a device holds of them.

  PYTHONPATH=. python experiments/plans.py --out=experiments/results/plans.md
  PYTHONPATH=. python experiments/plans.py --only=htc --topologies=v5e:8x8
  PYTHONPATH=. python experiments/plans.py --group=vit --out=experiments/results/plans_vit.md
  PYTHONPATH=. python experiments/plans.py --group=convolutional \
    --out=experiments/results/plans_convolutional.md
  PYTHONPATH=. python experiments/plans.py --shares --out=experiments/results/frozen_shares.md
  PYTHONPATH=. python experiments/plans.py --shares --group=vit --out=experiments/results/frozen_shares_vit.md

Each row is `--mode=plan` in a process of its own, which takes 5 to 40 minutes; its `plan.json` stays in
--workdir, and a row that is there already is not planned again. The table has all rows of the group that are
there. Needs libtpu (pip install 'frozen_vision[tpu]'), no TPU.
"""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys

from absl import app, flags
from flax import nnx
import jax
import jax.numpy as jnp

from experiments import tables
from frozen_vision.backbones import base, families
from frozen_vision.devices import sharding
from frozen_vision.freezing import partition
from frozen_vision.layers import storage as stored
from frozen_vision.planning import machines

_GROUP = flags.DEFINE_enum("group", "swinv2_g", ["swinv2_g", "vit", "convolutional"], "Rows of one table.")
_TOPOLOGIES = flags.DEFINE_list("topologies", [], "Slices, in the place of those of each row.")
_ONLY = flags.DEFINE_list("only", [], "Rows of the group by name; all if empty.")
_WORKDIR = flags.DEFINE_string("workdir", "experiments/results/plans", "Where each plan.json stays.")
_PER_CHIP = flags.DEFINE_integer("per_chip", 1, "Examples (images or clips) on a chip.")
_SHARES = flags.DEFINE_bool("shares", False, "What one of 1 to 256 chips holds of frozen weights, instead.")
_OUT = flags.DEFINE_string("out", None, "Markdown file to write; printed only, if absent.")


@dataclasses.dataclass(frozen=True)
class Row:
  """A model with a head, and the slices that it is planned for.

  Attributes:
    title: head and input, in words.
    options: of the command.
    topologies: slices that it is planned for.
  """

  title: str
  options: tuple[str, ...]
  topologies: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Group:
  """The rows of one table.

  Attributes:
    rows: by name.
    finetune: plan the same steps with everything training, too.
    shared: backbones whose shares are measured, each with its options and the side of its images.
  """

  rows: dict[str, Row]
  finetune: bool = False
  shared: tuple[tuple[str, dict[str, object], int], ...] = ()


def _giant_rows() -> dict[str, Row]:
  """SwinV2-G. Fine-tuning under HTC must be told not to fit the smallest slice."""
  slices = ("v5e:8x8", "v5p:4x4x4", "v6e:4x4")
  windows = "--config.backbone.overrides.window_sizes=(56,56,56,56)"
  segmentation = "--config=configs/ade20k_mask2former.py:swinv2_g"
  video = "--config=configs/kinetics_video_swin.py:swinv2_g"
  return {
    "htc": Row("HTC, 1536 px, window 32", ("--config=configs/coco_htc.py:swinv2_g",), (*slices, "v5e:2x2")),
    "mask2former_640": Row("Mask2Former, 640 px, window 40", (segmentation,), slices),
    "mask2former_896": Row(
      "Mask2Former, 896 px, window 56",
      (segmentation, "--config.segmentation.frame=(896,896)", windows),
      slices,
    ),
    "video_8": Row("Video Swin, 8 frames of 384 px", (video, "--config.action.frames=8"), slices),
    "video_16": Row("Video Swin, 16 frames of 384 px", (video,), slices),
  }


def _vit_rows() -> dict[str, Row]:
  rows = {}
  for short, title, backbone, slices in (
    ("7b", "DINOv3-7B", "dinov3_vit7b16", ("v5e:8x8", "v6e:4x4")),
    ("vitl", "DINOv3-L", "dinov3_vitl16", ("v5e:2x2",)),
  ):
    for head, what, config, options in (
      ("htc", "HTC, 1024 px", "coco_htc.py", ()),
      ("mask2former", "Mask2Former, 896 px", "ade20k_mask2former.py", ()),
      (
        "video",
        "Video Swin, 16 frames of 384 px",
        "kinetics_video_swin.py",
        ("--config.action.image_size=384", "--config.action.short_side=438"),
      ),
    ):
      command = (f"--config=configs/{config}:backbone={backbone}", *options)
      rows[f"{short}_{head}"] = Row(f"{title}, {what}", command, slices)
  return rows


_REUSE = "--config=configs/coco_proper_reuse.py:detector=cascade,backbone="
GROUPS = {
  "swinv2_g": Group(
    _giant_rows(),
    finetune=True,
    shared=(("swinv2_g", dict(window_size=16, pretrained_window_sizes=(12, 12, 12, 6)), 256),),
  ),
  "vit": Group(_vit_rows(), shared=(("dinov3_vit7b16", {}, 224), ("dinov3_vitl16", {}, 224))),
  "convolutional": Group(
    {
      "rs200_cascade": Row(
        "ResNet-RS-200, Cascade on NAS-FPN, 1280 px",
        (f"{_REUSE}resnet_rs101", "--config.backbone.name=resnet_rs200"),
        ("v5e:2x2",),
      ),
      "b7_cascade": Row(
        "EfficientNet-B7, Cascade on NAS-FPN, 1280 px", (f"{_REUSE}efficientnet_b7",), ("v5e:2x2",)
      ),
    }
  ),
}


def command(row: Row, topology: str, folder: pathlib.Path) -> list[str]:
  """The command that plans one row."""
  devices = math.prod(int(side) for side in topology.split(":")[1].split("x"))
  return [
    "python",
    "-m",
    "frozen_vision.main",
    *row.options,
    f"--config.batch_size={devices * _PER_CHIP.value}",
    "--mode=plan",
    f"--topology={topology}",
    f"--workdir={folder}",
    *([] if GROUPS[_GROUP.value].finetune else ["--plan_finetune=False"]),
  ]


def plans() -> None:
  """Makes the plans that are asked for and not there, and writes the table after each."""
  rows = GROUPS[_GROUP.value].rows
  for name in _ONLY.value or rows:
    for topology in _TOPOLOGIES.value or rows[name].topologies:
      folder = _folder(name, topology)
      if not (folder / "plan.json").exists():
        subprocess.run([sys.executable, *command(rows[name], topology, folder)[1:]], check=True)
      tables.publish(table(), _OUT.value)


def table() -> str:
  """(versions, rows, commands) of all plans in --workdir."""
  group = GROUPS[_GROUP.value]
  topologies = [topology for row in group.rows.values() for topology in row.topologies]
  topologies = [*dict.fromkeys([*topologies, *_TOPOLOGIES.value])]
  found = {
    (topology, name): json.loads(path.read_text())
    for topology in topologies
    for name in group.rows
    if (path := _folder(name, topology) / "plan.json").exists()
  }
  with_shares = all("frozen_bytes" in report for report in found.values())
  titles = [
    *("slice", "head and input", "what trains", "frozen", *(["x chips / all"] if with_shares else [])),
    *("trained", "optimizer", "batch", "temporaries", "other", "total", "of", "fits", "TFLOP a step"),
    "step at 40% MFU",
  ]
  lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
  for (topology, name), report in found.items():
    for what, part in (("head", report), ("everything", report["finetune"])):
      if part is not None:
        cells = [topology, group.rows[name].title, what, *_cells(report, part, with_shares)]
        lines.append(f"| {' | '.join(cells)} |")
  versions = sorted({pair for report in found.values() for pair in report["versions"].items()})
  everything = (
    "`everything`: the same step with all parameters training in float32, blocks scanned and computed "
    "again on the way back. "
    if group.finetune
    else ""
  )
  return "\n".join(
    [
      f"Made by `experiments/plans.py` with {', '.join(' '.join(pair) for pair in versions)}; "
      "compiled on a CPU, never run.",
      "",
      f"GiB per chip, {_PER_CHIP.value} image or clip a chip, bfloat16 frozen weights sharded over all. "
      f"{everything}Of a step that does not fit the compiler says the total only: what the arguments do not "
      "explain stands under temporaries."
      + (" `x chips / all`: frozen bytes of a chip times the chips, beside those of all." * with_shares),
      "",
      *lines,
      "",
      "```sh",
      *(
        " ".join(_quoted(part) for part in command(group.rows[name], topology, pathlib.Path("/tmp/plan")))
        for topology, name in found
      ),
      "```",
      "",
    ]
  )


def _cells(report: dict, part: dict, with_shares: bool) -> list[str]:
  """A row of the table of one step, `part`, from the column `frozen` on."""
  parts, memory = part["bytes_per_device"], report["device_memory_bytes"]

  def size(*keys):
    return f"{sum(parts[key] for key in keys) / 2**30:.2f}"

  share = parts["frozen_weights"] * report["devices"] / report.get("frozen_bytes", 1)
  return [
    size("frozen_weights"),
    *([f"{share:.3f}"] if with_shares else []),
    size("trained_parameters"),
    size("optimizer"),
    size("batch"),
    size("temporaries"),
    size("layout", "program"),
    size("total"),
    f"{memory / 2**30:.2f}",
    "yes" if part["fits"] else f"**no**, {(parts['total'] - memory) / 2**30:.2f} too much",
    f"{part['model_flops_per_step'] / 1e12:,.0f}",
    f"{part['step_seconds']:.2f} s",
  ]


def shares() -> str:
  """Tables of the arguments' bytes of the compiled forward pass on one of N chips, beside an N-th of all."""
  # Before anything else uses jax.
  slices = [machines.describe(f"v5e:{size}") for size in machines.CHIPS["v5e"].slices]
  lines = [f"Made by `experiments/plans.py --shares` with {tables.versions()}; compiled on a CPU, never run."]
  for name, options, side in GROUPS[_GROUP.value].shared:
    lines += [
      "",
      f"Arguments of the compiled forward pass of a frozen {name} (bfloat16, {side} px, one image a chip), "
      "without the image.",
      "",
      "| slice | chips | MiB per chip | an N-th of all | ratio |",
      "|---" * 5 + "|",
    ]
    backbone = families.abstract_backbone(name, **options, dtype=jnp.bfloat16)
    for part in slices:
      lines.append(_share(backbone, side, part))
      print(lines[-1], flush=True)
  return "\n".join([*lines, ""])


def _share(backbone: base.Backbone, side: int, part: machines.Machine) -> str:
  """A row of `shares`, of one slice."""

  # Bits stand for bfloat16 on CPU alone.
  def dtype(leaf):
    return jnp.bfloat16 if leaf.dtype == jnp.uint16 else leaf.dtype

  folded = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype(leaf)), stored.shapes(backbone, storage="bfloat16")
  )
  graphdef, state = nnx.split(folded)
  count, mesh = len(part.devices), sharding.make_mesh(devices=part.devices)
  placed = jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
    state,
    sharding.frozen_shardings(state, mesh, rules={"backbone": backbone.sharding_rules}),
  )
  image = jax.ShapeDtypeStruct((count, side, side, 3), jnp.bfloat16, sharding=sharding.batch_sharding(mesh))
  forward = jax.jit(
    lambda state, images: nnx.merge(graphdef, state)(images)[-1].sum(),
    out_shardings=sharding.replicated(mesh),
  )
  with jax.set_mesh(mesh):
    compiled = forward.lower(placed, image).compile()
  image_bytes = 2 * math.prod(image.sharding.shard_shape(image.shape))
  held = compiled.memory_analysis().argument_size_in_bytes - image_bytes
  share = partition.num_bytes(state) / count
  return f"| {part.name} | {count} | {held / 2**20:,.1f} | {share / 2**20:,.1f} | {held / share:.3f} |"


def _folder(name: str, topology: str) -> pathlib.Path:
  more = f"-x{_PER_CHIP.value}" if _PER_CHIP.value > 1 else ""
  return pathlib.Path(_WORKDIR.value) / f"{name}-{topology.replace(':', '-')}{more}"


def _quoted(part: str) -> str:
  return f'"{part}"' if "(" in part else part


def _main(argv: list[str]) -> None:
  del argv
  rows = GROUPS[_GROUP.value].rows
  unknown = set(_ONLY.value) - set(rows)
  if unknown:
    raise app.UsageError(f"--only has {sorted(unknown)}; known in --group={_GROUP.value}: {', '.join(rows)}.")
  if _SHARES.value:
    tables.publish(shares(), _OUT.value)
  else:
    plans()


if __name__ == "__main__":
  app.run(_main)
