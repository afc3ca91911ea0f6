"""Generated rooms with exact surface normals and depth: walls, boxes and balls seen by a known camera.

Every pixel is one ray. The camera stands in a room with a floor, a ceiling and four walls, on whose floor are
turned boxes and balls; a lamp below the ceiling shades textured surfaces. Normals and depth are those of the
surface that the ray of the pixel's centre meets, in the coordinates of `data.dense.sources`. A scene is a
function of (seed, split, index, size).
"""

from collections.abc import Callable
import dataclasses
import math

from jaxtyping import Float, Int, UInt8
import numpy as np

from frozen_vision.data.dense import sources
from frozen_vision.data.generated import painting

_SPLITS = {"train": 0, "validation": 1}
FOCAL_LENGTH = 0.9  # in image widths: a field of view of 58 degrees from left to right
MAX_DEPTH = 10.0  # metres; no surface is farther away
MIN_IMAGE_SIDE = 32
_NEAR = 0.05  # metres
_AMBIENT = 0.3


@dataclasses.dataclass(frozen=True)
class _Thing:
  """One thing as the rays of all pixels see it.

  Attributes:
    depth: along the optical axis, infinite where the ray misses.
    surface: (rays, their depth) -> (normals in the world's coordinates, two coordinates on the surface in
      metres), for rays that meet it.
  """

  depth: Float[np.ndarray, "h w"]
  surface: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class Rooms(sources.DenseSource):
  """Records of `num_images` rooms.

  Args:
    num_images: of the split; room i does not depend on it.
    image_size: side of a square image, or (height, width), in pixels.
    seed: non-negative integer. Different seeds give unrelated rooms.
    split: "train" or "validation". The two never share a room.

  Raises:
    ValueError: an unknown split, a negative count or seed, or images below 32 pixels.
  """

  targets = sources.TARGETS

  def __init__(
    self, num_images: int, image_size: int | tuple[int, int] = 128, seed: int = 0, split: str = "train"
  ):
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if split not in _SPLITS:
      raise ValueError(f"split is {split!r}; expected one of {sorted(_SPLITS)}.")
    if num_images < 0 or not 0 <= seed < 2**32:
      raise ValueError(
        f"num_images={num_images}, seed={seed}; expected num_images >= 0 and 0 <= seed < 2**32."
      )
    if min(size) < MIN_IMAGE_SIDE:
      raise ValueError(f"image_size is {size[0]}x{size[1]}; both sides must be >= {MIN_IMAGE_SIDE}.")
    self.num_images, self.largest_size, self.seed, self.split = num_images, size, seed, split

  def __len__(self) -> int:
    return self.num_images

  def __repr__(self) -> str:
    return (
      f"Rooms(num_images={self.num_images}, image_size={self.largest_size}, seed={self.seed}, "
      f"split={self.split!r})"
    )

  def name(self, index: int) -> str:
    return f"room_{self.split}_{self.seed}_{index:06d}"

  def image(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
    return self[index]["image"]

  def truth(self, index: int) -> sources.Truth:
    record = self[index]
    return {"normals": record["normals"], "depth": record["depth"]}

  def __getitem__(self, index: int) -> dict:
    """The record of room `index`; see `DenseSource`. Raises IndexError outside of [0, num_images)."""
    if not 0 <= index < self.num_images:
      raise IndexError(f"room {index} of {self.num_images}.")
    # The 2 sets these random numbers apart from those of scenes and shapes.
    rng = painting.Random(self.seed, _SPLITS[self.split], int(index), 2)
    return {"name": self.name(index), **_render(rng, *self.largest_size)}


def _render(rng: painting.Random, height: int, width: int) -> dict[str, np.ndarray]:
  turn = _rotation(yaw=rng.uniform(-0.7, 0.7), pitch=rng.uniform(-0.45, 0.1))
  rays = _rays(height, width) @ turn.T
  origin = np.array([0.0, rng.uniform(1.1, 1.8), 0.0])
  low = np.array([rng.uniform(-3.0, -1.2), 0.0, rng.uniform(-6.0, -2.5)])
  high = np.array([rng.uniform(1.2, 3.0), rng.uniform(2.3, 3.2), 1.0])
  things = [_room(origin, rays, low, high)]
  for _ in range(rng.integer(3, 8)):
    things.append((_box if rng.uniform() < 0.6 else _ball)(rng, origin, rays, low, high))
  lamp = np.array([rng.uniform(low[0], high[0]), high[1] - 0.3, rng.uniform(low[2], 0.5)])

  depths = np.stack([thing.depth for thing in things])
  shown, depth = depths.argmin(axis=0), depths.min(axis=0)
  normal, colour = np.empty(rays.shape), np.empty(rays.shape)
  for number, thing in enumerate(things):
    texture = _texture(rng)  # drawn for hidden things too, so that what is hidden changes no other
    pixels = shown == number
    if pixels.any():
      normal[pixels], place = thing.surface(rays[pixels], depth[pixels])
      colour[pixels] = texture(place)
  image = colour * _light(origin + rays * depth[..., None], normal, lamp)
  image = image + (rng.array(height, width)[..., None] - 0.5) * 0.04
  return {
    "image": (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8),
    "normals": (normal @ turn).astype(np.float32),
    "depth": depth.astype(np.float32),
  }


def _rays(height: int, width: int) -> Float[np.ndarray, "h w 3"]:
  """Directions through the centres of the pixels in the camera's coordinates, one metre deep each."""
  focal = FOCAL_LENGTH * width
  x = (np.arange(width) + 0.5 - width / 2) / focal
  y = (np.arange(height) + 0.5 - height / 2) / focal
  return np.stack(np.broadcast_arrays(x[None, :], -y[:, None], -1.0), axis=-1)


def points(depth: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w 3"]:
  """The points that a depth map shows, in the camera's coordinates, in metres."""
  return _rays(*depth.shape) * depth[..., None]


def _rotation(yaw: float, pitch: float = 0.0) -> Float[np.ndarray, "3 3"]:
  """From the camera's coordinates to the world's: pitch about x first, then yaw about y."""
  c, s, cp, sp = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)
  return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]) @ np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])


