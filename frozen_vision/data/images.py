"""Decoding of image files to 8-bit RGB, with one clear error for every file that cannot be used.

What is done with the less usual kinds, so that nothing is read silently wrong:

* EXIF orientation is applied, in every format; an unreadable EXIF block is ignored and noted.
* Gray, 1-bit, palette, LAB and YCbCr become RGB. CMYK is converted without a colour profile, and
  a CMYK JPEG is taken as inverted, which is Adobe's convention. Colour profiles are ignored, as in
  the reference pipelines (OpenCV, Pillow) that published weights were trained with.
* Transparency (an alpha channel, a transparent palette entry or a PNG colour key) is blended
  over `background`, white unless told otherwise: the colour below alpha 0 is arbitrary.
* 16-bit gray is scaled by the range of its format, 0..65535 (0..4095 for 12-bit TIFF), to 0..255
  and rounded. It is not stretched to the values found, since brightness would then depend on the
  picture; an image that uses a sliver of its range comes out dark and is noted. 16-bit colour is
  reduced by Pillow, which keeps the upper byte: at most one level below rounding.
* Floating point pixels must lie in [0, 1]; other values have no defined white and are an error,
  as are 32-bit and signed integers.
* The first frame of an animation or a multi-picture file is read.
* Truncated files are refused, even where Pillow would fill what is missing on a second attempt.

An image is converted in strips, so that decoding takes the memory of the decoded file and of the result and
not of every step between; together they have a limit in bytes.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import io
import os
import pathlib
import stat

from jaxtyping import UInt8
import numpy as np
from PIL import ExifTags, Image

# Pillow's own limit for an error. Kept here because Pillow's is a global that other code may lift.
MAX_PIXELS = 178_956_970
# Limit of one image: its pixels as Pillow holds them and the decoded result together.
MAX_BYTES = 2**30
# Pixels that are converted at a time.
_STRIP_PIXELS = 2**20
WHITE = (255, 255, 255)
# Formats with a signature and a decoder inside Pillow (MPO opens as JPEG). Others are left out on
# purpose: EPS, for one, would hand a hostile file to Ghostscript.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM")
SUFFIXES = frozenset(
  ".jpg .jpeg .jpe .jfif .mpo .png .apng .gif .bmp .tif .tiff .webp .avif .jp2 .j2k .ppm .pgm"
  " .pbm .pnm .pfm".split()
)
# Turns pixels [h, w, 3] upright, by EXIF orientation.
_TRANSPOSE: dict[int, Callable[[np.ndarray], np.ndarray]] = {
  2: lambda pixels: pixels[:, ::-1],
  3: lambda pixels: pixels[::-1, ::-1],
  4: lambda pixels: pixels[::-1],
  5: lambda pixels: pixels.swapaxes(0, 1),
  6: lambda pixels: pixels[::-1].swapaxes(0, 1),
  7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
  8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}
_TIFF_BITS_PER_SAMPLE = 258
_TIFF_PHOTOMETRIC = 262
_WHITE_IS_ZERO = 0
# Bytes of a pixel as Pillow holds it; 4 in all other modes.
_PIXEL_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2}
# A 16-bit image whose brightest pixel is below this fraction of its range is noted as dark.
_DARK = 1 / 16

ImageSource = bytes | str | os.PathLike


class FileError(ValueError):
  """A file that cannot be used.

  Attributes:
    name: the file's name, or what the caller called the bytes.
    reason: what is wrong with it.
    kind: one of a few words to count by.
  """

  def __init__(self, name: str, reason: str, kind: str):
    super().__init__(f"{name}: {reason}")
    self.name = name
    self.reason = reason
    self.kind = kind

  def __reduce__(self):  # survives the way back from a worker process
    return (type(self), (self.name, self.reason, self.kind))


class ImageError(FileError):
  """An image file that cannot be used.

  Its kind is "missing", "empty", "not an image", "damaged", "too many pixels", "unsupported pixels" or "wrong
  size".
  """


@dataclasses.dataclass(frozen=True)
class ImageInfo:
  """Properties of a decoded file.

  Attributes:
    format: Pillow's name of the file format.
    mode: Pillow's pixel mode before conversion, such as "RGB", "P", "I;16".
    height: after EXIF rotation.
    width: after EXIF rotation.
    notes: what was done to it, or may surprise, in words; empty for a plain RGB or gray file.
  """

  format: str
  mode: str
  height: int
  width: int
  notes: tuple[str, ...] = ()


def decode_image(
  source: ImageSource,
  *,
  name: str | None = None,
  background: tuple[int, int, int] = WHITE,
  max_pixels: int = MAX_PIXELS,
) -> UInt8[np.ndarray, "h w 3"]:
  """Decodes an image to RGB, rotated as its EXIF orientation says.

  Args:
    source: the encoded bytes, or the path of the file.
    name: what errors call it; the path by default.
    background: the colour that transparent pixels are blended over.
    max_pixels: a file that claims more is refused before anything is allocated.

  Raises:
    ImageError: the file is missing, damaged, truncated, too large or of an unsupported kind.
  """
  return _decode(source, name, background, max_pixels)[0]


def inspect_image(source: ImageSource, *, name: str | None = None, max_pixels: int = MAX_PIXELS) -> ImageInfo:
  """Decodes an image as `decode_image` does and says what it is; raises ImageError likewise."""
  return _decode(source, name, WHITE, max_pixels)[1]


def read_size(
  source: ImageSource,
  *,
  name: str | None = None,
  apply_exif: bool = True,
  max_pixels: int = MAX_PIXELS,
) -> tuple[int, int]:
  """(height, width), after EXIF rotation unless `apply_exif` is off.

  Reads the header alone where the format allows it.

  PNG is decoded, since its orientation may stand behind the pixels. A file that is truncated
  after its header is not noticed here.

  Raises:
    ImageError: the header cannot be read, or it claims more than `max_pixels`.
  """
  name = _name_of(source, name)
  try:
    with _open(source, name, max_pixels) as image:
      if image.format == "PNG":
        image.load()
      width, height = image.size
      turned = _orientation(image)[0] >= 5
      # Pillow's TIFF reader has swapped the sides already.
      swap = turned and (image.format == "TIFF") != apply_exif
  except ImageError:
    raise
  except Exception as error:  # see _decode
    raise _from_pillow(name, error) from error
  return (width, height) if swap else (height, width)


def unreadable(path: str | os.PathLike) -> str | None:
  """Why a path cannot be read as a file, or None where nothing speaks against it; opens nothing.

  Opening a named pipe waits for another program to write to it, for ever if there is none.
  """
  try:
    mode = os.stat(path).st_mode
  except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
    reason = getattr(error, "strerror", None) or str(error)
    if isinstance(error, FileNotFoundError):
      reason = "a link to what is not there" if os.path.islink(path) else "no such file"
    return f"cannot be read ({reason})"
  if stat.S_ISREG(mode):
    return None
  kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
  return f"is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file"


def read_bytes(path: str | os.PathLike, *, name: str | None = None) -> bytes:
  """The file's bytes; raises ImageError where it is missing, no file, unreadable or empty."""
  reason = unreadable(path)
  if reason is not None:
    raise ImageError(name or str(path), reason, "missing")
  try:
    data = pathlib.Path(path).read_bytes()
  except OSError as error:
    raise ImageError(name or str(path), f"cannot be read ({error.strerror})", "missing") from error
  if not data:
    raise ImageError(name or str(path), "the file is empty", "empty")
  return data


