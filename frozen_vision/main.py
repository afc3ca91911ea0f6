"""Command line: python -m frozen_vision.main --config=configs/FILE.py[:ARGUMENTS] --workdir=DIR."""

from frozen_vision.devices import huge_pages

if __name__ == "__main__":
  huge_pages.restart()  # before the imports below, which take seconds

# pylint: disable=wrong-import-position
import logging
import sys

from absl import app, flags
import jax

from frozen_vision import command_line, config_files, failures, fine_tune, output, probe
from frozen_vision.devices import processes as distributed
from frozen_vision.planning import plan
from frozen_vision.prediction import files as predict_files
from frozen_vision.report import command as report
from frozen_vision.training import loop

_CONFIG = command_line.define_config(
  "Config file and its arguments, such as configs/coco_htc.py:recipe=files."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder for checkpoints, metrics and pictures; an interrupted run continues there."
)
_MODE = flags.DEFINE_enum(
  "mode",
  "train",
  ["train", "evaluate", "predict", "plan", "extract", "probe", "fine_tune", "report"],
  "What to do.",
)
report.define_flags()
_INPUTS = flags.DEFINE_multi_string(
  "inputs", [], "To predict on: folders, files or patterns of images and videos; further arguments are too."
)
_HEADS = flags.DEFINE_list(
  "heads", [], "Of prediction with several heads, in place of --workdir: workdirs, or NAME=WORKDIR."
)
_OUT = flags.DEFINE_string("out", None, "Folder of predictions; by default one in the workdir.")
_BACKBONE = flags.DEFINE_string(
  "backbone", None, "Of prediction: weights in place of those of the heads' configs."
)
_IMAGE_SIZE = flags.DEFINE_list(
  "image_size", [], "Of prediction: side, or height,width, of one frame for the images of all heads."
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Join the other processes of this run; see frozen_vision/devices/processes.py."
)
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "Of planning: the machine, such as v5e:8x8, v5p:4x4x4, v6e:4x4 or cpu:8."
)
_MFU = flags.DEFINE_float(
  "mfu", 0.4, "Of planning: the fraction of the peak FLOPs that the step time is computed with."
)
_PLAN_FINETUNE = flags.DEFINE_bool(
  "plan_finetune", True, "Of planning: plan the same step with everything training, too."
)
_DEBUG = flags.DEFINE_bool("debug", False, "Print the traceback of an error, too.")
# Flags that a mode needs.
_NEEDED = {
  "train": ("config", "workdir"),
  "evaluate": ("config", "workdir"),
  "predict": ("inputs",),
  "plan": ("config", "workdir", "topology"),
  "extract": ("config",),
  "probe": ("config", "workdir"),
  "fine_tune": ("config", "workdir"),
  "report": ("backbones", "workdir"),
}


def usage() -> str:
  """The modes and the shipped configs, as text."""
  configs = "\n".join(f"  {name:<22} {line}" for name, line in config_files.describe().items())
  return f"""python -m frozen_vision.main --config=CONFIG[:ARGUMENTS] --workdir=FOLDER [--config.OPTION=VALUE]

trains, and continues what it finds in the folder. Other modes:
  --mode=evaluate  evaluates the newest checkpoint of the workdir
  --mode=predict   --workdir=FOLDER IMAGE ...  writes and draws what a trained head finds; needs no --config
  --mode=extract   --config.cache.path=FOLDER  fills the feature cache ahead; see docs/pages/features.md
  --mode=probe     says what the embeddings of a frozen backbone know: linear, kNN, few-shot, calibration
  --mode=fine_tune trains a classifier for a grid of learning rates and weight decays, and tests the best
  --mode=report    --backbones=NAME,FILE  takes backbones through every task, and makes a page
  --mode=plan      --topology=v5e:8x8  says whether a config fits a machine, without the machine

Configs; a path to a file of your own works too:
{configs}

--help lists all flags, --debug prints tracebacks."""


def _run(argv: list[str]) -> None:
  """Does what the flags say."""
  match _MODE.value:
    case "train":
      loop.train(_CONFIG.value, command_line.path(_WORKDIR.value))
    case "evaluate":
      loop.evaluate(_CONFIG.value, command_line.path(_WORKDIR.value))
    case "extract":
      loop.extract(_CONFIG.value)
    case "predict":
      predict_files.predict(
        _INPUTS.value + argv[1:],
        workdir=command_line.path(_WORKDIR.value),
        heads=[command_line.path(head) for head in _HEADS.value],
        out=command_line.path(_OUT.value),
        backbone=command_line.path(_BACKBONE.value),
        image_size=[int(side) for side in _IMAGE_SIZE.value],
      )
    case "probe":
      probe.probe(_CONFIG.value, command_line.path(_WORKDIR.value))
    case "fine_tune":
      fine_tune.fine_tune(_CONFIG.value, command_line.path(_WORKDIR.value))
    case "report":
      report.from_flags(command_line.path(_WORKDIR.value))
    case "plan":
      plan.plan(
        _CONFIG.value,
        command_line.path(_WORKDIR.value),
        _TOPOLOGY.value,
        mfu=_MFU.value,
        name=_CONFIG.source,
        with_finetune=_PLAN_FINETUNE.value,
      )


def _main(argv: list[str]) -> None:
  if len(argv) > 1 and _MODE.value != "predict":
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
  missing = [f"--{name}" for name in _NEEDED[_MODE.value] if not flags.FLAGS[name].value]
  if missing == ["--inputs"] and argv[1:]:
    missing = []
  if missing:
    sys.exit(f"Error: --mode={_MODE.value} needs {' and '.join(missing)}.")
  try:
    if _DISTRIBUTED.value:
      distributed.initialize()
    # The devices must not be looked at before it is known which ones are to be planned for.
    prefix = distributed.log_prefix() if _DISTRIBUTED.value else ""
    logging.basicConfig(
      level=logging.WARNING,
      # Commands are printed into a file or a pipe, which is no place for the log.
      stream=sys.stderr if _MODE.value == "report" and flags.FLAGS.print_commands else sys.stdout,
      format=f"%(asctime)s{prefix} %(message)s",
      datefmt="%H:%M:%S",
      force=True,
    )
    if not _DEBUG.value:
      failures.quiet_libraries()
    first = not _DISTRIBUTED.value or jax.process_index() == 0
    logging.getLogger("frozen_vision").setLevel(logging.INFO if first else logging.WARNING)
    _run(argv)
  except Exception as error:
    text = failures.report(error, debug=_DEBUG.value)
    if _DISTRIBUTED.value:
      distributed.leave(text, is_expected=failures.sentence(error) is not None)
    sys.exit(text)


if __name__ == "__main__":
  output.protect()
  if len(sys.argv) == 1:
    print(usage())
  else:
    command_line.run(_main)
