"""Images with a class for every pixel: a folder of images and a folder of label images."""

import abc
from collections.abc import Mapping, Sequence
import copy
import functools
import os
import pathlib
from typing import Any, Self

from jaxtyping import UInt8
import numpy as np

from frozen_vision.data import findings, fingerprint, image_checks, images
from frozen_vision.data import names as data_names
from frozen_vision.data.segmentation import class_lists, label_files, label_maps

_SHOWN = 5


KINDS = {
  "unlabelled": findings.Kind("images without a label image: skipped, as asked for", "images", dropped=False),
  "without_image": findings.Kind(
    "label images that belong to no image: not used", "label images", dropped=False
  ),
}


class SegmentationSource(abc.ABC):
  """Labelled images by position; the records of `__getitem__` have these keys:

  image uint8 [h, w, 3], RGB after EXIF rotation; label uint8 [h, w], class index or `label_maps.IGNORE`, None
  where the image is unlabelled; name str, the image's path without its ending.

  Attributes:
    class_names: in the order of class indices.
    largest_size: (height, width) in pixels that no image exceeds.
  """

  class_names: tuple[str, ...]
  largest_size: tuple[int, int]

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @abc.abstractmethod
  def __getitem__(self, index: int) -> dict[str, Any]: ...

  @abc.abstractmethod
  def label(self, index: int) -> UInt8[np.ndarray, "h w"] | None:
    """The label map alone, at original size; None where the image is unlabelled."""

  @abc.abstractmethod
  def name(self, index: int) -> str:
    """The image's path below its folder, without its ending."""

  @property
  def num_classes(self) -> int:
    return len(self.class_names)


class EncodedSource(SegmentationSource):
  """Base of sources that keep images as the bytes of a file: decoded here, and checked against its labels."""

  @abc.abstractmethod
  def image_bytes(self, index: int) -> bytes: ...

  @abc.abstractmethod
  def label_counting(self, index: int) -> tuple[UInt8[np.ndarray, "h w"] | None, dict[str, int]]:
    """The label map, and {label: pixels} of the labels that are in no list and are ignored."""

  def label(self, index: int) -> UInt8[np.ndarray, "h w"] | None:
    """See `SegmentationSource`."""
    return self.label_counting(index)[0]

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The record at `index`; see `SegmentationSource`.

    Raises:
      IndexError: outside of [0, len).
      ImageError: image or label unusable, or of different sizes.
    """
    name, data, label = self.name(index), self.image_bytes(index), self.label(index)
    where = self.where(index)
    image = images.decode_image(data, name=where)
    if label is not None:
      check_size(image.shape[:2], label, where, data)
    return {"image": image, "label": label, "name": name}

  def where(self, index: int) -> str:
    """What errors call the image: the path of its file, where there is one."""
    return self.name(index)


def check_size(size: tuple[int, int], label: np.ndarray, name: str, data: bytes) -> None:
  """Raises ImageError where an image's (height, width) is not that of its label map."""
  image_checks.check_size(size, {"file_name": name, "height": label.shape[0], "width": label.shape[1]}, data)


