"""Pixels of one input of prediction: of a file by name, or an array as it is."""

import os
import pathlib
from typing import Literal

import numpy as np

from frozen_vision.data import images
from frozen_vision.data.video import decoding

Source = np.ndarray | str | os.PathLike
Media = Literal["image", "video"]


def decode_image(source: Source) -> np.ndarray:
  """RGB of an image file, or the array as it is.

  Raises:
    ImageError: a file that cannot be used.
    ValueError: an array that is no image.
  """
  return check_pixels(source, "image") if isinstance(source, np.ndarray) else images.decode_image(source)


def check_pixels(array: np.ndarray, media: Media) -> np.ndarray:
  """The array, if it is an image [h, w, 3] or a video [t, h, w, 3] of uint8; raises ValueError."""
  axes = {"image": 3, "video": 4}[media]
  if array.dtype != np.uint8 or array.ndim != axes or array.shape[-1] != 3 or 0 in array.shape:
    raise ValueError(
      f"The {media} is {array.dtype} {array.shape}; expected RGB, uint8 "
      f"{'[height, width, 3]' if media == 'image' else '[frames, height, width, 3]'}."
    )
  return array


def media_of(source: Source) -> Media:
  """Whether an input is an "image" or a "video": by its axes, or by the ending of its name."""
  if isinstance(source, np.ndarray):
    return "video" if source.ndim == 4 else "image"
  return "video" if pathlib.Path(source).suffix.lower() in decoding.SUFFIXES else "image"
