"""Config files: where they are, how they are read, and how their arguments and options are set."""

import ast
from collections.abc import Mapping
import importlib.util
import inspect
import os
import pathlib
import re
from typing import Any

from frozen_vision import config as config_lib
from frozen_vision import options
from frozen_vision.tasks import build as tasks_build
from frozen_vision.tasks import old_options

_PACKAGE = pathlib.Path(__file__).resolve().parent


def load_config(source: str | os.PathLike, changes: Mapping[str, Any] | None = None) -> config_lib.Config:
  """The config of a file, as the command line reads it.

  Args:
    source: a Python file with `get_config`, perhaps with arguments for it, such as
      `configs/coco_htc.py:recipe=photos`; or the name of one of `shipped()`: `coco_htc:recipe=photos`.
    changes: options to set, by dotted path; `{"optimizer.learning_rate": 5e-4}` is what
      `--config.optimizer.learning_rate=5e-4` is. A dict changes the options of a section that it names.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a file without `get_config`, arguments that it does not know, or an option that does not exist
      or does not fit.
  """
  path, arguments = find(source)
  spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise ValueError(f"Config {path}: expected a function get_config in it.")
  takes_arguments = bool(inspect.signature(module.get_config).parameters)
  if arguments and not takes_arguments:
    raise ValueError(f"Config {path} takes no arguments; found {arguments!r} after the colon.")
  try:
    values = module.get_config(*([arguments] if takes_arguments and arguments is not None else []))
  except AttributeError as error:
    sentence = old_options.now_called(
      str(getattr(error, "name", "") or str(error).strip("'\"").split(" ")[0])
    )
    if sentence is None:
      raise
    raise options.OptionError(f"Config {path}: {sentence}") from error
  values = old_options.translate(values if not isinstance(values, config_lib.Config) else values.to_dict())
  if changes:
    task = changes.get("task", values.get("task", ""))
    cls = tasks_build.config_type(task.text if isinstance(task, options.Text) else task)
    values = options.apply(cls, values, old_options.translate_changes(changes))
  return tasks_build.read_current(values)


def find(source: str | os.PathLike) -> tuple[pathlib.Path, str | None]:
  """(the file, the arguments after the colon) of what `--config` names.

  Raises:
    FileNotFoundError: no such file; the message lists the configs that are shipped.
    ValueError: not a Python file.
  """
  text = os.path.expanduser(os.fspath(source))
  match = re.fullmatch(r"(.+?\.py)(?::(.*))?|([^:/\\]+)(?::(.*))?", text, re.DOTALL)
  name, arguments = (match[1] or match[3], match[2] if match[1] else match[4]) if match else (text, None)
  path = pathlib.Path(name)
  if not path.is_file() and path.parent in (pathlib.Path(), pathlib.Path("configs")):
    path = shipped().get(path.stem, path)
  if not path.is_file():
    raise FileNotFoundError(f"Config {path.absolute()}: no such file. Shipped: {', '.join(shipped())}.")
  if path.suffix != ".py":
    raise ValueError(f"Config {path}: expected a Python file, .py.")
  return path, arguments


def shipped() -> dict[str, pathlib.Path]:
  """The configs that come with the package, by name: of an installation or of the source tree."""
  for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs"):
    found = {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"}
    if found:
      return found
  return {}


def describe() -> dict[str, str]:
  """{name: first line of the docstring} of the configs that are shipped."""
  found = {}
  for name, path in shipped().items():
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    found[name] = text.splitlines()[0] if text else ""
  return found
