"""How generated scenes are painted: random numbers, shapes, textures, backgrounds.

Shapes are signed distances in pixels on the patch that they cover: pixels at negative distance are
the mask, and the same distance gives the anti-aliased edge. Arrays go through arithmetic that
IEEE 754 defines exactly (no sin, exp or BLAS), so that scenes agree between platforms.
"""

import colorsys
import dataclasses
import functools
import math

from jaxtyping import Float, Float32
import numpy as np

CLASS_NAMES = ("disc", "rectangle", "triangle", "star", "ring", "cross")


class Random:
  """Uniform numbers of one scene.

  Only `Generator.random` is drawn from: PCG64 and SeedSequence have guaranteed streams (NEP 19),
  while numpy's other distributions may change between versions.
  """

  def __init__(self, *entropy: int):
    self._generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))

  def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * float(self._generator.random())

  def integer(self, low: int, high: int) -> int:
    """An integer in [low, high)."""
    return low + int(self._generator.random() * (high - low))

  def array(self, *shape: int) -> Float32[np.ndarray, "..."]:
    return self._generator.random(shape).astype(np.float32)

  def direction(self) -> tuple[float, float]:
    angle = self.uniform(0.0, 2 * math.pi)
    return math.cos(angle), math.sin(angle)


@dataclasses.dataclass(frozen=True)
class Shape:
  """A placed shape: its circumscribed circle in pixels, its rotation and its proportions."""

  label: int
  x: float
  y: float
  radius: float
  direction: tuple[float, float]  # cosine and sine of the rotation
  proportion: float  # in [0, 1]: aspect of the rectangle, thickness of ring and cross, ...


@dataclasses.dataclass(frozen=True)
class Patch:
  """The pixels around an object, inside the image, with what is known about them."""

  rows: slice
  columns: slice
  u: Float[np.ndarray, "h w"]  # the object's own axes, in pixels from its centre
  v: Float[np.ndarray, "h w"]
  distance: Float[np.ndarray, "h w"]  # signed distance to its edge in pixels, negative inside
  full_area: int  # pixels of the object, those outside of the image included


def make_patch(shape: Shape, height: int, width: int) -> Patch:
  """Evaluates a shape on the pixels that it covers in an image of height x width."""
  reach = shape.radius + 2  # two pixels of edge
  x1, x2 = math.floor(shape.x - reach), math.ceil(shape.x + reach)
  y1, y2 = math.floor(shape.y - reach), math.ceil(shape.y + reach)
  x = np.arange(x1, x2, dtype=np.float32)[None, :] + np.float32(0.5 - shape.x)
  y = np.arange(y1, y2, dtype=np.float32)[:, None] + np.float32(0.5 - shape.y)
  c, s = (np.float32(t) for t in shape.direction)
  u, v = c * x + s * y, c * y - s * x
  distance = _signed_distance(CLASS_NAMES[shape.label], u, v, shape.radius, shape.proportion)
  inside = (
    slice(max(0, -y1), y2 - y1 - max(0, y2 - height)),
    slice(max(0, -x1), x2 - x1 - max(0, x2 - width)),
  )
  return Patch(
    rows=slice(max(0, y1), min(height, y2)),
    columns=slice(max(0, x1), min(width, x2)),
    u=u[inside],
    v=v[inside],
    distance=distance[inside],
    full_area=int(np.count_nonzero(distance < 0)),
  )