class LabelledImages(EncodedSource):
  """Images below one folder, label images of the same names below another; files are read when asked for."""

  def __init__(
    self,
    image_dir: str | os.PathLike[str],
    label_dir: str | os.PathLike[str] | None,
    label_format: label_maps.LabelFormat,
    *,
    segments: str | os.PathLike[str] | None = None,
    unlabelled: str = "error",
    image_suffix: str = "",
    label_suffix: str = "",
  ):
    """Lists the images and finds their labels.

    Args:
      image_dir: searched recursively.
      label_dir: holds `X + label_suffix + .png` (or .tif, .bmp) for every image `X + image_suffix + .jpg`;
        None if nothing is labelled, which `unlabelled` then must allow.
      label_format: the class list.
      segments: COCO panoptic JSON, if the label images are of that format.
      unlabelled: what an image without a label image is: "error", "skip", or "keep" (predicted, never scored;
        of no use for training).
      image_suffix: end of the images' names before the ending, such as Cityscapes' `_leftImg8bit`; other
        images are left out.
      label_suffix: the same of the label images, such as `_gtFine_labelIds`.

    Raises:
      FileNotFoundError: no such folder or file.
      ValueError: no images, two of one name, or images without labels; names the first of them.
    """
    if unlabelled not in ("error", "skip", "keep"):
      raise ValueError(f"unlabelled images are {unlabelled!r}; known: error, skip, keep.")
    self.image_dir = pathlib.Path(image_dir)
    self.label_dir = None if label_dir is None else pathlib.Path(label_dir)
    self.label_format = label_format
    self.findings = findings.Findings(KINDS)
    self.class_names = label_format.class_names
    self._segments = None
    if segments is not None:
      listed = class_lists.read_segments(segments)
      self._segments = {data_names.normalised(name): found for name, found in listed.items()}
    found = _list(self.image_dir, images.SUFFIXES, image_suffix, "images")
    labels = {}
    if self.label_dir is not None:
      labels = _list(self.label_dir, label_files.SUFFIXES, label_suffix, "label images")
    without = sorted(set(found) - set(labels))
    if without and unlabelled == "error":
      raise self._unlabelled(found, without)
    if unlabelled == "skip":
      self.findings.saw("images", len(found))
      for stem in without:
        self.findings.add("unlabelled", found.pop(stem))
    if not found:
      raise ValueError(f"No image of {self.image_dir} has a label image in {self.label_dir}.")
    if unlabelled == "error":
      for stem in sorted(set(labels) - set(found)):
        self.findings.add("without_image", labels[stem])
    self._names = sorted(found)
    self._images = [found[stem] for stem in self._names]
    self._labels = [labels.get(stem) for stem in self._names]

  def _unlabelled(self, found: Mapping[str, str], without: Sequence[str]) -> ValueError:
    """The message about images without label images; `found` has the files of all."""
    listed = ", ".join(found[stem] for stem in without[:_SHOWN])
    return ValueError(
      f"{len(without)} of {len(found)} images of {self.image_dir} have no label image in {self.label_dir}: "
      f"{listed}{', ...' if len(without) > _SHOWN else ''}. Expected the same path with one of the endings "
      f"{', '.join(label_files.SUFFIXES)}; add them, or set unlabelled images to skip or keep."
    )

  def __len__(self) -> int:
    return len(self._names)

  def __repr__(self) -> str:  # Grain writes it into its messages
    return f"LabelledImages({self.image_dir}, {len(self)} images, {self.num_classes} classes)"

  def identity(self) -> dict[str, Any]:
    """See `fingerprint.Identified`."""
    return {
      "file names": [self._images, [label or "" for label in self._labels]],
      "file sizes": fingerprint.file_sizes(self.files()),
      "class list": repr(self.label_format),
      "segments": self._segments,
    }

  def name(self, index: int) -> str:
    return self._names[index]

  def image_path(self, index: int) -> pathlib.Path:
    return self.image_dir / self._images[index]

  def label_path(self, index: int) -> pathlib.Path | None:
    return None if self._labels[index] is None else self.label_dir / self._labels[index]

  def files(self) -> list[pathlib.Path]:
    """Image and label image of every record; see `data.content`."""
    paths = [path(index) for index in range(len(self)) for path in (self.image_path, self.label_path)]
    return [path for path in paths if path is not None]

  def image_bytes(self, index: int) -> bytes:
    return images.read_bytes(self.image_path(index))

  def where(self, index: int) -> str:
    return str(self.image_path(index))

  @functools.cached_property
  def largest_size(self) -> tuple[int, int]:
    """Reads the header of every image."""
    sizes = np.array([images.read_size(self.image_path(i)) for i in range(len(self))])
    return tuple(sizes.max(axis=0).tolist())

  def label_counting(self, index: int) -> tuple[UInt8[np.ndarray, "h w"] | None, dict[str, int]]:
    """See `EncodedSource`."""
    path = self.label_path(index)
    if path is None:
      return None, {}
    segments = None
    if self._segments is not None:
      segments = self._segments.get(data_names.normalised(self._labels[index]))
      if segments is None:
        raise images.ImageError(str(path), "is not among the annotations of the panoptic JSON", "missing")
    return self.label_format.decode_counting(images.read_bytes(path), name=str(path), segments=segments)

  def take(self, indices: Sequence[int]) -> Self:
    """The same source with these images only."""
    other = object.__new__(type(self))
    other.__dict__.update(self.__dict__)
    other.__dict__.pop("largest_size", None)
    other.findings = copy.deepcopy(self.findings)
    for key in ("_names", "_images", "_labels"):
      setattr(other, key, [getattr(self, key)[i] for i in indices])
    return other


def _list(folder: pathlib.Path, endings: Any, suffix: str, what: str) -> dict[str, str]:
  """{path below the folder, without `suffix` and ending: path below the folder}."""
  if not folder.is_dir():
    raise FileNotFoundError(f"{folder} is not a folder; expected {what} in it.")
  found: dict[str, str] = {}
  for path in data_names.files_below(folder):
    if path.suffix.lower() not in endings or not path.stem.endswith(suffix):
      continue
    relative = path.relative_to(folder)
    stem = data_names.normalised(relative.with_suffix("").as_posix())
    stem = stem[: len(stem) - len(suffix)]
    if stem in found:
      raise ValueError(
        f"{folder} has {found[stem]} and {relative.as_posix()}; expected one file for each name."
      )
    found[stem] = relative.as_posix()
  if not found:
    ending = f"*{suffix} with one of the endings {', '.join(sorted(endings))}"
    raise ValueError(f"{folder} has no {what}; expected {ending}.")
  return found
