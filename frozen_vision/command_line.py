"""Flags of programs with a config: `--config=FILE[:ARGUMENTS]` and `--config.OPTION=VALUE`."""

from collections.abc import Callable, Mapping, Sequence
import os
import re
import sys
from typing import Any

from absl import app, flags

from frozen_vision import config_files
from frozen_vision.config import Config
from frozen_vision.options import Text

_OPTION = re.compile(r"--?(no)?config\.([^=]+)(?:=(.*))?", re.DOTALL)


class ConfigFlag:
  """The config that a command line names, with the options that it sets.

  Attributes:
    source: what `--config` is; None where it is not given.
    changes: the options' texts by dotted path; the last one where an option is given twice.
  """

  def __init__(self):
    self.source: str | None = None
    self.changes: Mapping[str, Text] = {}

  @property
  def value(self) -> Config:
    """The config, read anew; raises as `config_files.load_config` does."""
    if self.source is None:
      raise ValueError("--config=FILE is needed, such as --config=configs/coco_htc.py:recipe=files.")
    return config_files.load_config(self.source, self.changes)


_CONFIG = ConfigFlag()


def define_config(help_text: str = "Config file and its arguments.") -> ConfigFlag:
  """Defines the flag `config`. `parse_flags` fills what is returned."""
  flags.DEFINE_string("config", None, f"{help_text} --config.OPTION=VALUE sets an option of it.")
  return _CONFIG


def parse_flags(argv: Sequence[str]) -> list[str]:
  """Parses like absl, with one sentence and without a traceback about a flag that does not fit."""
  try:
    argv = flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False)
    rest, changes = split(argv)
    left = flags.FLAGS(rest)
  except (flags.Error, OSError) as error:
    sys.exit(f"Error: {error}")
  _CONFIG.source, _CONFIG.changes = flags.FLAGS["config"].value, changes
  return left


def split(argv: Sequence[str]) -> tuple[list[str], dict[str, Text]]:
  """(the arguments that are no options of the config, those options' texts by dotted path).

  `--config.a=1`, `--config.a 1`, and for switches `--config.a` and `--noconfig.a`.
  """
  rest: list[str] = []
  changes: dict[str, Text] = {}
  arguments = list(argv)
  while arguments:
    argument = arguments.pop(0)
    if argument == "--":
      return [*rest, argument, *arguments], changes
    match = _OPTION.fullmatch(argument)
    if not match:
      rest.append(argument)
      continue
    negated, option, text = match.groups()
    if negated:
      text = "False"
    elif text is None:
      text = arguments.pop(0) if arguments and not arguments[0].startswith("--") else "True"
    changes.pop(option, None)  # the last one counts, also for the order
    changes[option] = Text(text)
  return rest, changes


def path(text: str | None) -> str | None:
  """A path of the command line with `~` as the home folder, also in NAME=PATH."""
  if text is None or text.startswith("~"):
    return None if text is None else os.path.expanduser(text)
  name, equals, found = text.partition("=")
  return name + equals + os.path.expanduser(found)


def run(main: Callable[[list[str]], Any]) -> None:
  """`app.run` with these flags; `main` gets the arguments that are no flags."""
  app.run(main, flags_parser=parse_flags)
