"""Labelled images that lists name, in arrays, in parts of a published set, and several sources as one."""

from collections.abc import Sequence
import pathlib
from typing import Any

from jaxtyping import Bool, Int, UInt8
import numpy as np

from frozen_vision.data import findings, fingerprint
from frozen_vision.data.classification import folders

Labels = Int[np.ndarray, "n"] | Bool[np.ndarray, "n k"]
_SHOWN = 3


class ListedImages(folders.ImageFiles):
  """Records of image files with their labels, read when asked for; `names` are in the order of the list."""

  def __init__(self, root: pathlib.Path, names: Sequence[str], labels: Labels, classes: Sequence[str]):
    """Takes the list.

    Raises:
      FileNotFoundError: a file that is not there; names the first ones.
      ValueError: an empty list.
    """
    labels = np.asarray(labels)
    super().__init__(root, names, labels if labels.ndim == 2 else labels.astype(np.int32), classes)
    if not self.names:
      raise ValueError(f"The lists of {root} name no image; expected one or more in every part.")
    missing = [name for name in self.names if not (root / name).is_file()]
    if missing:
      raise FileNotFoundError(
        f"{len(missing):,} of {len(self.names):,} listed images are not below {root}, such as "
        f"{', '.join(missing[:_SHOWN])}; unpack the whole archive there."
      )


class PixelImages:
  """Records of images of one size in memory, such as CIFAR's.

  Attributes `classes`, `labels`, `names` and `findings` are as in `ListedImages`.
  """

  def __init__(
    self, pixels: UInt8[np.ndarray, "n h w 3"], labels: Int[np.ndarray, "n"], classes: Sequence[str]
  ):
    self._pixels, self.labels, self.classes = pixels, labels.astype(np.int32), list(classes)
    self.names = [f"{number:05d}" for number in range(len(pixels))]
    self.findings = findings.Findings(folders.KINDS)

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The record {image: uint8 [h, w, 3], label: int32, name: number}."""
    return {"image": self._pixels[index], "label": self.labels[index], "name": self.names[index]}

  def identity(self) -> dict[str, Any]:
    """See `fingerprint.Identified`; here the pixels are at hand."""
    return {"file names": self.names, "labels": self.labels, "pixels": self._pixels}

  def check(self) -> None:
    """Counts the images: pixels in memory cannot be unreadable."""
    self.findings.saw("images", len(self.names))


class Joined:
  """The records of several sources of the same classes, one after the other.

  Attributes `classes`, `names`, `labels` and `findings` are as in `ListedImages`; names and labels are
  there if all sources have them.
  """

  def __init__(self, *sources: Any):
    self._sources = sources
    self._ends = np.cumsum([len(source) for source in sources])
    self.classes = sources[0].classes
    self.findings = findings.Findings(folders.KINDS)
    for found in (source.findings for source in sources if hasattr(source, "findings")):
      for unit, count in found.totals.items():
        self.findings.saw(unit, count)
      self.findings.merge(found)

  def __len__(self) -> int:
    return int(self._ends[-1])

  @property
  def names(self) -> list[str]:
    return [name for source in self._sources for name in source.names]

  @property
  def labels(self) -> Labels:
    return np.concatenate([source.labels for source in self._sources])

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The record, as its source has it."""
    index = range(len(self))[index]
    number = int(np.searchsorted(self._ends, index, side="right"))
    return self._sources[number][index - (int(self._ends[number - 1]) if number else 0)]

  def identity(self) -> dict[str, Any]:
    """See `fingerprint.Identified`."""
    parts = [
      source.identity() if isinstance(source, fingerprint.Identified) else {"description": repr(source)}
      for source in self._sources
    ]
    return {f"{name} {number}": value for number, part in enumerate(parts) for name, value in part.items()}
