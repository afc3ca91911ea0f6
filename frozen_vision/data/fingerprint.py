"""Fingerprints of data, by which a checkpoint or another host tells whether they are the same.

A fingerprint is made of what a source knows of its examples without decoding one: their number, the names and
sizes of their files, labels and annotations. Pixels are not looked at. Unlike the digests of `data.content`,
whose users have to notice every touch of a file, it is the same for copies of the data on several machines.
"""

from collections.abc import Iterable, Mapping
import os
from typing import Any, Protocol, runtime_checkable

import numpy as np

from frozen_vision import messages
from frozen_vision.data import content

_DIGITS = 32
# {"examples": their number, part: digest}; of a run {"training": ..., "validation": ...}.
Fingerprint = dict[str, int | str]


@runtime_checkable
class Identified(Protocol):
  """A source that says what its examples are."""

  def identity(self) -> Mapping[str, Any]:
    """What tells its data from others, by the name it has in errors ("file names")."""


def of_source(source: Any) -> Fingerprint:
  """The fingerprint of a source; generated data without an `identity` are what their `repr` says."""
  if isinstance(source, Identified):
    parts = source.identity()
  else:
    has_text = type(source).__repr__ is not object.__repr__  # which would hold an address
    parts = {"description": repr(source) if has_text else type(source).__qualname__}
  return {"examples": len(source)} | {name: content.digest(part)[:_DIGITS] for name, part in parts.items()}


def file_sizes(paths: Iterable[str | os.PathLike[str]]) -> np.ndarray:
  """Bytes of each file, int64 [n]; -1 for one that cannot be looked at."""

  def size(path: str | os.PathLike[str]) -> int:
    try:
      return os.stat(path).st_size
    except (OSError, ValueError):
      return -1

  return np.array([size(path) for path in paths], np.int64)


def changed(
  first: Mapping[str, Fingerprint], second: Mapping[str, Fingerprint]
) -> dict[str, str | tuple[int, int]]:
  """What differs in the data of two runs or hosts, by split ("training").

  Returns:
    {split: the two numbers of examples, where they differ, else the names of the parts that differ}. Parts
    that only one of them knows are those of another version, and are not compared.
  """
  found: dict[str, str | tuple[int, int]] = {}
  for split in sorted({*first, *second}):
    one, other = first.get(split, {"examples": 0}), second.get(split, {"examples": 0})
    if one["examples"] != other["examples"]:
      found[split] = (int(one["examples"]), int(other["examples"]))
      continue
    parts = sorted(name for name in one.keys() & other.keys() if one[name] != other[name])
    if parts:  # under other names, labels and sizes are in another order, too
      found[split] = "file names" if "file names" in parts else messages.listed(parts)
  return found


def check_resumed(
  saved: Mapping[str, Fingerprint] | None, found: Mapping[str, Fingerprint], *, where: str, allow: bool
) -> str | None:
  """Compares the data of a run with those that its checkpoint was trained on.

  Args:
    saved: of the checkpoint; None for one from before fingerprints were saved.
    found: of the data now.
    where: the workdir, for the error.
    allow: go on with other data.

  Returns:
    A sentence about what has changed, where that is allowed; None if nothing has.

  Raises:
    ValueError: they differ; says in what, and which option allows it.
  """
  differing = changed(saved, {split: found[split] for split in saved if split in found}) if saved else {}
  if not differing:
    return None
  sentences = [
    f"there are {value[1]:,} {split} examples, {value[0]:,} then"
    if isinstance(value, tuple)
    else f"the {split} examples have other {value}"
    for split, value in differing.items()
  ]
  problem = f"The data have changed since the checkpoint in {where} was saved: {'; '.join(sentences)}."
  if allow:
    return problem
  raise ValueError(
    f"{problem} Give the data as they were; or go on with these, in another order of examples, with "
    "--config.data.allow_changes=True; or use another --workdir."
  )
