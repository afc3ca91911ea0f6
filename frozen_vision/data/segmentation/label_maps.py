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

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import io

from jaxtyping import Int, Int16, UInt8
import numpy as np
from PIL import Image

from frozen_vision import messages
from frozen_vision.data import images
from frozen_vision.data.segmentation import label_files

IGNORE = 255
MAX_CLASSES = 255  # indices 0..254 of a uint8 map, besides IGNORE
Rgb = tuple[int, int, int]

_UNKNOWN = -1
_NUM_VALUES = 2**16  # pixel values of up to 16 bits


@dataclasses.dataclass(frozen=True)
class LabelFormat:
  """The class list, and how label files refer to it.

  Attributes:
    class_names: in the order of the classes' indices.
    values: the pixel value of each class; None: its position.
    colours: (r, g, b) of each class, for files in colours; None for files of numbers.
    ignored: pixel values without a class. A class's own value may be among them: that class then does not
      exist. None: 255, unless it is the value of a class.
    ignored_colours: the same for files in colours.
    unknown: "error" or "ignore": what any other value is.
  """

  class_names: tuple[str, ...]
  values: tuple[int, ...] | None = None
  colours: tuple[Rgb, ...] | None = None
  ignored: tuple[int, ...] | None = None
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
    by_value = {value: index for index, value in enumerate(values)}
    if self.ignored is None:
      return {IGNORE: IGNORE} | by_value
    return by_value | dict.fromkeys(self.ignored, IGNORE)

  @functools.cached_property
  def _by_colour(self) -> dict[int, int]:
    colours = {_code(colour): index for index, colour in enumerate(self.colours)}
    return colours | {_code(colour): IGNORE for colour in self.ignored_colours}

  @functools.cached_property
  def _table(self) -> Int16[np.ndarray, "n"]:
    """Class of every value up to 16 bits."""
    table = np.full(_NUM_VALUES, _UNKNOWN, np.int16)
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
    """Reads the label map of a file.

    Args:
      data: the file's bytes.
      name: what errors call it.
      segments: {segment id: category id} of a file in COCO's panoptic format; the category ids are `values`.

    Raises:
      ImageError: a file that is unreadable, of a kind that does not fit, or with labels of no class; the
        message says which and how many pixels have them.
    """
    return self.decode_counting(data, name=name, segments=segments)[0]

  def decode_counting(
    self,
    data: bytes,
    *,
    name: str,
    segments: Mapping[int, int] | None = None,
  ) -> tuple[UInt8[np.ndarray, "h w"], dict[str, int]]:
    """Reads a label map as `decode` does, and counts the pixels of every label that is in no list."""
    image, bits = label_files.open_label(data, name)
    if segments is not None:
      known = self._segment_classes(segments)
      strips = label_files.colour_codes(image, name)
      classes, show = functools.partial(_classes_of_codes, known), functools.partial(_show_segment, segments)
    elif self.colours is not None:
      strips = label_files.colour_codes(image, name)
      classes, show = functools.partial(_classes_of_codes, self._by_colour), _show_colour
    else:
      strips = label_files.pixel_values(image, bits, name)
      classes, show = self._classes_of_values, str
    labels = np.empty((image.height, image.width), np.uint8)
    unknown = _fill(labels, strips, classes)
    if unknown and self.unknown == "error":
      raise self._unknown_labels(name, unknown, show)
    return labels, {show(value): count for value, count in unknown.items()}

  def _classes_of_values(self, values: Int[np.ndarray, "h w"]) -> Int16[np.ndarray, "h w"]:
    inside = (values >= 0) & (values < _NUM_VALUES)
    return np.where(inside, self._table[np.where(inside, values, 0)], np.int16(_UNKNOWN))

  def _segment_classes(self, segments: Mapping[int, int]) -> dict[int, int]:
    known = {0: IGNORE}  # COCO's VOID
    for segment, category in segments.items():
      known[segment] = self._by_value.get(category, _UNKNOWN)
    return known

  def _unknown_labels(
    self, name: str, unknown: Mapping[int, int], show: Callable[[int], str]
  ) -> images.ImageError:
    worst = sorted(unknown.items(), key=lambda item: (-item[1], item[0]))
    listed = messages.listed([f"{show(value)} ({count} pixels)" for value, count in worst])
    return images.ImageError(
      name,
      f"has labels outside of the class list: {listed}; known are "
      f"{self._describe()}. Correct the class list, name them as ignored, or set unknown labels to "
      "ignore",
      "unknown labels",
    )

  def _describe(self) -> str:
    known = self._by_colour if self.colours is not None else self._by_value
    show = _show_colour if self.colours is not None else str
    kept = [show(value) for value, index in known.items() if index != IGNORE]
    shown = ", ".join(kept[:8]) + (", ..." if len(kept) > 8 else "")
    ignored = ", ".join(show(value) for value, index in known.items() if index == IGNORE) or "none"
    return f"{len(kept)} classes ({shown}; ignored: {ignored})"


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


def _code(colour: Rgb) -> int:
  red, green, blue = colour
  return red + 256 * green + 65536 * blue


def _show_colour(code: int) -> str:
  return f"rgb({code & 255}, {code >> 8 & 255}, {code >> 16})"


def _show_segment(segments: Mapping[int, int], code: int) -> str:
  return f"segment {code}" + (f" of category {segments[code]}" if code in segments else "")


def _classes_of_codes(known: Mapping[int, int], codes: Int[np.ndarray, "h w"]) -> Int16[np.ndarray, "h w"]:
  present, inverse = np.unique(codes, return_inverse=True)
  classes = np.array([known.get(code, _UNKNOWN) for code in present.tolist()], np.int16)
  return classes[inverse.reshape(codes.shape)]


def _fill(
  labels: UInt8[np.ndarray, "h w"],
  strips: Iterable[tuple[slice, Int[np.ndarray, "rows w"]]],
  classes: Callable[[Int[np.ndarray, "rows w"]], Int16[np.ndarray, "rows w"]],
) -> dict[int, int]:
  """Writes the classes of all strips into `labels`; returns {value: pixels} of the values without a class."""
  unknown: collections.Counter[int] = collections.Counter()
  for rows, values in strips:
    found = classes(values)
    without = found == _UNKNOWN
    if without.any():
      unknown.update(dict(zip(*(part.tolist() for part in np.unique(values[without], return_counts=True)))))
      found[without] = IGNORE
    labels[rows] = found
  return dict(unknown)
