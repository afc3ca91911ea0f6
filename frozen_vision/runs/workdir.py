"""What a run is: its config, the features it was trained on, and the workdir that belongs to it."""

from collections.abc import Mapping, Sequence
import fnmatch
import importlib.metadata
import json
import os
import pathlib
from typing import Any

import numpy as np

from frozen_vision.files import atomic


def make_meta(
  *, config: Mapping[str, Any], feature_key: Mapping[str, Any] | str | None, examples: int, **more
) -> dict[str, Any]:
  """The `meta` of a checkpoint.

  Args:
    config: the resolved config.
    feature_key: identifies the frozen features (weights, windows, levels, dtype, ...); None if
      nothing is frozen.
    examples: examples consumed so far over all processes: the position in the data.
    **more: anything else that JSON can hold.
  """
  return dict(
    config=config, feature_key=feature_key, examples=int(examples), library_version=library_version(), **more
  )


def library_version() -> str:
  """Version of the installed package; `unknown` when it runs from a source tree."""
  try:
    return importlib.metadata.version("frozen_vision")
  except importlib.metadata.PackageNotFoundError:
    return "unknown"


def check_feature_key(found: Mapping[str, Any] | str | None, wanted: Mapping[str, Any] | str | None) -> None:
  """Refuses a head that was trained on other features than it would now receive.

  Args:
    found: the key in the checkpoint.
    wanted: the key of the backbone at hand.

  Raises:
    ValueError: they differ; shows both keys and the fields that differ.
  """
  found, wanted = to_json(found, "feature key"), to_json(wanted, "feature key")
  differing = _changes(found, wanted)
  if differing:
    raise ValueError(
      "The checkpoint was trained on other frozen features than this backbone gives. Load the "
      "backbone it was trained with, or train the head anew."
      f"\n  checkpoint: {json.dumps(found)}\n  backbone:   {json.dumps(wanted)}\n  differing:"
      + "".join(
        f"\n    {k}: {_shown(a)} in the checkpoint, {_shown(b)} in the backbone"
        for k, (a, b) in differing.items()
      )
    )


def claim_workdir(
  workdir: str | os.PathLike,
  config: Mapping[str, Any],
  *,
  ignore: Sequence[str] = (),
  is_writer: bool = True,
) -> None:
  """Makes `workdir` belong to `config`: writes `config.json`, or compares with the one there.

  Args:
    workdir: created if absent.
    config: the resolved config as nested dicts of what JSON can hold.
    ignore: keys that may change between runs in one workdir, as dotted paths or patterns:
      `log_every`, `data.num_workers`, `*.num_workers`; a path covers what is below it. After such
      a change `config.json` holds the new values.
    is_writer: False on all processes but one; they only compare.

  Raises:
    ValueError: `config.json` differs in a key that is not ignored (all such keys are listed, with
      both values), or is not valid JSON.
  """
  path = pathlib.Path(workdir) / "config.json"
  wanted = to_json(config, "config")
  if path.exists():
    try:
      found = json.loads(path.read_text())
    except ValueError as e:
      raise ValueError(f"{path} is not valid JSON ({e}). Use another workdir.") from e
    changes = _changes(found, wanted)

    def covered(k):
      return any(fnmatch.fnmatchcase(k, p) or k.startswith(p + ".") for p in ignore)

    differing = {k: v for k, v in changes.items() if not covered(k)}
    if differing:
      raise ValueError(
        f"Workdir {workdir} belongs to another config. Use another --workdir, set these keys "
        "back to continue that run, or delete the workdir to start over:"
        + "".join(f"\n  {k}: {_shown(a)} there, {_shown(b)} now" for k, (a, b) in differing.items())
      )
    if not changes:
      return
  if is_writer:
    atomic.write_json(path, wanted, indent=2, allow_nan=True)


_ABSENT = object()


def _changes(found: Any, wanted: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
  """Leaves of two JSON values that differ, by dotted path: (found, wanted)."""
  if isinstance(found, dict) and isinstance(wanted, dict):
    changes = {}
    for key in {**found, **wanted}:
      a, b = found.get(key, _ABSENT), wanted.get(key, _ABSENT)
      changes |= _changes(a, b, f"{prefix}.{key}" if prefix else key)
    return changes
  # Compared as text: NaN equals itself, and True is not 1. But 1 is 1.0, as JSON has one number.
  same = _shown(found) == _shown(wanted) or (
    type(found) in (int, float) and type(wanted) in (int, float) and found == wanted
  )
  return {} if same else {prefix or "value": (found, wanted)}


def _shown(value: Any) -> str:
  return "absent" if value is _ABSENT else json.dumps(value)


def to_json(value: Any, name: str) -> Any:
  """`value` as JSON gives it back: tuples become lists, NumPy numbers Python ones."""
  if isinstance(value, Mapping):
    return {str(k): to_json(v, f"{name}.{k}") for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [to_json(v, f"{name}[{i}]") for i, v in enumerate(value)]
  if isinstance(value, np.generic):
    value = value.item()
  if value is None or isinstance(value, (str, bool, int, float)):
    return value
  raise TypeError(f"{name} is a {type(value).__name__}, which JSON cannot hold.")
