"""The report of a run's data, printed before it begins and written to `data.json`."""

from collections.abc import Mapping
import logging
import os
import pathlib
from typing import Any

from frozen_vision.data import findings, fingerprint
from frozen_vision.files import atomic

_logger = logging.getLogger(__name__)

FILE = "data.json"


def check(sources: Mapping[str, Any], *, allow_drops: bool = False) -> dict[str, Any]:
  """Prints what the checks of the sources found.

  Args:
    sources: {"training": ..., "validation": ...}; generated ones have no `findings` and nothing to say.
    allow_drops: go on where more than a tenth of anything was dropped.

  Returns:
    What `data.json` holds: of every source what it is, its number of examples, its fingerprint and findings.

  Raises:
    DroppedError: more than a tenth of something was dropped; says what, with examples and what to do.
  """
  report, refused = {}, []
  for name, source in sources.items():
    found = getattr(source, "findings", None)
    report[name] = {
      "source": repr(source),
      "examples": len(source),
      "fingerprint": fingerprint.of_source(source),
    }
    if found is None:
      continue
    report[name] |= found.as_dict()
    for line in found.lines():
      _logger.info("%s data: %s.", name.capitalize(), line)
    refused += [f"Of the {name} data {sentence}" for sentence in found.too_many_dropped()]
  if refused and not allow_drops:
    raise findings.DroppedError(
      "\n".join(refused)
      + "\nCorrect the data, or go on without what is left out: --config.data.allow_drops=True"
    )
  return report


def write(report: Mapping[str, Any], workdir: str | os.PathLike[str]) -> None:
  """Writes `data.json` into a workdir; complete or not there."""
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  atomic.write_json(folder / FILE, report, indent=1)