def _decode(
  source: ImageSource, name: str | None, background: tuple[int, int, int], max_pixels: int
) -> tuple[UInt8[np.ndarray, "h w 3"], ImageInfo]:
  name = _name_of(source, name)
  data = source if isinstance(source, bytes) else read_bytes(source, name=name)
  notes = []
  try:
    with _open(data, name, max_pixels) as image:
      require_memory(image, name, converted=3)
      mode, frames = image.mode, _frame_count(image)
      # Once, and never again after an error: a second load() of a damaged PNG "succeeds", with
      # black in place of what could not be read.
      image.load()
      orientation, exif_error = _orientation(image)
      pixels = _to_rgb(image, name, background, notes)
      if orientation in _TRANSPOSE:
        pixels = np.ascontiguousarray(_TRANSPOSE[orientation](pixels))
        notes.append(f"EXIF orientation {orientation} applied")
      if exif_error:
        notes.append("unreadable EXIF ignored")
      if frames > 1:
        notes.append("first of several frames read")
  except ImageError:
    raise
  except Exception as error:
    # Decoders meet hostile input with many exceptions: OSError, SyntaxError, struct.error,
    # KeyError, OverflowError, MemoryError and more. All mean the same: this file is unusable.
    raise _from_pillow(name, error) from error
  height, width = pixels.shape[:2]
  return pixels, ImageInfo(image.format, mode, height, width, tuple(notes))


