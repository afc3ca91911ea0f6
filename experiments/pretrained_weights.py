"""Pretrains SwinV2-nano in several ways, with the same images and steps, and writes weights files with cards.

  PYTHONPATH=. python experiments/pretrained_weights.py --data=FOLDER/cifar10_jpeg --workdir=/tmp/pretrained \
    --steps=1000

`PRETRAININGS` has the ways: masked image modeling, contrast, distillation from the shipped backbone, from
EfficientNet-Lite0 and from the first two, and classification, of nano and of two other widths. --only names
some of them, --out is the folder of the files (WORKDIR/weights by default). Each way is an ordinary run in a
folder of its own; a run that was ended goes on where it was, and one whose file is written is left alone.
--print_commands prints the commands instead; --tiny is the same in seconds, on generated shapes.

What lies in the package's folder of weights, `frozen_vision/backbones/weights`, is loaded by its name:
`fv.load_backbone("swinv2_nano_simmim")`.
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
import os
import pathlib
import shlex
import subprocess
import sys
import time
from typing import Any

import jax

import frozen_vision
from frozen_vision.files import atomic, checkpoint_file, trees
from frozen_vision.planning import machines
from frozen_vision.runs import curves

_REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
# MoCo's, the dearest, are 84 GFLOP each; the shipped backbone's were 46, and 9,360 took 112 minutes.
STEPS = 1000
_MOST_BYTES = 8_000_000  # of a file that ships


@dataclasses.dataclass(frozen=True)
class Pretraining:
  """One way.

  Attributes:
    config: of the run.
    section: of the config, which says where images are.
    title: of the card.
    options: of the config that differ.
  """

  config: str
  section: str
  title: str
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def is_supervised(self) -> bool:
    return self.section == "classification"


def _supervised(title: str, **sizes: Any) -> Pretraining:
  options = {f"backbone.overrides.{name}": value for name, value in sizes.items()}
  return Pretraining("configs/cifar10_swinv2_nano.py", "classification", title, options)


def _distilled(teacher: str) -> Pretraining:
  """Distillation from another way's file; that way must be done."""
  return Pretraining(
    "configs/feature_distillation.py:nano",
    "feature_distillation",
    f"features of {teacher}, distilled",
    {"feature_distillation.teacher.weights": f"{WEIGHTS}/{teacher}.safetensors"},
  )


WEIGHTS = "{weights}"  # the folder of the files, in options
PRETRAININGS = {
  "swinv2_nano_simmim": Pretraining(
    "configs/masked_image_modeling.py:nano", "masked_image_modeling", "masked pixels (SimMIM)"
  ),
  "swinv2_nano_moco": Pretraining(
    "configs/contrastive.py:nano", "contrastive", "contrast of views (MoCo v3)"
  ),
  "swinv2_nano_fd": Pretraining(
    "configs/feature_distillation.py:nano",
    "feature_distillation",
    "features of the shipped swinv2_nano, distilled",
  ),
  "swinv2_nano_lite0": Pretraining(
    "configs/feature_distillation.py:lite0",
    "feature_distillation",
    "features of the ImageNet-trained EfficientNet-Lite0, distilled",
  ),
  "swinv2_nano_moco_fd": _distilled("swinv2_nano_moco"),
  "swinv2_nano_simmim_fd": _distilled("swinv2_nano_simmim"),
  "swinv2_nano_supervised": _supervised("classes"),
  "swinv2_narrow_supervised": _supervised("classes; 16 channels", embed_dim=16),
  "swinv2_wide_supervised": _supervised("classes; 48 channels", embed_dim=48, num_heads=(2, 4, 8, 16)),
}


def options(name: str, steps: int, data: str | None, weights: pathlib.Path) -> dict[str, Any]:
  """Options of the config of one way; without `data` the tiny ones, of a smaller network on generated shapes.

  Args:
    weights: the folder of the files, where teachers are.
  """
  way = PRETRAININGS[name]
  found = {"steps": steps, "eval_every": 0, "checkpoint_every": 200, "keep_checkpoints": 1, "pictures": 0}
  for key, value in way.options.items():
    found[key] = value.replace(WEIGHTS, str(weights)) if isinstance(value, str) else value
  if data is not None:
    for split, archive in (("train", "train.tar.xz"), ("validation", "test.tar.xz")):
      found[f"{way.section}.{split}"] = os.path.join(data, archive)
    return found
  shapes = {"data": "shapes", "decoded_cache": False, "image_size": 32}
  shapes |= {"shapes.train_images": 32, "shapes.validation_images": 16, "shapes.image_size": 32}
  if not way.is_supervised:
    shapes["resized_to"] = 32
  else:
    found["classification.resolutions"] = ((0, 32),)
  sizes = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
  found |= {f"backbone.overrides.{key}": value for key, value in sizes.items()}
  found |= {"batch_size": 8, "eval_batch_size": 8, "optimizer.warmup_steps": 0, "log_every": 1}
  return found | {f"{way.section}.{key}": value for key, value in shapes.items()}


def commands(name: str, asked: argparse.Namespace, out: pathlib.Path) -> list[list[str]]:
  """The run and the export of one way, without the interpreter."""
  folder = f"--workdir={asked.workdir / name}"
  chosen = options(name, asked.steps, None if asked.tiny else asked.data, out.parent)
  config = [f"--config={PRETRAININGS[name].config}"]
  config += [f"--config.{key}={value}" for key, value in chosen.items()]
  config += [f"--{option}" for option in asked.option]
  return [
    ["-m", "frozen_vision.main", *config, folder],
    ["experiments/export_backbone.py", *config, folder, f"--out={out}"],
  ]