def _signed_distance(
  name: str,
  u: Float[np.ndarray, "h w"],
  v: Float[np.ndarray, "h w"],
  radius: float,
  proportion: float,
) -> Float[np.ndarray, "h w"]:
  """Distance in pixels to the edge of a shape with this circumscribed radius, negative inside.

  Exact along edges; near corners it is a bound with the right sign, which is all that a mask needs.
  """
  match name:
    case "disc":
      return np.sqrt(u * u + v * v) - radius
    case "rectangle":
      aspect = 1 + 0.8 * proportion
      half = radius / math.sqrt(1 + aspect * aspect)
      return np.maximum(np.abs(u) - aspect * half, np.abs(v) - half)
    case "triangle":
      apothem = radius * (0.42 + 0.12 * proportion)  # 0.5: equilateral
      base = math.sqrt(radius**2 - apothem**2)
      norm = math.hypot(radius + apothem, base)
      side = (np.abs(u) * ((radius + apothem) / norm)) + (v - radius) * (base / norm)
      return np.maximum(side, -v - apothem)
    case "star":
      # Mirrors fold the plane into half of one point, 0 to 36 degrees from +v: one edge is left.
      nu, nv = math.cos(math.pi / 5), -math.sin(math.pi / 5)
      for _ in range(2):
        u = np.abs(u)
        beyond = 2 * np.maximum(u * nu + v * nv, 0)
        u, v = u - beyond * nu, v - beyond * nv
      u = np.abs(u)
      inner = radius * (0.42 + 0.08 * proportion)
      iu, iv = inner * math.sin(math.pi / 5), inner * math.cos(math.pi / 5)
      norm = math.hypot(iu, radius - iv)
      return (u * ((radius - iv) / norm)) + (v - radius) * (iu / norm)
    case "ring":
      half = radius * (0.17 + 0.08 * proportion)
      return np.abs(np.sqrt(u * u + v * v) - (radius - half)) - half
    case "cross":
      ratio = 0.3 + 0.12 * proportion
      arm = radius / math.sqrt(1 + ratio * ratio)
      u, v = np.abs(u), np.abs(v)
      return np.minimum(np.maximum(u - arm, v - ratio * arm), np.maximum(v - arm, u - ratio * arm))
    case _:
      raise ValueError(f"unknown shape {name!r}; known: {CLASS_NAMES}.")


def paint_shape(
  rng: Random,
  shape: Shape,
  patch: Patch,
  canvas: Float32[np.ndarray, "h w 3"],
) -> None:
  """Blends the object into the canvas, in place, in a colour that differs from its surroundings."""
  view = canvas[patch.rows, patch.columns]
  around = view[np.abs(patch.distance) < 3].mean(0, dtype=np.float64)
  colours = [_colour(rng, (0.25, 1.0), (0.3, 1.0)) for _ in range(8)]
  colour = max(colours, key=lambda c: float(np.abs(c - around).sum()))
  # The second colour of the texture is a shade of the first, so that the object stays one thing.
  second = colour + (_colour(rng, (0.0, 1.0), (0.0, 1.0)) - colour) * np.float32(0.45)
  mixing = _texture(rng, patch, shape.radius)
  light = 1 + (0.12 / shape.radius) * (patch.u * rng.uniform(-1, 1) + patch.v * rng.uniform(-1, 1))
  rim = np.clip(patch.distance * 0.5 + 1.25, 0, 1)  # a darker line along the edge, about 2 pixels
  light = (light * (1 - 0.45 * rim)).astype(np.float32)
  paint = (colour + mixing[..., None] * (second - colour)) * light[..., None]
  alpha = np.clip(0.5 - patch.distance, 0, 1).astype(np.float32)[..., None]
  view += alpha * (paint - view)


def _texture(rng: Random, patch: Patch, radius: float) -> Float32[np.ndarray, "h w"]:
  """Mixing weights in [0, 1] of two colours: plain, stripes, checks, a gradient or noise."""
  kind = rng.integer(0, 5)
  period = rng.uniform(0.35, 0.9) * radius + 2
  match kind:
    case 0:
      return np.zeros(patch.u.shape, np.float32)
    case 1:
      return _wave(patch.u / period, sharpness=3)
    case 2:
      a, b = _wave(patch.u / period, sharpness=3), _wave(patch.v / period, sharpness=3)
      return a + b - 2 * a * b
    case 3:
      return _wave(patch.u / (4 * radius) + 0.25, sharpness=1)
    case _:
      cells = 2 + int(patch.u.shape[0] / period)
      return _noise(rng, *patch.u.shape, cells=cells, channels=1)[..., 0]