def _name_of(source: ImageSource, name: str | None) -> str:
  if name is not None:
    return name
  return "<image bytes>" if isinstance(source, bytes) else str(os.fspath(source))


@functools.cache
def _known_formats() -> tuple[str, ...]:
  Image.init()  # registers all plugins; a format that this Pillow lacks is left out
  return tuple(name for name in _FORMATS if name in Image.OPEN)


def _open(source: ImageSource, name: str, max_pixels: int) -> Image.Image:
  if isinstance(source, bytes):
    file = io.BytesIO(source)
    if not source:
      raise ImageError(name, "the file is empty", "empty")
  else:
    reason = unreadable(source)
    if reason is not None:
      raise ImageError(name, reason, "missing")
    file = source
  try:
    image = Image.open(file, formats=_known_formats())
  except Exception as error:  # see _decode
    raise _from_pillow(name, error) from error
  width, height = image.size
  if width <= 0 or height <= 0:
    image.close()
    raise ImageError(name, f"has no pixels (width {width}, height {height})", "damaged")
  if width * height > max_pixels:
    image.close()
    raise ImageError(
      name,
      f"claims {width} x {height} pixels, more than the limit of {max_pixels}",
      "too many pixels",
    )
  return image


def require_memory(image: Image.Image, name: str, *, converted: int) -> None:
  """Refuses an image before its pixels are decoded, where they would take more than `MAX_BYTES`.

  Args:
    converted: bytes per pixel of what is made of it, besides what Pillow holds.

  Raises:
    ImageError: says how much it would take.
  """
  pixels = image.width * image.height
  needed = pixels * (_PIXEL_BYTES.get(image.mode, 4) + converted)
  if pixels > MAX_PIXELS or needed > MAX_BYTES:
    raise ImageError(
      name,
      f"claims {image.width} x {image.height} pixels of mode {image.mode}, which take {needed / 1e6:.0f} MB; "
      f"the limits are {MAX_PIXELS} pixels and {MAX_BYTES / 1e6:.0f} MB",
      "too many pixels",
    )


