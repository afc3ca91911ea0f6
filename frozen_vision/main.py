"""Command line: python -m frozen_vision.main --config=configs/FILE.py[:variant] --workdir=DIR."""

from frozen_vision.devices import huge_pages

if __name__ == "__main__":
  huge_pages.restart()  # before the imports below, which take seconds

# pylint: disable=wrong-import-position
import logging
import sys
import traceback

from absl import app, flags
import jax
from ml_collections import config_flags

from frozen_vision.devices import processes as distributed
from frozen_vision.planning import plan
from frozen_vision.prediction import files as predict_files
from frozen_vision.training import loop

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Configuration, for example configs/coco_htc.py:swinv2_b.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder for checkpoints, metrics and pictures; an interrupted run continues there."
)
_MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate", "predict", "plan"], "What to do.")
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
  "mfu", 0.4, "Of planning: the share of the peak FLOPs that the step time is computed with."
)
# What a mode cannot do without.
_NEEDED = {
  "train": ("config", "workdir"),
  "evaluate": ("config", "workdir"),
  "predict": ("inputs",),
  "plan": ("config", "workdir", "topology"),
}


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses like absl, but says in one message, without a traceback, which option does not fit."""
  try:
    return flags.FLAGS(argv)
  except AttributeError as error:  # ml_collections' way to refuse an override
    if any(frame.name == "get_config" for frame in traceback.extract_tb(error.__traceback__)):
      raise
    overrides = " ".join(arg.split("=")[0] for arg in argv if arg.startswith("--config."))
    cause = error.args[0] if error.args else error
    reason = cause.args[0] if isinstance(cause, KeyError) else cause
    sys.exit(f"Error: the config has no such option. In {overrides}: {' '.join(str(reason).split())}")
  except (flags.Error, OSError) as error:
    # Of an error in a config's get_config, ml_collections makes a text with the whole traceback.
    text = str(error).strip()
    sys.exit(f"Error: {text.splitlines()[-1] if 'Traceback (most recent call last)' in text else text}")


def _main(argv: list[str]) -> None:
  if len(argv) > 1 and _MODE.value != "predict":
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
  missing = [f"--{name}" for name in _NEEDED[_MODE.value] if not flags.FLAGS[name].value]
  if missing:
    sys.exit(f"Error: --mode={_MODE.value} needs {' and '.join(missing)}.")
  try:
    if _DISTRIBUTED.value:
      distributed.initialize()
    # The devices must not be looked at before it is known which ones are to be planned for.
    speaker = distributed.speaker() if _DISTRIBUTED.value else ""
    logging.basicConfig(
      level=logging.WARNING,
      stream=sys.stdout,
      format=f"%(asctime)s{speaker} %(message)s",
      datefmt="%H:%M:%S",
      force=True,
    )
    first = not _DISTRIBUTED.value or jax.process_index() == 0
    logging.getLogger("frozen_vision").setLevel(logging.INFO if first else logging.WARNING)
    match _MODE.value:
      case "train":
        loop.train(_CONFIG.value, _WORKDIR.value)
      case "evaluate":
        loop.evaluate(_CONFIG.value, _WORKDIR.value)
      case "predict":
        predict_files.predict(
          _INPUTS.value + argv[1:],
          workdir=_WORKDIR.value,
          heads=_HEADS.value,
          out=_OUT.value,
          backbone=_BACKBONE.value,
          image_size=[int(side) for side in _IMAGE_SIZE.value],
        )
      case "plan":
        name = config_flags.get_config_filename(flags.FLAGS["config"])
        plan.plan(_CONFIG.value, _WORKDIR.value, _TOPOLOGY.value, mfu=_MFU.value, name=name)
  except (OSError, ValueError, FloatingPointError) as error:
    logging.getLogger("frozen_vision").debug("", exc_info=True)
    (distributed.leave if _DISTRIBUTED.value else sys.exit)(f"Error: {error}")
  except Exception:
    if not _DISTRIBUTED.value:
      raise
    distributed.leave(traceback.format_exc())


if __name__ == "__main__":
  app.run(_main, flags_parser=_parse_flags)
