"""Finds the weights in what people save around them: wrappers, averages, teachers, prefixes, whole models."""

from collections.abc import Mapping, Sequence
import logging
import pathlib
from typing import Any, TypeVar

from frozen_vision import messages
from frozen_vision.files.formats import FileFormatError
from frozen_vision.files.pickle_data import Unknown
from frozen_vision.files.tensors import LazyTensor

_logger = logging.getLogger(__name__)
T = TypeVar("T")

# Keys below which a checkpoint keeps weights: of training frameworks, of averages, of self-distillation, of
# SimCLR v2's conversion.
WRAPPERS = (
  "model",
  "state_dict",
  "model_state_dict",
  "model_state",
  "module",
  "network",
  "state_dict_ema",
  "ema_state_dict",
  "model_ema",
  "ema",
  "teacher",
  "student",
  "resnet",
)
# Prefixes that DistributedDataParallel and torch.compile put before every key.
_PREFIXES = ("module.", "_orig_mod.")
_MAX_NESTING = 16
_MAX_MODULES = 100_000


def choose(
  content: Any, path: pathlib.Path, part: str | None = None, unknown: Sequence[str] = ()
) -> tuple[dict[str, LazyTensor], list[str]]:
  """The state dict in the content of a checkpoint, and the names of everything beside it.

  A state dict may lie below keys of `WRAPPERS`, may be a whole pickled module, whose parameters and buffers
  are read as data, and may have keys that all begin with `module.` or `_orig_mod.`.

  Args:
    content: what the file says.
    path: the file, for errors.
    part: the key to take where several of `WRAPPERS` are there.
    unknown: names in the file that were neither imported nor called, for errors.

  Raises:
    FileFormatError: no tensors; several state dicts and no `part`, or a `part` that is not there. The keys
      that were found are listed.
  """
  others: list[str] = []
  left = part
  for _ in range(_MAX_NESTING):
    if isinstance(content, Unknown) and _is_module(content):
      content = _module_tensors(content, path)
    if type(content) is not dict:
      break
    named = [key for key in WRAPPERS if type(content.get(key)) is dict or _is_module(content.get(key))]
    if left is not None and (type(content.get(left)) is dict or _is_module(content.get(left))):
      key, left = left, None
    elif len(named) > 1 and left is None:
      raise FileFormatError(
        path,
        f"holds several state dicts, {_listed(named)}; say which one with a colon after the file, such as "
        f"{path.name}:{named[0]}.",
      )
    elif len(named) == 1:
      (key,) = named
    else:
      break
    others += [str(other) for other in content if other != key]
    content = content[key]
  else:
    raise FileFormatError(path, f"holds dictionaries in dictionaries, more than {_MAX_NESTING} deep.")
  found = type(content) is dict and [key for key, value in content.items() if isinstance(value, LazyTensor)]
  if left is not None:
    keys = list(content) if type(content) is dict else []
    raise FileFormatError(path, f"holds no state dict {part!r}; its keys are {_listed(keys)}.")
  if not found:
    keys = list(content) if type(content) is dict else []
    what = f"its keys are {_listed(keys)}" if keys else f"it is a {type(content).__name__} without keys"
    names = f" Names in its pickle that were neither imported nor called: {list(unknown)}." if unknown else ""
    below = ", ".join(WRAPPERS)
    raise FileFormatError(
      path, f"holds no dictionary of tensors, neither at its top nor below one of {below}; {what}.{names}"
    )
  if others:
    _logger.info("%s: %d tensors; beside them %s.", path, len(found), _listed(others))
  tensors = {str(key): value for key, value in content.items() if isinstance(value, LazyTensor)}
  others += [str(key) for key, value in content.items() if not isinstance(value, LazyTensor)]
  return strip_prefixes(tensors), others


def strip_prefixes(tensors: Mapping[str, T]) -> dict[str, T]:
  """The tensors without `module.` and `_orig_mod.`, where all keys begin with it."""
  found = dict(tensors)
  while True:
    prefix = next((p for p in _PREFIXES if found and all(key.startswith(p) for key in found)), None)
    if prefix is None:
      return found
    found = {key.removeprefix(prefix): tensor for key, tensor in found.items()}


def _listed(keys: Sequence[Any]) -> str:
  return messages.listed([str(key)[:60] for key in keys], 12)


def _is_module(value: Any) -> bool:
  """Whether a pickled object is an nn.Module: it has parameters, buffers and children."""
  return isinstance(value, Unknown) and all(
    type(value.state.get(name)) is dict for name in ("_parameters", "_buffers", "_modules")
  )


def _module_tensors(module: Unknown, path: pathlib.Path) -> dict[str, Any]:
  """The state dict of a pickled module, read from its attributes."""
  tensors: dict[str, Any] = {}
  waiting = [("", module, 0)]
  seen = 0
  while waiting:
    prefix, one, depth = waiting.pop()
    seen += 1
    if seen > _MAX_MODULES or depth > 8 * _MAX_NESTING:
      raise FileFormatError(
        path, "holds a module that contains itself, or more modules than any network has."
      )
    hidden = one.state.get("_non_persistent_buffers_set")
    hidden = hidden.state.get("items", []) if isinstance(hidden, Unknown) else []
    for group in ("_parameters", "_buffers"):
      for name, value in one.state[group].items():
        if isinstance(value, LazyTensor) and not (group == "_buffers" and name in hidden):
          tensors[f"{prefix}{name}"] = value
    children = [
      (f"{prefix}{name}.", child, depth + 1)
      for name, child in one.state["_modules"].items()
      if _is_module(child)
    ]
    waiting += reversed(children)
  return tensors