def pretrain(name: str, asked: argparse.Namespace, out: pathlib.Path) -> None:
  """Runs one way to its end, exports it, and writes its card.

  Raises:
    subprocess.CalledProcessError: a run that failed.
  """
  folder = asked.workdir / name
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_REPOSITORY), *filter(None, sys.path)])}
  train, export = ([sys.executable, *command] for command in commands(name, asked, out))
  if not out.exists():
    begun, started = (folder / "config.json").exists(), time.perf_counter()
    subprocess.run(train, cwd=_REPOSITORY, env=environment, check=True)
    if not begun:  # a run that was begun before took longer than this process knows
      atomic.write_json(folder / "minutes.json", {"minutes": (time.perf_counter() - started) / 60})
    subprocess.run(export, cwd=_REPOSITORY, env=environment, check=True)
  atomic.write_text(out.with_suffix(".md"), card(name, asked, out))


def card(name: str, asked: argparse.Namespace, out: pathlib.Path) -> str:
  """The Markdown beside a weights file."""
  folder = asked.workdir / name
  way, backbone = PRETRAININGS[name], frozen_vision.load_backbone(out)
  sizes, preprocessing = backbone.config, backbone.preprocessing
  parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trees.weights(backbone)))
  metrics = curves.evaluation_at(folder / "metrics.jsonl", asked.steps)
  fingerprint = checkpoint_file.open_checkpoint(out).metadata.get("fingerprint", "")
  cost = f"{asked.steps:,} steps"
  if (folder / "minutes.json").exists():
    minutes = json.loads((folder / "minutes.json").read_text(encoding="utf-8"))["minutes"]
    cost += f" in {minutes:.0f} minutes, the evaluation included, on {machines.processor()}"
  rows = {
    "learnt from": way.title,
    "network": f"SwinV2, {sizes.embed_dim} channels, depths {_listed(sizes.depths)}, heads "
    f"{_listed(sizes.num_heads)}, windows {_listed(sizes.window_sizes)}; {parameters:,} parameters",
    "file": f"`{out.name}`, {out.stat().st_size / 1e6:.1f} MB, float16; weights {fingerprint[:16]}",
    "pretrained windows": _listed(sizes.pretrained_window_sizes),
    "data": "a few generated shapes" if asked.tiny else _CIFAR,
    "input": f"RGB, mean {_listed(preprocessing.mean)}, deviation {_listed(preprocessing.std)}",
    "cost": cost,
    "at the end, on validation images, before rounding": "; ".join(
      f"{key} {value:.5g}" for key, value in metrics.items() if key != "examples_per_second"
    ),
  }
  table = "\n".join(f"| {what} | {value} |" for what, value in rows.items())
  return f"""# {name}

| | |
|---|---|
{table}

Values of the recipe are those of `{way.config}`; nothing was tuned for this file.

```sh
PYTHONPATH=. python experiments/pretrained_weights.py --data=DATA --workdir=RUNS --steps={asked.steps} \\
  --only={name}
```
"""


_CIFAR = (
  "the 50,000 training images of CIFAR-10 (Krizhevsky 2009) re-encoded as JPEG, seen at 64 px; no licence "
  "was published with them"
)


def _listed(values: Any) -> str:
  return ", ".join(f"{value:.4g}" for value in values)


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--data", help="folder of CIFAR-10: train.tar.xz and test.tar.xz")
  parser.add_argument("--workdir", required=True, type=_path, help="folder for the runs")
  parser.add_argument("--out", type=_path, help="folder of the weights files; WORKDIR/weights by default")
  parser.add_argument("--steps", type=int, default=STEPS, help="of 128 images, of every way")
  parser.add_argument("--only", default="", help="only these ways, separated by commas")
  parser.add_argument("--option", action="append", default=[], help="of every run: config.loader.threads=2")
  parser.add_argument(
    "--print_commands", action="store_true", help="print what is to be run, and run nothing"
  )
  parser.add_argument("--tiny", action="store_true", help="on a few generated shapes of 32 px, in seconds")
  asked = parser.parse_args(arguments)
  names = [name for name in asked.only.split(",") if name] or list(PRETRAININGS)
  if unknown := sorted(set(names) - set(PRETRAININGS)):
    parser.error(f"--only has {', '.join(unknown)}; known: {', '.join(PRETRAININGS)}")
  if asked.data is None and not asked.tiny:
    parser.error("--data is missing: the folder of CIFAR-10, with train.tar.xz and test.tar.xz")
  weights = asked.out or asked.workdir / "weights"
  for name in names:
    out = weights / f"{name}.safetensors"
    if asked.print_commands:
      if not out.exists():
        for command in commands(name, asked, out):
          print("PYTHONPATH=. python " + shlex.join(command))
      continue
    if out.exists() and out.with_suffix(".md").exists():
      print(f"{name}: {out} is there.", flush=True)
      continue
    weights.mkdir(parents=True, exist_ok=True)
    pretrain(name, asked, out)
    size = out.stat().st_size
    print(f"{name}: {out}, {size / 1e6:.1f} MB{' (too large to ship)' * (size > _MOST_BYTES)}.", flush=True)


def _path(text: str) -> pathlib.Path:
  return pathlib.Path(text).expanduser().absolute()


if __name__ == "__main__":
  main()
