"""Generated images for classification: one coloured, textured shape in each, with nothing to download.

The shapes are those of the generated scenes (`data.generated.scenes`): the class is the shape, and colour,
texture, size, place and rotation say nothing about it. An image is a function of (seed, split, index, size).
"""

from typing import Any

from jaxtyping import Float32, UInt8
import numpy as np

from frozen_vision.data.generated import painting

_SPLITS = {"train": 0, "validation": 1, "test": 2}
_RADIUS = (0.25, 0.42)  # of the circle around a shape, as fractions of the side
MIN_SIDE = 32  # pixels: in less, shapes cannot be told apart


class ShapeImages:
  """Records of `num_images` images; the classes take turns.

  Args:
    num_images: of the split; image i does not depend on it.
    image_size: side of the square images in pixels.
    seed: non-negative integer. Different seeds give unrelated images.
    split: "train", "validation" or "test". No two share an image.

  Raises:
    ValueError: an unknown split, a negative count or seed, or images below 32 pixels.
  """

  classes = list(painting.CLASS_NAMES)

  def __init__(self, num_images: int, image_size: int = 64, seed: int = 0, split: str = "train"):
    if split not in _SPLITS:
      raise ValueError(f"split is {split!r}; expected one of {sorted(_SPLITS)}.")
    if num_images < 0 or not 0 <= seed < 2**32:
      raise ValueError(
        f"num_images={num_images}, seed={seed}; expected num_images >= 0 and 0 <= seed < 2**32."
      )
    if image_size < MIN_SIDE:
      raise ValueError(f"image_size is {image_size}; expected {MIN_SIDE} or more.")
    self.num_images, self.image_size, self.seed, self.split = num_images, image_size, seed, split

  def __len__(self) -> int:
    return self.num_images

  def __repr__(self) -> str:
    return (
      f"ShapeImages(num_images={self.num_images}, image_size={self.image_size}, seed={self.seed}, "
      f"split={self.split!r})"
    )

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The record {image: uint8 [side, side, 3], label: int32, name: no such file exists}."""
    index = range(self.num_images)[index]
    label = index % len(self.classes)
    return {
      "image": _paint(self.seed, self.split, index, label, self.image_size),
      "label": np.int32(label),
      "name": f"shape_{self.split}_{self.seed}_{index:06d}.png",
    }


def _paint(seed: int, split: str, index: int, label: int, side: int) -> UInt8[np.ndarray, "side side 3"]:
  # The 1 sets these random numbers apart from those of scenes.
  rng = painting.Random(seed, _SPLITS[split], index, 1)
  canvas: Float32[np.ndarray, "side side 3"] = painting.paint_background(rng, side, side)
  radius = side * rng.uniform(*_RADIUS)
  x, y = rng.uniform(radius, side - radius), rng.uniform(radius, side - radius)
  shape = painting.Shape(label, x, y, radius, rng.direction(), rng.uniform())
  painting.paint_shape(rng, shape, painting.make_patch(shape, side, side), canvas)
  return (np.clip(canvas, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)
