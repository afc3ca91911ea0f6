"""Label images: which class each pixel of a PNG means, with one clear error for every file that does not say.

A decoded label map is uint8 [h, w]: the class's position in the class list, or `IGNORE` where a pixel has no
class.

What the kinds of file mean, so that nothing is read silently wrong:

* Gray of 1, 2, 4, 8 or 16 bits: the pixel's value as it is stored. Pillow stretches 2 and 4 bits to 0..255;
  that is undone.
* Palette: the index, not the colour (the colours of VOC's and Cityscapes' files are for the eye), unless the
  classes were given by colours.
* RGB: the colour of a class, where the classes were given by colours; the segment ids of COCO's panoptic
  format, where their JSON was given. Otherwise refused, since a number cannot be told from a colour.
* A lossy format (JPEG, say) is refused: it invents labels along every border.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import io
import json
import os
import pathlib
from typing import Any

from jaxtyping import Int, UInt8
import numpy as np
from PIL import Image

from frozen_vision.data import images

IGNORE = 255
MAX_CLASSES = 255  # indices 0..254 of a uint8 map, besides IGNORE
Rgb = tuple[int, int, int]

SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
_FORMATS = ("PNG", "TIFF", "BMP", "PPM")
_UNKNOWN = -1
_GRAY_MODES = ("1", "L", "I", "I;16", "I;16B", "I;16L")


@dataclasses.dataclass(frozen=True)
class LabelFormat:
  """The class list, and how label files refer to it.

  Attributes:
    class_names: in the order of the classes' indices.
    values: the pixel value of each class; None: its position.
    colours: (r, g, b) of each class, for files in colours; None for files of numbers.
    ignored: pixel values without a class. A class's own value may be among them: that class then does not
      exist.
    ignored_colours: the same for files in colours.
    unknown: "error" or "ignore": what any other value is.
  """

  class_names: tuple[str, ...]
  values: tuple[int, ...] | None = None
  colours: tuple[Rgb, ...] | None = None
  ignored: tuple[int, ...] = (IGNORE,)
  ignored_colours: tuple[Rgb, ...] = ()
  unknown: str = "error"

  def __post_init__(self):
    count = len(self.class_names)
    if not 1 <= count <= MAX_CLASSES:
      raise ValueError(f"{count} classes; expected 1 to {MAX_CLASSES}, since label maps are 8 bits wide.")
    if self.unknown not in ("error", "ignore"):
      raise ValueError(f"unknown labels are {self.unknown!r}; known: error, ignore.")
    for what, listed in (
      ("class name", self.class_names),
      ("pixel value", self.values),
      ("colour", self.colours),
    ):
      if listed is None:
        continue
      if len(listed) != count:
        raise ValueError(f"{len(listed)} {what}s for {count} classes.")
      if len(set(listed)) != count:
        twice = sorted({entry for entry in listed if listed.count(entry) > 1})
        raise ValueError(f"The class list has the {what} {twice[0]!r} twice.")

  @functools.cached_property
  def _by_value(self) -> dict[int, int]:
    values = range(len(self.class_names)) if self.values is None else self.values
    return {value: index for index, value in enumerate(values)} | dict.fromkeys(self.ignored, IGNORE)

  @functools.cached_property
  def _by_colour(self) -> dict[int, int]:
    colours = {_code(colour): index for index, colour in enumerate(self.colours)}
    return colours | {_code(colour): IGNORE for colour in self.ignored_colours}

  @functools.cached_property
  def _table(self) -> Int[np.ndarray, "n"]:
    """Class of every value up to 16 bits."""
    table = np.full(2**16, _UNKNOWN, np.int16)
    for value, index in self._by_value.items():
      table[value] = index
    return table

  def decode(
    self,
    data: bytes,
    *,
    name: str,
    segments: Mapping[int, int] | None = None,
  ) -> UInt8[np.ndarray, "h w"]:
    """The label map of a file.

    Args:
      data: the file's bytes.
      name: what errors call it.
      segments: {segment id: category id} of a file in COCO's panoptic format; the category ids are `values`.

    Raises:
      ImageError: a file that is unreadable, of a kind that does not fit, or with labels of no class; the
        message says which and how many pixels have them.
    """
    image, bits = _open(data, name)
    if segments is not None:
      return self._decode_panoptic(_rgb(image, name), segments, name)
    if self.colours is not None:
      return self._decode_codes(_rgb(image, name), self._by_colour, name, _hex)
    return self._decode_values(_numbers(image, bits, name), name)

  def _decode_values(self, values: np.ndarray, name: str) -> np.ndarray:
    inside = (values >= 0) & (values < 2**16)
    found = np.where(inside, self._table[np.where(inside, values, 0)], np.int16(_UNKNOWN))
    return self._finish(found, values, name, str)

  def _decode_codes(self, codes: np.ndarray, known: Mapping[int, int], name: str, show: Any) -> np.ndarray:
    present, inverse = np.unique(codes, return_inverse=True)
    classes = np.array([known.get(code, _UNKNOWN) for code in present.tolist()], np.int16)
    return self._finish(classes[inverse.reshape(codes.shape)], codes, name, show)

  def _decode_panoptic(self, ids: np.ndarray, segments: Mapping[int, int], name: str) -> np.ndarray:
    known = {0: IGNORE}  # COCO's VOID
    for segment, category in segments.items():
      known[segment] = self._by_value.get(category, _UNKNOWN)
    return self._decode_codes(
      ids,
      known,
      name,
      lambda code: f"segment {code}" + (f" of category {segments[code]}" if code in segments else ""),
    )

  def _finish(self, found: np.ndarray, values: np.ndarray, name: str, show: Any) -> np.ndarray:
    unknown = found == _UNKNOWN
    if unknown.any():
      if self.unknown == "error":
        worst, counts = np.unique(values[unknown], return_counts=True)
        order = np.argsort(-counts, kind="stable")[:5]
        listed = ", ".join(f"{show(worst[i].item())} ({counts[i]} pixels)" for i in order)
        more = f" and {len(worst) - 5} more" if len(worst) > 5 else ""
        raise images.ImageError(
          name,
          f"has labels outside of the class list: {listed}{more}; known are "
          f"{self._describe()}. Correct the class list, name them as ignored, or set unknown labels to "
          "ignore",
          "unknown labels",
        )
      found = np.where(unknown, np.int16(IGNORE), found)
    return found.astype(np.uint8)

  def _describe(self) -> str:
    known = self._by_colour if self.colours is not None else self._by_value
    show = _hex if self.colours is not None else str
    kept = [show(value) for value, index in known.items() if index != IGNORE]
    shown = ", ".join(kept[:8]) + (", ..." if len(kept) > 8 else "")
    ignored = ", ".join(show(value) for value, index in known.items() if index == IGNORE) or "none"
    return f"{len(kept)} classes ({shown}; ignored: {ignored})"


def read_format(
  path: str | os.PathLike[str],
  *,
  ignored: Sequence[int] = (),
  unknown: str = "error",
) -> LabelFormat:
  """The class list of a file.

  Kinds: a text file with a name per line; a JSON list; JSON with `classes`, and perhaps `ignore_index`;
  COCO's JSON with `categories`. An entry is a name or `{"name": ..., "value": pixel value, "color": [r, g,
  b]}`; of `categories`, `id` is the pixel value, 0 is ignored (COCO's "unlabelled"), and the colours, which
  COCO has for the eye, are not read. 255 is always ignored. A class that `ignore_index` or `ignored` names is
  left out of the list.

  Args:
    ignored: more pixel values to ignore.
    unknown: of `LabelFormat`.

  Raises:
    FileNotFoundError, ValueError: no such file, or not such a list; says what is wrong.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist; expected a class list (.txt or .json).")
  ignored = {IGNORE, *(int(value) for value in ignored)}
  if path.suffix.lower() != ".json":
    entries = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return _from_entries(entries, ignored, unknown, path)
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is no JSON ({error}).") from error
  match content:
    case list():
      entries = content
    case {"classes": list(entries)}:
      if content.get("ignore_index") is not None:
        ignored.add(int(content["ignore_index"]))
    case {"categories": list(categories)}:
      entries = [{"name": entry["name"], "value": entry["id"]} for entry in categories]
      ignored |= {0} - {entry["value"] for entry in entries}
    case _:
      raise ValueError(
        f"{path} is no class list; expected a JSON list of names, or an object with `classes` or "
        "`categories`."
      )
  return _from_entries(entries, ignored, unknown, path)


def _from_entries(entries: Sequence[Any], ignored: set[int], unknown: str, path: pathlib.Path) -> LabelFormat:
  names, values, colours = [], [], []
  for position, entry in enumerate(entries):
    entry = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
      raise ValueError(f"{path}: entry {position} is {entry!r}; expected a name, or an object with `name`.")
    names.append(entry["name"])
    values.append(int(entry.get("value", position)))
    colours.append(None if entry.get("color") is None else tuple(int(c) for c in entry["color"]))
  coloured = [colour is not None for colour in colours]
  if any(coloured) and not all(coloured):
    raise ValueError(f"{path}: {names[coloured.index(False)]!r} has no color, though others have one.")
  kept = [i for i, value in enumerate(values) if value not in ignored]
  outside = sorted({value for value in values if not 0 <= value < 2**16})
  if outside:
    raise ValueError(f"{path}: pixel value {outside[0]}; expected 0 to {2**16 - 1}.")
  dropped = [i for i in range(len(names)) if i not in kept]
  try:
    return LabelFormat(
      class_names=tuple(names[i] for i in kept),
      values=tuple(values[i] for i in kept),
      colours=tuple(colours[i] for i in kept) if any(coloured) else None,
      ignored=tuple(sorted(ignored)),
      unknown=unknown,
      ignored_colours=tuple(colours[i] for i in dropped) if any(coloured) else (),
    )
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def read_segments(path: str | os.PathLike[str]) -> dict[str, dict[int, int]]:
  """{label file name: {segment id: category id}} of a COCO panoptic JSON.

  Raises:
    FileNotFoundError, ValueError: no such file, or not such a JSON.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist; expected a COCO panoptic JSON.")
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
    return {
      entry["file_name"]: {int(s["id"]): int(s["category_id"]) for s in entry["segments_info"]}
      for entry in content["annotations"]
    }
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{path} is no COCO panoptic JSON ({type(error).__name__}: {error}); expected annotations with "
      "file_name and segments_info."
    ) from error


def encode(labels: UInt8[np.ndarray, "h w"], palette: Sequence[Rgb] = ()) -> bytes:
  """PNG of a label map, 8 bits, as `LabelFormat` with default values reads it.

  Args:
    palette: colours of the classes, for the eye; without, the file is gray.
  """
  image = Image.fromarray(labels)
  if palette:
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    image.putpalette(colours.tobytes())
  buffer = io.BytesIO()
  image.save(buffer, format="PNG", compress_level=3)
  return buffer.getvalue()


def _open(data: bytes, name: str) -> tuple[Image.Image, int | None]:
  """The decoded image, and the bits per pixel of a gray PNG."""
  if not data:
    raise images.ImageError(name, "the file is empty", "empty")
  try:
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    if image.width * image.height > images.MAX_PIXELS:
      raise images.ImageError(
        name,
        f"claims {image.width} x {image.height} pixels, more than the limit of {images.MAX_PIXELS}",
        "too many pixels",
      )
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


def _numbers(image: Image.Image, bits: int | None, name: str) -> np.ndarray:
  """Pixel values of a gray image or indices of a palette."""
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
  values = np.asarray(image).astype(np.int32)
  # What Pillow made of 2 and 4 bits: 0..3 times 85, 0..15 times 17.
  return values // {2: 85, 4: 17}.get(bits, 1)


def _rgb(image: Image.Image, name: str) -> np.ndarray:
  """Colours as numbers, r + 256 g + 65536 b, COCO's panoptic ids."""
  opaque = image.mode == "RGBA" and image.getextrema()[3] == (255, 255)
  if image.mode not in ("RGB", "P") and not opaque:
    raise images.ImageError(
      name,
      f"has pixels of mode {image.mode}, and the labels were said to be colours; expected RGB or palette",
      "unsupported pixels",
    )
  pixels = np.asarray(image.convert("RGB")).astype(np.int32)
  return pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]


def _code(colour: Rgb) -> int:
  red, green, blue = colour
  return red + 256 * green + 65536 * blue


def _hex(code: int) -> str:
  return f"rgb({code & 255}, {code >> 8 & 255}, {code >> 16})"
