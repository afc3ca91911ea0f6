"""Instances together with label maps of the same images, for detectors with a semantic branch (HTC on
COCO-stuff)."""

from collections.abc import Sequence
import os
import pathlib
from typing import Any

from frozen_vision.data import fingerprint, images, names
from frozen_vision.data.segmentation import label_maps


class WithSemanticMaps:
  """A source of detection records, each with `semantic` besides: uint8 [h, w], `label_maps.IGNORE` where
  there is no class.

  The map of `000000000009.jpg` is `000000000009.png` in the folder, in the same subfolder, if there are such.
  """

  def __init__(
    self, source: Any, folder: str | os.PathLike[str], *, num_classes: int, ignored: Sequence[int] = ()
  ):
    """Opens nothing yet but the folder.

    Args:
      source: records with `file_name`, `height` and `width`.
      folder: of single-channel label images whose pixels are classes 0 to num_classes - 1.
      ignored: pixel values without a class, besides 255.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: more classes than a map of 8 bits holds.
    """
    self._source = source
    self._folder = pathlib.Path(folder)
    if not self._folder.is_dir():
      raise FileNotFoundError(f"{self._folder}: no such folder of semantic maps.")
    self._files = names.Files(self._folder)
    self._format = label_maps.LabelFormat(
      class_names=tuple(map(str, range(num_classes))), ignored=tuple({label_maps.IGNORE, *ignored})
    )
    self.categories = source.categories
    self.findings = getattr(source, "findings", None)

  def files(self) -> list[pathlib.Path]:
    """The label images; see `data.content`."""
    return sorted(names.files_below(self._folder))

  def __len__(self) -> int:
    return len(self._source)

  def __repr__(self) -> str:  # Grain writes it into its messages
    return f"WithSemanticMaps({self._source!r}, {self._folder})"

  def identity(self) -> dict[str, Any]:
    """See `fingerprint.Identified`."""
    maps = self.files()
    listed = [path.relative_to(self._folder).as_posix() for path in maps]
    return {
      "instances": fingerprint.of_source(self._source),
      "semantic maps": [listed, fingerprint.file_sizes(maps)],
    }

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The source's record with its map.

    Raises:
      ImageError: no map, an unreadable one, labels of no class, or another size than the image's.
    """
    record = self._source[index]
    file_name = names.require_inside(record["file_name"], f"Record {index} of {self._source!r}")
    wanted = pathlib.Path(file_name).with_suffix(".png")
    path = self._files.find(wanted.as_posix()) or self._folder / wanted
    name = f"{path} (the semantic map of {record['file_name']})"
    labels = self._format.decode(images.read_bytes(path, name=name), name=name)
    expected = (record["height"], record["width"])
    if labels.shape != expected:
      raise images.ImageError(
        name,
        f"is {labels.shape[0]} x {labels.shape[1]} pixels (height x width), and its image is "
        f"{expected[0]} x {expected[1]}",
        "wrong size",
      )
    return {**record, "semantic": labels}
