"""Writes the backbone of a finished pretraining as a weights file, and measures what was written.

  PYTHONPATH=. python experiments/export_backbone.py --config=configs/cifar10_swinv2_nano.py \
    --workdir=/tmp/nano --out=frozen_vision/backbones/weights/swinv2_nano.safetensors --dtype=float16

The run is one that trained its backbone: classification, feature distillation, masked image modeling or
contrastive pretraining. The metrics printed are those of the written file, rounding included, under what else
the run has trained: classifier, projector or decoder.
"""

import logging
import sys

from absl import flags
from flax import nnx
import jax
import numpy as np

import frozen_vision
from frozen_vision import command_line
from frozen_vision.config import Config
from frozen_vision.runs import checkpoints as checkpoint
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import evaluation, loop
from frozen_vision.training import step as train_step


def export(config: Config, workdir: str, out: str, dtype: str) -> dict[str, float]:
  """Writes the weights and returns the metrics of the file as it was written."""
  config = config.replace({"backbone.fold": False})  # what is written are the parameters themselves
  task = tasks_build.build_task(config)
  model = loop.build_model(task, config, with_teacher=task.teacher_in_evaluation)
  with checkpoint.Checkpoints(workdir) as checkpoints:
    trainable, mutable, meta = checkpoints.restore_evaluated(
      model.trainable, model.mutable, averaged=config.ema_decay > 0
    )
  module = nnx.merge(model.graphdef, trainable, mutable, model.frozen)
  frozen_vision.save_backbone(module.backbone, out, name=config.backbone.name, dtype=np.dtype(dtype))
  module.backbone = frozen_vision.load_backbone(out)
  graphdef, parameters, rest = nnx.split(module, nnx.Param, ...)
  val = task.evaluations["val"]
  predict = jax.jit(train_step.make_predict_step(task, graphdef, val.largest_size))
  nothing = nnx.State({})
  metrics, _, _ = evaluation.evaluate(
    val, lambda batch: predict(parameters, nothing, rest, train_step.device_batch(batch))
  )
  return {"step": meta["step"], **metrics}


def _main(config: command_line.ConfigFlag) -> None:
  logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
  given = flags.FLAGS
  metrics = export(config.value, given.workdir, given.out, given.dtype)
  print(f"{given.out}: " + "  ".join(f"{name} {value:.5g}" for name, value in metrics.items()))


if __name__ == "__main__":
  # Flags are defined here, so that who imports `export` may have others of the same names.
  _config = command_line.define_config("The run's configuration.")
  flags.DEFINE_string("workdir", None, "The run's folder.")
  flags.DEFINE_string("out", None, "The .safetensors file to write.")
  flags.DEFINE_enum("dtype", "float16", ["float16", "float32"], "How the weights are stored.")
  flags.mark_flags_as_required(["config", "workdir", "out"])
  command_line.run(lambda _: _main(_config))
