"""Charts as SVG text for a page without scripts: they take their colours from its style sheet.

Series differ in marker and dash as well as in colour, and carry their names, so that no meaning hangs on a
colour. Numbers on axes are for people: three digits.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import html
import math

_WIDTH, _HEIGHT = 340, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 40
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4", "10 4")
_SERIES = 6  # colours in the page's style sheet: .s0 to .s5


@dataclasses.dataclass(frozen=True)
class Point:
  """A point with a vertical interval; bounds are None where there is none."""

  x: float
  y: float
  low: float | None = None
  high: float | None = None


@dataclasses.dataclass(frozen=True)
class Axis:
  """One axis.

  Attributes:
    title: with the unit.
    log: logarithmic; needs positive numbers.
    reverse: grows downwards, as ranks do.
  """

  title: str
  log: bool = False
  reverse: bool = False


def number(value: float) -> str:
  """Three digits, with k, M, G, T for thousands and so on; small numbers in full or as 1e-4."""
  if value == 0:
    return "0"
  for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if abs(value) >= factor:
      return f"{value / factor:.3g}{letter}"
  return f"{value:.3g}"


def chart(
  series: Mapping[str, Sequence[Point]],
  x: Axis,
  y: Axis,
  *,
  description: str,
  lines: bool = False,
  order: Sequence[str] = (),
  marks: Mapping[str, float] | None = None,
) -> str:
  """A chart of points, or of lines, one series for each name.

  Args:
    description: what a reader who does not see it should know.
    lines: join the points of a series, without markers.
    order: names in the order of their markers and colours, the same in all charts of a page.
    marks: of line charts, an x of each series to be marked on it.

  Returns:
    An `svg` element; an empty text where there is nothing to draw.
  """
  points = [point for each in series.values() for point in each if _fits(point, x, y)]
  if not points:
    return ""
  names = list(order) or list(series)
  across = _scale([point.x for point in points], x, _LEFT, _WIDTH - _RIGHT)
  heights = [value for p in points for value in (p.y, p.low, p.high) if value is not None]
  down = _scale(heights, y, _HEIGHT - _BOTTOM, _TOP)
  parts = [*_axis_lines(x, y, points, heights, across, down)]
  names_at: list[tuple[float, float, str]] = []
  for name, each in series.items():
    place = names.index(name) if name in names else 0
    kept = [point for point in each if _fits(point, x, y)]
    if kept and lines:
      parts += _line(kept, place, across, down, (marks or {}).get(name))
    elif kept:
      parts += [part for point in kept for part in _dot(point, place, across, down)]
    names_at += [(down(point.y), across(point.x), name) for point in (kept[-1:] if lines else kept)]
  parts += _labels(names_at)
  return (
    f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(description, quote=True)}">'
    f"<title>{html.escape(description)}</title>{''.join(parts)}</svg>"
  )


def marker(place: int, x: float, y: float) -> str:
  """The marker of a series, which legends show too."""
  shapes = (
    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>',
    f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>',
    f'<path d="M{x:.1f} {y - 5.5:.1f}l5 9.5h-10z"/>',
    f'<path d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6-6z"/>',
    f'<path d="M{x:.1f} {y + 5.5:.1f}l5-9.5h-10z"/>',
    f'<path d="M{x - 5:.1f} {y - 1.7:.1f}h3.3v-3.3h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3z"/>',
  )
  return f'<g class="s{place % _SERIES} marker">{shapes[place % len(shapes)]}</g>'


def _fits(point: Point, x: Axis, y: Axis) -> bool:
  return (
    math.isfinite(point.x)
    and math.isfinite(point.y)
    and (point.x > 0 or not x.log)
    and (point.y > 0 or not y.log)
  )


def _scale(values: Sequence[float], axis: Axis, start: float, end: float) -> Callable[[float], float]:
  """The place on the page of a number on an axis, with a little room at both ends."""
  convert = math.log10 if axis.log else float
  low, high = min(map(convert, values)), max(map(convert, values))
  room = (high - low) * 0.06 or (0.15 if axis.log else abs(high) * 0.05 or 0.5)
  low, high = low - room, high + room
  if axis.reverse:
    low, high = high, low
  return lambda value: start + (convert(value) - low) / (high - low) * (end - start)


def _ticks(values: Sequence[float], axis: Axis) -> list[float]:
  low, high = min(values), max(values)
  if axis.log:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    wide = len(exponents) > 5
    ticks = [m * 10.0**e for e in exponents for m in ((1,) if wide else (1, 2, 5))]
    inside = [tick for tick in ticks if low * 0.99 <= tick <= high * 1.01]
    if len(inside) < 2:
      return [low, high] if high > 1.02 * low else [low]
    return inside[:: max(1, math.ceil(len(inside) / 5))]
  if low == high:
    return [low]
  step = 10.0 ** math.floor(math.log10((high - low) / 3))
  step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= 5)
  first = math.ceil(low / step - 1e-9)
  return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _axis_lines(x, y, points, heights, across, down):
  bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
  yield f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>'
  for tick in _ticks([point.x for point in points], x):
    place = across(tick)
    yield f'<path class="axis" d="M{place:.1f} {bottom}v4"/>'
    yield f'<text x="{place:.1f}" y="{bottom + 15}" text-anchor="middle">{number(tick)}</text>'
  for tick in _ticks(heights, y):
    place = down(tick)
    yield f'<path class="grid" d="M{_LEFT} {place:.1f}H{right}"/>'
    yield f'<text x="{_LEFT - 5}" y="{place + 4:.1f}" text-anchor="end">{number(tick)}</text>'
  middle = (_TOP + bottom) / 2
  yield (
    f'<text class="title" x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">'
    f"{html.escape(x.title)}</text>"
  )
  yield (
    f'<text class="title" transform="translate(12 {middle:.0f}) rotate(-90)" text-anchor="middle">'
    f"{html.escape(y.title)}</text>"
  )


def _dot(point, place, across, down):
  """A marker and its interval."""
  x, y = across(point.x), down(point.y)
  if point.low is not None and point.high is not None:
    low, high = down(point.low), down(point.high)
    yield f'<path class="s{place % _SERIES} interval" d="M{x:.1f} {low:.1f}V{high:.1f}"/>'
    yield f'<path class="s{place % _SERIES} interval" d="M{x - 4:.1f} {low:.1f}h8m-8 {high - low:.1f}h8"/>'
  yield marker(place, x, y)


def _line(points, place, across, down, mark):
  """A line with a dash of its own."""
  dash = _DASHES[place % len(_DASHES)]
  path = "L".join(f"{across(point.x):.1f} {down(point.y):.1f}" for point in points)
  yield (
    f'<path class="s{place % _SERIES} line" d="M{path}"'
    + (f' stroke-dasharray="{dash}"' if dash else "")
    + "/>"
  )
  if mark is not None:
    nearest = min(points, key=lambda point: abs(point.x - mark))
    yield marker(place, across(nearest.x), down(nearest.y))


def _labels(names_at: Sequence[tuple[float, float, str]]) -> list[str]:
  """Names beside their points, (y, x, name) from the top, none over another; left of points on the right."""
  labels, last = [], -math.inf
  for y, x, name in sorted(names_at):
    last = height = max(y - 7, last + 12, 10)
    is_right = x > _WIDTH * 0.6
    shift, anchor = (-8, "end") if is_right else (8, "start")
    where = f'x="{x + shift:.1f}" y="{height:.1f}" text-anchor="{anchor}"'
    labels.append(f'<text class="name" {where}>{html.escape(name)}</text>')
  return labels