def paint_background(rng: Random, height: int, width: int) -> Float32[np.ndarray, "h w 3"]:
  """A gradient of two muted colours with noise of several frequencies and, often, stripes."""
  first = _colour(rng, (0.05, 0.5), (0.15, 0.85))
  second = first + (_colour(rng, (0.05, 0.5), (0.15, 0.85)) - first) * np.float32(0.6)
  x = (np.arange(width, dtype=np.float32) + np.float32(0.5)) / np.float32(width) - np.float32(0.5)
  y = (np.arange(height, dtype=np.float32) + np.float32(0.5)) / np.float32(height) - np.float32(0.5)
  dx, dy = (np.float32(t) for t in rng.direction())
  ramp = np.clip(dx * x[None, :] + dy * y[:, None] + np.float32(0.5), 0, 1)
  canvas = first + ramp[..., None] * (second - first)
  # Coarse clouds with a colour of their own, then finer and finer grain in brightness.
  half = np.float32(0.5)
  clouds = _noise(rng, height, width, rng.integer(2, 6), channels=3) - half
  canvas += clouds * np.float32(rng.uniform(0.1, 0.28))
  grain = np.zeros((height, width), np.float32)
  for cells in (rng.integer(8, 16), rng.integer(24, 48)):
    octave = _noise(rng, height, width, cells, channels=1)[..., 0] - half
    grain += octave * np.float32(rng.uniform(0.03, 0.15))
  grain += (rng.array(height, width) - half) * np.float32(rng.uniform(0.0, 0.06))
  if rng.uniform() < 0.5:
    dx, dy = (np.float32(t) for t in rng.direction())
    frequency = np.float32(rng.uniform(2, 12))
    stripes = _wave((dx * x[None, :] + dy * y[:, None]) * frequency, sharpness=rng.uniform(1, 4))
    grain += (stripes - half) * np.float32(rng.uniform(0.05, 0.18))
  canvas += grain[..., None]
  return np.clip(canvas, 0, 1)


def _wave(phase: Float[np.ndarray, "..."], sharpness: float) -> Float32[np.ndarray, "..."]:
  """A triangle wave of period 1 between 0 and 1, clipped towards a square wave by its sharpness."""
  triangle = np.abs(phase - np.floor(phase) - 0.5) * 4 - 1
  return (np.clip(triangle * sharpness, -1, 1) * 0.5 + 0.5).astype(np.float32)


def _noise(
  rng: Random, height: int, width: int, cells: int, channels: int
) -> Float32[np.ndarray, "h w channels"]:
  """Value noise: random numbers on a grid, `cells` along the longer side, interpolated smoothly."""
  cell = max(height, width) / cells
  rows, row_weights = _cells(height, cell)
  columns, column_weights = _cells(width, cell)
  grid = rng.array(int(rows[-1]) + 2, int(columns[-1]) + 2, channels)
  lines = grid[:, columns] + column_weights[:, None] * (grid[:, columns + 1] - grid[:, columns])
  top, weights = lines[rows], row_weights[:, None, None]
  return top + weights * (lines[rows + 1] - top)


@functools.lru_cache(maxsize=512)
def _cells(length: int, cell: float) -> tuple[np.ndarray, np.ndarray]:
  """Grid cell of every pixel and the smoothed position in it; callers must not write to either."""
  position = (np.arange(length) + 0.5) / cell
  index = position.astype(np.int64)
  t = (position - index).astype(np.float32)
  return index, t * t * (3 - 2 * t)


def _colour(
  rng: Random, saturation: tuple[float, float], value: tuple[float, float]
) -> Float32[np.ndarray, "3"]:
  hsv = rng.uniform(), rng.uniform(*saturation), rng.uniform(*value)
  return np.array(colorsys.hsv_to_rgb(*hsv), np.float32)