def strips(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
  """(rows, that part) of a decoded image from top to bottom, about a million pixels at a time."""
  step = max(1, _STRIP_PIXELS // image.width)
  if step >= image.height:
    yield slice(0, image.height), image
    return
  for top in range(0, image.height, step):
    bottom = min(top + step, image.height)
    yield slice(top, bottom), image.crop((0, top, image.width, bottom))


def _from_pillow(name: str, error: Exception) -> ImageError:
  if isinstance(error, Image.UnidentifiedImageError):  # its text shows a memory address
    formats = ", ".join(_known_formats())
    return ImageError(name, f"not a readable image; formats known: {formats}", "not an image")
  if isinstance(error, Image.DecompressionBombError):
    return ImageError(name, f"refused ({error})", "too many pixels")
  # Pillow says in words what it expected; other errors may be a bare number or key.
  in_words = isinstance(error, (OSError, SyntaxError)) and str(error)
  reason = str(error) if in_words else f"{type(error).__name__}: {error}"
  return ImageError(name, f"cannot be decoded ({reason})", "damaged")


def _orientation(image: Image.Image) -> tuple[int, bool]:
  """EXIF orientation 1..8, and whether the EXIF block was unreadable."""
  try:
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
  except Exception:  # parsers of damaged EXIF raise anything; the pixels are still good
    return 1, True
  return (value, False) if value in _TRANSPOSE else (1, False)


def _frame_count(image: Image.Image) -> int:
  try:
    return 2 if getattr(image, "is_animated", False) else 1
  except Exception:  # damage behind the first frame does not concern us
    return 2


def _to_rgb(
  image: Image.Image, name: str, background: tuple[int, int, int], notes: list[str]
) -> UInt8[np.ndarray, "h w 3"]:
  """The decoded image as RGB, not rotated yet; writes into `notes` what was done to it."""
  if image.mode.startswith("I;16") or image.mode in ("I", "F"):
    return _gray_to_rgb(image, name, background, notes)
  pixels = np.empty((image.height, image.width, 3), np.uint8)
  if not image.has_transparency_data:
    for rows, strip in strips(image):
      pixels[rows] = np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))
    return pixels
  key = image.info.get("transparency")
  if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
    # A colour key of a 16-bit PNG; its pixels have been reduced to the upper byte, so must it be.
    image.info["transparency"] = tuple(value >> 8 for value in key)
  blended = False
  for rows, strip in strips(image):
    rgba = np.asarray(strip.convert("RGBA"))
    alpha = rgba[..., 3:].astype(np.uint16)
    if np.all(alpha == 255):
      pixels[rows] = rgba[..., :3]
      continue
    blended = True
    mixed = rgba[..., :3] * alpha + np.asarray(background, np.uint16) * (255 - alpha)
    pixels[rows] = (mixed + np.uint16(127)) // 255
  if blended:
    notes.append("transparency blended")
  return pixels


def _gray_to_rgb(
  image: Image.Image, name: str, background: tuple[int, int, int], notes: list[str]
) -> UInt8[np.ndarray, "h w 3"]:
  """RGB of 16-bit or floating point gray; pixels that a PNG colour key hides become the background."""
  largest = _white(image, name, notes)
  # Pillow inverts 8-bit images only.
  inverted = getattr(image, "tag_v2", {}).get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO
  key = image.info.get("transparency")
  pixels = np.empty((image.height, image.width, 3), np.uint8)
  for rows, strip in strips(image):
    values = np.asarray(strip)
    fraction = values.astype(np.float64) / largest
    if inverted:
      fraction = 1.0 - fraction
    pixels[rows] = np.rint(np.clip(fraction, 0.0, 1.0) * 255).astype(np.uint8)[..., None]
    if isinstance(key, int):
      pixels[rows][values == key] = background
  if isinstance(key, int):
    notes.append("transparency blended")
  return pixels


def _white(image: Image.Image, name: str, notes: list[str]) -> float:
  """The value of white in a 16-bit or floating point image; raises ImageError where it has none."""
  extremes = [(values.min(), values.max()) for values in (np.asarray(strip) for _, strip in strips(image))]
  low, high = min(low for low, _ in extremes), max(high for _, high in extremes)
  if image.mode == "F":
    if not np.all(np.isfinite(extremes)) or low < 0 or high > 1:
      raise ImageError(
        name,
        f"floating point pixels from {low:g} to {high:g}; only values in"
        " [0, 1] have a defined brightness. Convert the file to 8 or 16 bits",
        "unsupported pixels",
      )
    return 1.0
  # Mode "I" is 16 bits wide in PNG and PNM only; in TIFF it is 32-bit or signed.
  if image.mode == "I" and image.format not in ("PNG", "PPM"):
    raise ImageError(
      name,
      f"signed or 32-bit integer pixels from {low} to {high}, which have no"
      " defined brightness. Convert the file to 8 or 16 bits",
      "unsupported pixels",
    )
  bits = getattr(image, "tag_v2", {}).get(_TIFF_BITS_PER_SAMPLE, (16,))[0]
  largest = 2**bits - 1
  if high / largest < _DARK:
    notes.append(f"dark: values up to {high} of {largest}")
  return float(largest)
