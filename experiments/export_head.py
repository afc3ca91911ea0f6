"""Writes the neck and head of a detection run's newest checkpoint as a file that another run may start from.

  PYTHONPATH=. python experiments/export_head.py --config=configs/coco_htc.py:objects365_swinv2_g \
    --workdir=/tmp/objects365 --out=o365.safetensors

The other run reads it with --config.detection.init.path=o365.safetensors.
"""

import pathlib

from absl import flags
from flax import nnx
import numpy as np

from frozen_vision import command_line
from frozen_vision.config import Config
from frozen_vision.files import trees
from frozen_vision.heads import files
from frozen_vision.runs import checkpoints as checkpoint
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import loop

_CONFIG = command_line.define_config("The run's configuration.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")
_OUT = flags.DEFINE_string("out", None, "The .safetensors file to write.")


def export(config: Config, workdir: str, out: str) -> tuple[int, str]:
  """Writes the averaged parameters, where the run has them; returns the step and the fingerprint."""
  model = loop.build_model(tasks_build.build_task(config), config)
  part = "ema" if config.ema_decay > 0 else "trainable"
  with checkpoint.Checkpoints(workdir) as checkpoints:
    trainable, mutable, meta = checkpoints.restore_evaluated(
      model.trainable, model.mutable, averaged=part == "ema"
    )
  module = nnx.merge(model.graphdef, trainable, mutable, model.frozen)
  arrays = {
    name: np.asarray(leaf, np.float32)
    for name, leaf in trees.flatten(nnx.state(module, (nnx.Param, nnx.BatchStat))).items()
    if name.startswith(files.PARTS)
  }
  source = f"step {meta['step']} of {pathlib.Path(workdir).name}, {config.detection.head.name}, {part}"
  return meta["step"], files.save(out, arrays, source=source)


def _main(argv: list[str]) -> None:
  del argv
  step, fingerprint = export(_CONFIG.value, _WORKDIR.value, _OUT.value)
  print(f"{_OUT.value}: neck and head of step {step}, fingerprint {fingerprint}")


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir", "out"])
  command_line.run(_main)
