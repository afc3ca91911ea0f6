"""Random image augmentation for classification: per example, on uint8 RGB, from a numpy generator.

Mixing of examples (mixup, cutmix) works on whole batches on the device: see `ops/mixup.py`.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

from jaxtyping import UInt8
import numpy as np
from PIL import Image, ImageFilter

from frozen_vision.data import batches
from frozen_vision.data.classification import folders

Rgb = tuple[int, int, int]

# ImageNet's mean and standard deviation in 0..255, the ones that images are normalised with.
_MEAN = np.array([0.485, 0.456, 0.406]) * 255.0
_STD = np.array([0.229, 0.224, 0.225]) * 255.0
MEAN_COLOUR: Rgb = (124, 116, 104)

_RESAMPLING = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
_MAX_LEVEL = 10.0
_RAMP = np.arange(256, dtype=np.uint8)


def _flip_sign(value: float, rng: np.random.Generator) -> float:
  return -value if rng.random() < 0.5 else value


def _affine(
  image: Image.Image, coefficients: tuple[float, ...], fill: Rgb, rng: np.random.Generator
) -> Image.Image:
  """Output pixel (x, y) reads the input at (a x + b y + c, d x + e y + f)."""
  resample = _RESAMPLING[rng.random() < 0.5]
  return image.transform(image.size, Image.Transform.AFFINE, coefficients, resample=resample, fillcolor=fill)


def _rotate(image: Image.Image, level: float, fill: Rgb, rng: np.random.Generator) -> Image.Image:
  """Up to 30 degrees around the centre."""
  resample = _RESAMPLING[rng.random() < 0.5]
  return image.rotate(_flip_sign(30.0 * level, rng), resample, fillcolor=fill)


def _shear_x(image: Image.Image, level: float, fill: Rgb, rng: np.random.Generator) -> Image.Image:
  return _affine(image, (1, _flip_sign(0.3 * level, rng), 0, 0, 1, 0), fill, rng)


def _shear_y(image: Image.Image, level: float, fill: Rgb, rng: np.random.Generator) -> Image.Image:
  return _affine(image, (1, 0, 0, _flip_sign(0.3 * level, rng), 1, 0), fill, rng)


def _translate_x(image: Image.Image, level: float, fill: Rgb, rng: np.random.Generator) -> Image.Image:
  """Up to 45% of the width."""
  return _affine(image, (1, 0, _flip_sign(0.45 * level, rng) * image.width, 0, 1, 0), fill, rng)


def _translate_y(image: Image.Image, level: float, fill: Rgb, rng: np.random.Generator) -> Image.Image:
  return _affine(image, (1, 0, 0, 0, 1, _flip_sign(0.45 * level, rng) * image.height), fill, rng)


def _point(image: Image.Image, table: np.ndarray) -> Image.Image:
  """Maps all values through a table uint8 [256], or each channel through its row of [3, 256]."""
  # `Image.point` rounds the table's entries in a Python loop: many times slower on small images.
  if table.ndim == 1:
    return Image.frombytes("RGB", image.size, image.tobytes().translate(table.tobytes()))
  channels = [
    Image.frombytes("L", image.size, channel.tobytes().translate(row.tobytes()))
    for channel, row in zip(image.split(), table)
  ]
  return Image.merge("RGB", channels)


def _auto_contrast(image: Image.Image, level: float, fill: Rgb, rng: np.random.Generator) -> Image.Image:
  """Stretches each channel to 0..255."""
  low, high = np.array(image.getextrema(), np.float64).T[:, :, None]
  spread = high - low
  table = (_RAMP - low) * (255.0 / np.maximum(spread, 1.0))
  return _point(image, np.where(spread > 0, np.clip(table, 0, 255), _RAMP).astype(np.uint8))


def _equalize(image: Image.Image, level: float, fill: Rgb, rng: np.random.Generator) -> Image.Image:
  """Flattens each channel's histogram."""
  histogram = np.array(image.histogram()).reshape(3, 256)
  below = np.cumsum(histogram, axis=1)
  # The highest value present maps to 255: its own count is left out of the steps.
  last = 255 - np.argmax(histogram[:, ::-1] > 0, axis=1)
  step = (below[:, -1] - histogram[np.arange(3), last]) // 255
  step = step[:, None]
  table = (step // 2 + below - histogram) // np.maximum(step, 1)
  return _point(image, np.where(step > 0, np.minimum(table, 255), _RAMP).astype(np.uint8))


def _invert(image: Image.Image, level: float, fill: Rgb, rng: np.random.Generator) -> Image.Image:
  return _point(image, 255 - _RAMP)


def _posterize(image: Image.Image, level: float, fill: Rgb, rng: np.random.Generator) -> Image.Image:
  """Keeps the 4 highest bits at level 0, none at 1."""
  dropped = 4 + int(4.0 * level)
  return _point(image, _RAMP & (0xFF << dropped & 0xFF))


def _solarize(image: Image.Image, level: float, fill: Rgb, rng: np.random.Generator) -> Image.Image:
  """Inverts the values from a threshold on: 256 (none) at level 0, 0 (all) at 1."""
  threshold = 256 - int(256.0 * level)
  return _point(image, np.where(_RAMP < threshold, _RAMP, 255 - _RAMP))


def _solarize_add(image: Image.Image, level: float, fill: Rgb, rng: np.random.Generator) -> Image.Image:
  """Adds up to 110 to the values below 128."""
  return _point(image, np.where(_RAMP < 128, _RAMP + np.uint8(110.0 * level), _RAMP))


def _blend(
  image: Image.Image, degenerate: Image.Image, level: float, rng: np.random.Generator
) -> Image.Image:
  """Moves away from the image towards `degenerate` or in the opposite direction, by up to 0.9."""
  return Image.blend(degenerate, image, 1.0 + _flip_sign(0.9 * level, rng))


def _colour(image: Image.Image, level: float, fill: Rgb, rng: np.random.Generator) -> Image.Image:
  return _blend(image, image.convert("L").convert("RGB"), level, rng)


def _contrast(image: Image.Image, level: float, fill: Rgb, rng: np.random.Generator) -> Image.Image:
  histogram = np.array(image.convert("L").histogram())
  mean = int(np.dot(histogram, _RAMP) / histogram.sum() + 0.5)
  return _blend(image, Image.new("RGB", image.size, (mean, mean, mean)), level, rng)


def _brightness(image: Image.Image, level: float, fill: Rgb, rng: np.random.Generator) -> Image.Image:
  return _blend(image, Image.new("RGB", image.size), level, rng)


def _sharpness(image: Image.Image, level: float, fill: Rgb, rng: np.random.Generator) -> Image.Image:
  return _blend(image, image.filter(ImageFilter.SMOOTH), level, rng)


_OPERATIONS: tuple[Callable[[Image.Image, float, Rgb, np.random.Generator], Image.Image], ...] = (
  _auto_contrast,
  _equalize,
  _invert,
  _rotate,
  _posterize,
  _solarize,
  _solarize_add,
  _colour,
  _contrast,
  _brightness,
  _sharpness,
  _shear_x,
  _shear_y,
  _translate_x,
  _translate_y,
)


@dataclasses.dataclass(frozen=True)
class RandAugment:
  """RandAugment (Cubuk et al. 2020, arXiv:1909.13719) as timm's `rand-m9-mstd0.5-inc1` defines it.

  15 operations, each stronger at a higher magnitude ("increasing": with the original ones some
  grow weaker); drawn with replacement and applied one after the other. Differences to timm: none
  intended, except for the random generator.

  Attributes:
    num_ops: operations drawn per image.
    magnitude: mean strength, 0 to 10.
    magnitude_std: the strength of each operation is drawn from a normal distribution with this
      standard deviation and clipped to 0..10.
    probability: of applying each drawn operation.
    fill: colour of what geometric operations uncover.
  """

  num_ops: int = 2
  magnitude: float = 9.0
  magnitude_std: float = 0.5
  probability: float = 0.5
  fill: Rgb = MEAN_COLOUR

  def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Augments an image of mode RGB; its size stays."""
    for _ in range(self.num_ops):
      operation = _OPERATIONS[int(rng.random() * len(_OPERATIONS))]
      if rng.random() >= self.probability:
        continue
      magnitude = self.magnitude + self.magnitude_std * rng.standard_normal()
      level = min(max(magnitude, 0.0), _MAX_LEVEL) / _MAX_LEVEL
      image = operation(image, level, self.fill, rng)
    return image


def random_resized_crop(
  image: Image.Image,
  size: tuple[int, int],
  rng: np.random.Generator,
  *,
  scale: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
  """Resizes a random part of the image, as Inception does (Szegedy et al. 2015, section 6).

  Args:
    size: (height, width) of the result.
    scale: range of the fraction of the area that the part has.
    ratio: range of the part's width / height, uniform in its logarithm. After 10 misses the
      largest central part with an allowed ratio is taken, as torchvision does.
  """
  width, height = image.size
  log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
  for _ in range(10):
    area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
    aspect = math.exp(log_low + (log_high - log_low) * rng.random())
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      left, top = int(rng.random() * (width - w + 1)), int(rng.random() * (height - h + 1))
      break
  else:
    w, h = width, height
    if width / height < ratio[0]:
      h = min(height, round(width / ratio[0]))
    elif width / height > ratio[1]:
      w = min(width, round(height * ratio[1]))
    left, top = (width - w) // 2, (height - h) // 2
  return image.resize(size[::-1], resample, box=(left, top, left + w, top + h))


def random_crop_with_padding(
  image: UInt8[np.ndarray, "h w c"], padding: int, rng: np.random.Generator, *, fill: int = 0
) -> UInt8[np.ndarray, "h w c"]:
  """Moves the image by up to `padding` pixels per axis; `fill` comes in at the edges."""
  height, width, channels = image.shape
  top, left = (int(rng.random() * (2 * padding + 1)) for _ in range(2))
  padded = np.full((height + 2 * padding, width + 2 * padding, channels), fill, image.dtype)
  padded[padding : padding + height, padding : padding + width] = image
  return padded[top : top + height, left : left + width]


def random_horizontal_flip(
  image: UInt8[np.ndarray, "h w c"], rng: np.random.Generator
) -> UInt8[np.ndarray, "h w c"]:
  """Mirrors left and right with probability 0.5."""
  return image[:, ::-1] if rng.random() < 0.5 else image


def random_erasing(
  image: UInt8[np.ndarray, "h w 3"],
  rng: np.random.Generator,
  *,
  probability: float = 0.25,
  area: tuple[float, float] = (0.02, 1 / 3),
  aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> UInt8[np.ndarray, "h w 3"]:
  """Replaces a random rectangle by noise (Zhong et al. 2017, arXiv:1708.04896; timm's `pixel`).

  The noise is standard normal per pixel and channel in normalised units, so clipped to what uint8
  can hold.

  Args:
    probability: of erasing anything.
    area: range of the fraction of the image that the rectangle covers.
    aspect: range of its height / width, uniform in its logarithm.

  Returns:
    The image, or a changed copy.
  """
  if rng.random() >= probability:
    return image
  height, width, _ = image.shape
  log_low, log_high = math.log(aspect[0]), math.log(aspect[1])
  for _ in range(10):
    pixels = height * width * (area[0] + (area[1] - area[0]) * rng.random())
    ratio = math.exp(log_low + (log_high - log_low) * rng.random())
    h, w = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
    if h < height and w < width:
      top, left = int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1))
      noise = rng.standard_normal((h, w, 3), np.float32) * _STD + _MEAN
      image = image.copy()
      image[top : top + h, left : left + w] = np.clip(noise, 0, 255)
      break
  return image


@dataclasses.dataclass(frozen=True)
class TrainTransform:
  """Training augmentation for classification records: crop, flip, RandAugment, erasing.

  Attributes:
    size: side of the square result in pixels.
    padding: crops are moves by up to this many pixels of the source image (the usual CIFAR
      recipe) before it is resized; None takes random resized crops.
    crop_scale: range of area of random resized crops.
    rand_augment: None for none.
    erasing: probability of random erasing.
  """

  size: int
  padding: int | None = None
  crop_scale: tuple[float, float] = (0.08, 1.0)
  flip: bool = True
  rand_augment: RandAugment | None = RandAugment()
  erasing: float = 0.25

  def __call__(self, record: dict[str, Any], rng: np.random.Generator) -> batches.ClassificationBatch:
    """Makes one example of a record of `folders`."""
    pixels = folders.record_image(record)
    if self.padding is None:
      image = random_resized_crop(Image.fromarray(pixels), (self.size, self.size), rng, scale=self.crop_scale)
    else:
      image = Image.fromarray(random_crop_with_padding(pixels, self.padding, rng))
      if image.size != (self.size, self.size):
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
    if self.rand_augment is not None:
      image = self.rand_augment(image, rng)
    pixels = np.asarray(image)
    if self.flip:
      pixels = random_horizontal_flip(pixels, rng)
    pixels = random_erasing(pixels, rng, probability=self.erasing)
    return {"image": pixels, "label": np.asarray(record["label"], np.int32)}


@dataclasses.dataclass(frozen=True)
class EvalTransform:
  """Evaluation view for classification: short side resized, central square cut out.

  Attributes:
    size: side of the square result in pixels.
    crop_fraction: fraction of the short side that the square covers; 0.875 is usual for ImageNet.
  """

  size: int
  crop_fraction: float = 1.0

  def __call__(self, record: dict[str, Any]) -> batches.ClassificationBatch:
    """Makes one example of a record of `folders`."""
    pixels = folders.record_image(record)
    height, width, _ = pixels.shape
    side = min(height, width) * self.crop_fraction
    if pixels.shape[:2] != (self.size, self.size) or self.crop_fraction != 1.0:
      left, top = (width - side) / 2, (height - side) / 2
      image = Image.fromarray(pixels).resize(
        (self.size, self.size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
      )
      pixels = np.asarray(image)
    return {"image": pixels, "label": np.asarray(record["label"], np.int32)}
