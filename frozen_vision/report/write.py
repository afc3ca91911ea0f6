"""Writes the three files of a report: for people, for notes, and for programs."""

import pathlib
from typing import Any

from frozen_vision.files import atomic
from frozen_vision.report import cells, markdown, page, tables

NAMES = ("report.html", "report.md", "report.json")


def write(plan: cells.Plan) -> dict[str, Any]:
  """Writes `report.html`, `report.md` and `report.json` to the workdir, from the files of the cells alone.

  Returns:
    What `report.json` holds.
  """
  report = tables.collect(plan)
  folder: pathlib.Path = plan.workdir
  atomic.write_json(folder / "report.json", report, indent=1)
  atomic.write_text(folder / "report.md", markdown.render(report))
  atomic.write_text(folder / "report.html", page.render(report, folder))
  return report
