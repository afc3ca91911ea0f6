"""The record beside a checkpoint's arrays: what was saved, under which step, with checksums of everything."""

from collections.abc import Mapping
import json
import math
from typing import Any

import numpy as np

from frozen_vision.runs import digests, state_leaves
from frozen_vision.runs import workdir as workdir_lib

_FIRST_EDITION = {"meta", "metrics", "quality", "leaves", "scalars"}
_FIELDS = _FIRST_EDITION | {"digests", "digest"}


class RecordError(ValueError):
  """A record that is damaged, or that belongs to another checkpoint."""


def make(
  step: int,
  leaves: Mapping[str, Any],
  meta: Mapping[str, Any],
  metrics: Mapping[str, float] | None,
  quality: float | None,
) -> dict[str, Any]:
  """The record of a checkpoint.

  Args:
    step: its step, which is its folder's name too.
    leaves: of the state, by path. Every process must ask, with its part of them.
    meta: what the run remembers; what JSON can hold.
    metrics, quality: of the best checkpoint, else None.

  Raises:
    TypeError: a leaf or a value of `meta` that cannot be saved, by path.
  """
  record = dict(
    meta={**workdir_lib.to_json(meta, "meta"), "step": step},
    metrics=metrics,
    quality=quality,
    leaves=state_leaves.describe(leaves),
    scalars={path: leaf for path, leaf in leaves.items() if state_leaves.is_number(leaf)},
    digests=digests.of_leaves({path: leaf for path, leaf in leaves.items() if state_leaves.has_bytes(leaf)}),
  )
  record["digest"] = digests.of_record(record)
  return record


def parse(text: str, step: int, *, best: bool) -> dict[str, Any]:
  """The record in the text of a file, if it is whole and belongs where it lies.

  Records of the first edition have no checksums; their `digests` are empty.

  Args:
    step: the name of the folder it lies in.
    best: whether that is below `best/`.

  Raises:
    RecordError: says what is wrong.
  """
  try:
    record = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise RecordError(f"its record is not JSON ({error})") from error
  if type(record) is not dict or set(record) not in (_FIELDS, _FIRST_EDITION):
    found = sorted(map(str, record))[:12] if type(record) is dict else type(record).__name__
    raise RecordError(
      f"its record holds {found}, expected {sorted(_FIELDS)}; was it written by another program?"
    )
  if "digest" in record:
    digest = record.pop("digest")
    if digest != digests.of_record(record):
      raise RecordError("its record does not add up to its checksum; it was damaged or changed")
  else:
    record["digests"] = {}
  _check_types(record)
  saved = record["meta"]["step"]
  if saved != step:
    raise RecordError(f"it was saved as step {saved}; it was renamed or copied to {step}")
  if best != (record["quality"] is not None):
    kinds = ("a best checkpoint", "one of the latest checkpoints")
    raise RecordError(f"it is {kinds[best]} and lies among {'the best' if best else 'the latest'}")
  return record


def _check_types(record: Mapping[str, Any]) -> None:
  """Raises a RecordError unless every field is of the type that the rest of the code counts on."""

  def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

  def holds(table: Any, is_value: Any) -> bool:
    return type(table) is dict and all(map(is_value, table.values()))

  wrong = [
    name
    for name, good in (
      ("meta", type(record["meta"]) is dict and type(record["meta"].get("step")) is int),
      ("metrics", record["metrics"] is None or holds(record["metrics"], is_number)),
      ("quality", record["quality"] is None or is_number(record["quality"])),
      ("leaves", holds(record["leaves"], lambda value: type(value) is str)),
      ("scalars", holds(record["scalars"], lambda value: isinstance(value, (bool, int, float)))),
      ("digests", holds(record["digests"], lambda value: type(value) is str)),
    )
    if not good
  ]
  if wrong:
    raise RecordError(f"its record's {', '.join(wrong)} are not of the type they are saved as")
  numbers = {path for path, kind in record["leaves"].items() if kind in ("bool", "int", "float")}
  if numbers != set(record["scalars"]):
    raise RecordError("its record describes other numbers than it holds")
  if record["quality"] is not None and math.isnan(record["quality"]):
    raise RecordError("its record's quality is not a number")


def damaged(record: Mapping[str, Any], arrays: Mapping[str, Any]) -> list[str]:
  """Paths of arrays that do not add up to the checksums they were saved with; every process must ask.

  Args:
    record: of `parse`.
    arrays: those that were restored, or some of them, on any mesh.
  """
  if not record["digests"]:
    return []
  found = digests.of_leaves({path: _as_array(leaf) for path, leaf in arrays.items()})
  return [path for path, digest in found.items() if record["digests"].get(path) != digest]


def _as_array(leaf: Any) -> Any:
  return np.asarray(leaf) if isinstance(leaf, np.generic) else leaf
