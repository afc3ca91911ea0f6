"""The identity of a run: its config, the features it was trained on, and the workdir that belongs to it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import fnmatch
import importlib.metadata
import json
import os
import pathlib
from typing import Any

import numpy as np

from frozen_vision.files import atomic, lock


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


def check_feature_key(
  found: Mapping[str, Any] | str | None, wanted: Mapping[str, Any] | str | None, *, hint: str = ""
) -> None:
  """Refuses a head that was trained on other features than it would now receive.

  Args:
    found: the key in the checkpoint.
    wanted: the key of the backbone at hand.
    hint: a sentence to add to the error.

  Raises:
    ValueError: they differ; shows both keys and the fields that differ.
  """
  found, wanted = to_json(found, "feature key"), to_json(wanted, "feature key")
  differing = changes(found, wanted)
  if differing:
    raise ValueError(
      "The checkpoint was trained on other frozen features than this backbone gives. Load the "
      "backbone it was trained with, or train the head anew."
      f"\n  checkpoint: {json.dumps(found)}\n  backbone:   {json.dumps(wanted)}\n  differing:"
      + "".join(f"\n    {k}: {a} in the checkpoint, {b} in the backbone" for k, (a, b) in differing.items())
      + (f"\n{hint}" if hint else "")
    )


def claim_workdir(
  workdir: str | os.PathLike,
  config: Mapping[str, Any],
  *,
  ignore: Sequence[str] = (),
  is_writer: bool = True,
  upgrade: Callable[[Mapping[str, Any]], Any] | None = None,
) -> None:
  """Makes `workdir` belong to `config`: writes `config.json`, or compares with the one there.

  Args:
    workdir: created if absent.
    config: the resolved config as nested dicts of what JSON can hold.
    ignore: keys that may change between runs in one workdir, as dotted paths or patterns:
      `log_every`, `data.num_workers`, `*.num_workers`; a path covers what is below it. After such
      a change `config.json` holds the new values.
    is_writer: False on all processes but one; they only compare.
    upgrade: what the config there is in today's names, with options that are younger at their defaults.

  Raises:
    ValueError: `config.json` differs in a key that is not ignored (all such keys are listed, with
      both values), or is not valid JSON.
  """
  path = config_path(workdir)
  wanted = to_json(config, "config")
  if path.exists():
    try:
      found = json.loads(path.read_text())
    except ValueError as e:
      raise ValueError(f"{path} is not valid JSON ({e}). Use another workdir.") from e
    found = to_json(found if upgrade is None else upgrade(found), "config")
    if not check_config(found, wanted, f"Workdir {workdir} belongs to another config", ignore=ignore):
      return
  if is_writer:
    atomic.write_json(path, wanted, indent=2, allow_nan=True)


def config_path(workdir: str | os.PathLike) -> pathlib.Path:
  """The file of the config that a workdir belongs to."""
  return pathlib.Path(workdir) / "config.json"


def local_folder(workdir: str | os.PathLike) -> pathlib.Path:
  """The workdir as a path of this machine; raises a ValueError for an address such as `gs://bucket/run`."""
  if "://" in os.fspath(workdir):
    raise ValueError(
      f"The workdir {workdir} is an address, expected a folder. Mount it (gcsfuse for gs://) and give the "
      "path that it has on every host."
    )
  return pathlib.Path(workdir)


@contextlib.contextmanager
def hold(workdir: str | os.PathLike, *, is_writer: bool = True) -> Iterator[None]:
  """Holds the lock of a workdir, `.lock`, while something is written there; removes leftovers of killed runs.

  Args:
    is_writer: False on all processes but one, which do nothing.

  Raises:
    LockedError: another run holds it; says which.
  """
  if not is_writer:
    yield
    return
  folder = pathlib.Path(workdir)
  with lock.hold(folder / ".lock", f"the run in {workdir}"):
    for written in (folder, folder / "pictures", folder / "texts"):
      atomic.remove_leftovers(written)
    yield


def check_config(
  found: Mapping[str, Any], wanted: Mapping[str, Any], problem: str, *, ignore: Sequence[str] = ()
) -> bool:
  """Whether two configs differ, in keys that may.

  Args:
    found: the config of a run or checkpoint.
    wanted: the config at hand.
    problem: what is wrong if another key differs, without a full stop.
    ignore: as for `claim_workdir`.

  Raises:
    ValueError: a key differs that is not ignored; all are listed, with both values.
  """

  def covered(key: str) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) or key.startswith(pattern + ".") for pattern in ignore)

  changed = changes(found, wanted)
  differing = {key: pair for key, pair in changed.items() if not covered(key)}
  if differing:
    raise ValueError(
      f"{problem}. Use another --workdir, set these keys back to continue that run, or delete the workdir to "
      "start over:" + "".join(f"\n  {k}: {a} there, {b} now" for k, (a, b) in differing.items())
    )
  return bool(changed)


def check_resumed(
  meta: Mapping[str, Any],
  config: Mapping[str, Any],
  classes: Sequence[Any],
  batch_size: int,
  *,
  where: str,
  ignore: Sequence[str] = (),
) -> None:
  """Refuses to continue a checkpoint as another run than the one that saved it; its own record decides.

  Args:
    meta: of the checkpoint (`make_meta`), with the `classes` of its run.
    config, classes, batch_size: of the run at hand.
    where: the workdir, for errors.
    ignore: keys of the config that may differ, as for `claim_workdir`.

  Raises:
    ValueError: a record that no training run wrote, another config, other classes, or another position in the
      data than its step has; says what differs.
  """
  absent = [name for name in ("config", "feature_key", "examples", "step") if name not in meta]
  if absent:
    raise ValueError(
      f"The checkpoint in {where} does not say its {', '.join(absent)}; it was not saved by a training run. "
      "Use another --workdir."
    )
  check_config(
    meta["config"],
    to_json(config, "config"),
    f"The checkpoint in {where} was saved with another config",
    ignore=ignore,
  )
  check_classes(meta.get("classes"), classes, where=where)
  expected = meta["step"] * batch_size
  if meta["examples"] != expected:
    raise ValueError(
      f"The checkpoint in {where} is of step {meta['step']} and of {meta['examples']:,} examples, expected "
      f"{expected:,} with batches of {batch_size}; it was changed. Restore the one before it, or use another "
      "--workdir."
    )


def check_classes(found: Sequence[Any] | None, wanted: Sequence[Any], *, where: str) -> None:
  """Compares the classes that a head was trained on with those of the data, by name and in order.

  Args:
    found: of the checkpoint: names, or dicts with a `name`; None for one from before they were saved.
    wanted: of the data.
    where: the workdir, for the error.

  Raises:
    ValueError: they differ; says whether in order, in number or in names, and shows the first difference.
  """
  if found is None:
    return
  names, now = ([_class_name(one) for one in classes] for classes in (found, wanted))
  if names == now:
    return
  lost, new = [name for name in names if name not in now], [name for name in now if name not in names]
  if not lost and not new:
    what = "the same ones in another order"
  else:
    what = "; ".join(
      f"{len(group)} {kind}: {', '.join(group[:5])}{' ...' if len(group) > 5 else ''}"
      for group, kind in ((lost, "are gone"), (new, "are new"))
      if group
    )
  first = next(i for i in range(max(len(names), len(now))) if names[i : i + 1] != now[i : i + 1])
  pair = [repr(one[first]) if first < len(one) else "nothing" for one in (names, now)]
  raise ValueError(
    f"The head in {where} was trained on {len(names)} classes, the data have {len(now)}: {what}. The first "
    f"to differ is class {first}, {pair[0]} there and {pair[1]} in the data. A head keeps its classes in the "
    "order it was trained on: give data with those, or train a new head in another --workdir."
  )


def _class_name(one: Any) -> str:
  return str(one["name"]) if isinstance(one, Mapping) and "name" in one else str(one)


_ABSENT = object()


def changes(found: Any, wanted: Any) -> dict[str, tuple[str, str]]:
  """Leaves of two JSON values that differ, by dotted path: (found, wanted) as errors show them."""
  return {key: (_shown(a), _shown(b)) for key, (a, b) in _changes(found, wanted).items()}


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
