"""Reads the files of label images: their pixels as numbers, strip by strip."""

from collections.abc import Iterator
import io

from jaxtyping import Int32
import numpy as np
from PIL import Image

from frozen_vision.data import images

SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
_FORMATS = ("PNG", "TIFF", "BMP", "PPM")
_GRAY_MODES = ("1", "L", "I", "I;16", "I;16B", "I;16L")


def open_label(data: bytes, name: str) -> tuple[Image.Image, int | None]:
  """The decoded image, and the bits per pixel of a gray PNG."""
  if not data:
    raise images.ImageError(name, "the file is empty", "empty")
  try:
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    images.require_memory(image, name, converted=1)
    image.load()
  except images.ImageError:
    raise
  except Image.UnidentifiedImageError as error:
    raise images.ImageError(
      name,
      "is no label image; expected a lossless PNG, TIFF or BMP (JPEG and the like change labels)",
      "not an image",
    ) from error
  except Exception as error:  # decoders meet damaged files with many exceptions, see `images`
    raise images.ImageError(
      name, f"cannot be decoded ({type(error).__name__}: {error})", "damaged"
    ) from error
  # IHDR: width, height, bit depth, colour type; it is the first chunk of every PNG.
  return image, data[24] if image.format == "PNG" and data[25] == 0 else None


def pixel_values(
  image: Image.Image, bits: int | None, name: str
) -> Iterator[tuple[slice, Int32[np.ndarray, "rows w"]]]:
  """(rows, values) of a gray image, or of a palette's indices.

  Args:
    bits: bits per pixel of a gray PNG, of `open_label`.

  Raises:
    ImageError: pixels of another kind.
  """
  if image.mode == "LA" and image.getextrema()[1] == (255, 255):
    image = image.getchannel("L")
  if image.mode != "P" and image.mode not in _GRAY_MODES:
    raise images.ImageError(
      name,
      f"has pixels of mode {image.mode}, and the classes were given by numbers; expected gray or "
      "palette. For files in colours give every class its `color`; for COCO's panoptic files give their "
      "JSON as segments",
      "unsupported pixels",
    )
  # Undoes how Pillow stretches 2 and 4 bits to 0..255: 0..3 times 85, 0..15 times 17.
  factor = {2: 85, 4: 17}.get(bits, 1)
  for rows, strip in images.strips(image):
    yield rows, np.asarray(strip).astype(np.int32) // factor


def colour_codes(image: Image.Image, name: str) -> Iterator[tuple[slice, Int32[np.ndarray, "rows w"]]]:
  """(rows, colours as numbers r + 256 g + 65536 b, COCO's panoptic ids); ImageError without colours."""
  opaque = image.mode == "RGBA" and image.getextrema()[3] == (255, 255)
  if image.mode not in ("RGB", "P") and not opaque:
    raise images.ImageError(
      name,
      f"has pixels of mode {image.mode}, but the classes are given by their colours: expected RGB or palette",
      "unsupported pixels",
    )
  for rows, strip in images.strips(image):
    pixels = np.asarray(strip.convert("RGB")).astype(np.int32)
    yield rows, pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]