def _slabs(
  origin: np.ndarray, rays: Float[np.ndarray, "*n 3"], low: np.ndarray, high: np.ndarray
) -> tuple[Float[np.ndarray, "*n 3"], Float[np.ndarray, "*n 3"]]:
  """Depths at which rays enter and leave the slab between two planes of every axis."""
  safe = np.where(np.abs(rays) < 1e-12, 1e-12, rays)
  first, second = (low - origin) / safe, (high - origin) / safe
  return np.minimum(first, second), np.maximum(first, second)


def _over_axes(function: np.ufunc, x: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n"]:
  """The sum, or the extreme, of three axes; a numpy reduction over so few is several times slower."""
  return function(function(x[..., 0], x[..., 1]), x[..., 2])


def _plane(
  rays: Float[np.ndarray, "n 3"], point: Float[np.ndarray, "n 3"], axis: Int[np.ndarray, "n"]
) -> tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, "n 2"]]:
  """Normals and coordinates of planes across an axis, seen against the ray."""
  each = np.arange(len(axis))
  normal = np.zeros(rays.shape)
  normal[each, axis] = -np.sign(rays[each, axis])
  return normal, point[each[:, None], np.array([[2, 1], [0, 2], [0, 1]])[axis]]


def _room(origin: np.ndarray, rays: np.ndarray, low: np.ndarray, high: np.ndarray) -> _Thing:
  """The inside of the room."""

  def surface(rays: np.ndarray, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    axis = _slabs(origin, rays, low, high)[1].argmin(axis=-1)
    return _plane(rays, origin + rays * depth[:, None], axis)

  return _Thing(_over_axes(np.minimum, _slabs(origin, rays, low, high)[1]), surface)


def _place(rng: painting.Random, low: np.ndarray, high: np.ndarray, margin: float) -> tuple[float, float]:
  """(x, z) of a thing on the floor, before the camera and off the walls."""
  return rng.uniform(low[0] + margin, high[0] - margin), rng.uniform(low[2] + margin, -1.0 - margin)


def _box(
  rng: painting.Random, origin: np.ndarray, rays: np.ndarray, low: np.ndarray, high: np.ndarray
) -> _Thing:
  """A box on the floor, turned about the vertical."""
  half = np.array([rng.uniform(0.15, 0.5), rng.uniform(0.15, 0.6), rng.uniform(0.15, 0.5)])
  x, z = _place(rng, low, high, 0.5)
  turn = _rotation(yaw=rng.uniform(0, math.pi / 2))
  inside = (origin - np.array([x, half[1], z])) @ turn
  entering, leaving = _slabs(inside, rays @ turn, -half, half)
  entering, leaving = _over_axes(np.maximum, entering), _over_axes(np.minimum, leaving)
  depth = np.where((entering < leaving) & (entering > _NEAR), entering, np.inf)

  def surface(rays: np.ndarray, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    own = rays @ turn
    axis = _slabs(inside, own, -half, half)[0].argmax(axis=-1)
    normal, place = _plane(own, inside + own * depth[:, None], axis)
    return normal @ turn.T, place

  return _Thing(depth, surface)


def _ball(
  rng: painting.Random, origin: np.ndarray, rays: np.ndarray, low: np.ndarray, high: np.ndarray
) -> _Thing:
  """A ball on the floor or in the air."""
  radius = rng.uniform(0.2, 0.55)
  x, z = _place(rng, low, high, radius)
  y = radius if rng.uniform() < 0.7 else rng.uniform(radius, high[1] - radius)
  offset = origin - np.array([x, y, z])
  a, b = _over_axes(np.add, rays * rays), _over_axes(np.add, rays * offset)
  inside = b**2 - a * ((offset**2).sum() - radius**2)
  depth = (-b - np.sqrt(np.maximum(inside, 0))) / a

  def surface(rays: np.ndarray, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    normal = (offset + rays * depth[:, None]) / radius
    return normal, normal[:, :2] * radius

  return _Thing(np.where((inside > 0) & (depth > _NEAR), depth, np.inf), surface)


def _texture(rng: painting.Random) -> Callable[[np.ndarray], np.ndarray]:
  """Colours in 0..1 of places on a surface: plain, stripes or checks of two shades."""
  first = np.array([rng.uniform(0.25, 0.95) for _ in range(3)])
  second = first * rng.uniform(0.55, 0.95)
  period, kind = rng.uniform(0.15, 0.6), rng.integer(0, 3)

  def colours(place: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 3"]:
    cells = np.floor(place / period)
    odd = (cells[:, 0] + (kind == 2) * cells[:, 1]) % 2 == 1
    return np.where((odd & (kind > 0))[:, None], second, first)

  return colours


def _light(point: np.ndarray, normal: np.ndarray, lamp: np.ndarray) -> Float[np.ndarray, "h w 1"]:
  """How bright a lamp makes surfaces that scatter its light evenly, in 0..1; things cast no shadow."""
  towards = lamp - point
  square = _over_axes(np.add, towards * towards)[..., None]
  facing = np.maximum(_over_axes(np.add, towards * normal)[..., None], 0) / np.sqrt(np.maximum(square, 1e-12))
  return _AMBIENT + (1 - _AMBIENT) * facing * np.minimum(1.0, 6.0 / (1 + square))
