"""Augmented views of one image, for contrastive pretraining and self-distillation.

The recipe is BYOL's (arXiv 2006.07733), which MoCo v3 and DINO share.

Colours change as torchvision's ColorJitter changes them, in a random order.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from frozen_vision.data import batches
from frozen_vision.data.classification import augment, folders


@dataclasses.dataclass(frozen=True)
class View:
  """Crop, colours, gray, blur, solarisation and mirroring, each by its probability.

  Attributes:
    size: side of the square result in pixels.
    crop_scale: range of the area of a crop, as a fraction.
    jitter: strengths of brightness, contrast, saturation and hue.
    jitter_probability, gray, blur, solarise: probabilities.
    blur_sigma: range of the blur's standard deviation in pixels of the result.
  """

  size: int
  crop_scale: tuple[float, float] = (0.08, 1.0)
  jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
  jitter_probability: float = 0.8
  gray: float = 0.2
  blur: float = 1.0
  blur_sigma: tuple[float, float] = (0.1, 2.0)
  solarise: float = 0.0

  def __call__(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """One view, uint8 [size, size, 3]."""
    x = augment.random_resized_crop(image, (self.size, self.size), rng, scale=self.crop_scale)
    if rng.random() < self.jitter_probability:
      x = self._jittered(x, rng)
    if rng.random() < self.gray:
      x = ImageOps.grayscale(x).convert("RGB")
    if rng.random() < self.blur:
      x = x.filter(ImageFilter.GaussianBlur(rng.uniform(*self.blur_sigma)))
    if rng.random() < self.solarise:
      x = ImageOps.solarize(x)
    return augment.random_horizontal_flip(np.asarray(x), rng)

  def _jittered(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    *strengths, hue = self.jitter
    factors = [rng.uniform(max(0.0, 1 - strength), 1 + strength) for strength in strengths]
    shift = rng.uniform(-hue, hue)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for number in rng.permutation(4).tolist():
      if number < 3:
        image = enhancers[number](image).enhance(factors[number])
      else:
        image = adjust_hue(image, shift)
    return image


def adjust_hue(image: Image.Image, shift: float) -> Image.Image:
  """Moves hues by a fraction of the circle, -0.5 to 0.5, in steps of 1/256."""
  hue, saturation, value = image.convert("HSV").split()
  steps = np.uint8(int(shift * 255) % 256)
  hue = Image.fromarray(np.asarray(hue) + steps)
  return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


@dataclasses.dataclass(frozen=True)
class TwoViews:
  """Training examples of two views, each drawn by a `View` of its own."""

  first: View
  second: View

  def __call__(self, record: Mapping[str, Any], rng: np.random.Generator) -> batches.TwoViewBatch:
    """Makes one example of a record of `folders`."""
    image = Image.fromarray(folders.record_image(record))
    return {
      "image": self.first(image, rng),
      "second_image": self.second(image, rng),
      "label": np.int32(record["label"]),
    }


@dataclasses.dataclass(frozen=True)
class MultiCrop:
  """Training examples of two global views and several smaller local ones (DINO, arXiv 2104.14294).

  Attributes:
    local: draws the local views.
    local_count: how many there are; 0 for none.
  """

  global_views: TwoViews
  local: View
  local_count: int

  def __call__(self, record: Mapping[str, Any], rng: np.random.Generator) -> batches.MultiCropBatch:
    """Makes one example of a record of `folders`."""
    example = self.global_views(record, rng)
    if not self.local_count:
      return example
    image = Image.fromarray(folders.record_image(record))
    return example | {"local_images": np.stack([self.local(image, rng) for _ in range(self.local_count)])}
