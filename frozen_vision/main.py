"""Command line: python -m frozen_vision.main --config=configs/FILE.py[:variant] --workdir=DIR."""

import logging
import sys
import traceback

from absl import app
from absl import flags
from ml_collections import config_flags

from frozen_vision import train

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration, for example configs/coco_htc.py:swinv2_b.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for checkpoints, metrics and pictures; an interrupted run continues there.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate"], "What to do.")


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
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
  logging.basicConfig(
      level=logging.WARNING, stream=sys.stdout, format="%(asctime)s %(message)s", datefmt="%H:%M:%S",
      force=True)
  logging.getLogger("frozen_vision").setLevel(logging.INFO)
  try:
    match _MODE.value:
      case "train":
        train.train(_CONFIG.value, _WORKDIR.value)
      case "evaluate":
        train.evaluate(_CONFIG.value, _WORKDIR.value)
  except (OSError, ValueError, FloatingPointError) as error:
    logging.getLogger("frozen_vision").debug("", exc_info=True)
    sys.exit(f"Error: {error}")


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(_main, flags_parser=_parse_flags)
