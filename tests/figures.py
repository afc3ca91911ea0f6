"""Figures of runs in tests: drawing every panel takes longer than training a tiny model."""

from collections.abc import Callable

from frozen_vision.runs import curves


def draw_first_panels_alone() -> Callable[..., None]:
  """Lets figures of runs have their first panel alone; returns what draws whole figures.

  `tests/runs/test_curves.py` draws all panels.
  """
  draw = curves._plot

  def draw_first(panels, title, path):
    first = next(iter(panels))
    draw({first: panels[first]}, title, path)

  curves._plot = draw_first
  return draw
