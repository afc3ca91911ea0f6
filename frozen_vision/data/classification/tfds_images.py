"""Labelled images of a set that TensorFlow Datasets (TFDS) has prepared."""

import functools
import pathlib
import re
from typing import Any

import numpy as np

from frozen_vision.data import findings
from frozen_vision.data.classification import folders

_VERSION = re.compile(r"\d+\.\d+\.\d+")


def find_prepared(root: pathlib.Path, name: str) -> pathlib.Path | None:
  """The newest version of a prepared set, `ROOT/NAME/VERSION`; None if there is none.

  Args:
    name: as TFDS has it, with the config where the set has several: `eurosat/rgb`.
  """
  found = [path for path in (root / name).glob("*") if _VERSION.fullmatch(path.name)]
  found = [path for path in found if (path / "dataset_info.json").is_file()]
  return max(found, key=lambda path: [int(number) for number in path.name.split(".")], default=None)


class TfdsImages:
  """Records of one split, images as the encoded bytes that TFDS keeps.

  Attributes:
    classes, findings: as in `listed.ListedImages`.
    labels: int32 [n]; bool [n, classes] of a feature that holds several.
    names: of the set, the split and the position.
  """

  def __init__(self, folder: pathlib.Path, split: str, *, label: str = "label"):
    """Reads all labels, and decodes no image.

    Args:
      folder: of `find_prepared`.
      label: the feature that holds the class or the classes.

    Raises:
      ValueError: no such split or feature, or files that cannot be read by position.
    """
    self._folder, self._split = folder, split
    info = self._builder.info
    if split not in info.splits or not {"image", label} <= set(info.features):
      raise ValueError(
        f"{folder} has the splits {list(info.splits)} and the features {list(info.features)}; expected the "
        f"split {split!r} with `image` and `{label}`. Prepare the set again with the installed TFDS."
      )
    feature = info.features[label]
    several = hasattr(feature, "feature")
    self.classes = list((feature.feature if several else feature).names)
    labels = [record[label] for record in self._records]
    if several:
      self.labels = np.zeros((len(labels), len(self.classes)), bool)
      for row, present in zip(self.labels, labels):
        row[np.asarray(present, int)] = True
    else:
      self.labels = np.asarray(labels, np.int32)
    self.names = [f"{self._name}/{split}/{number:06d}" for number in range(len(labels))]
    self.findings = findings.Findings(folders.KINDS)

  @property
  def _name(self) -> str:
    return self._builder.info.full_name

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The record {image: encoded bytes, label, name}."""
    index = range(len(self.names))[index]
    return {
      "image": self._records[index]["image"],
      "label": self.labels[index],
      "name": self.names[index],
    }

  def __getstate__(self) -> dict[str, Any]:
    return {key: value for key, value in self.__dict__.items() if key not in ("_records", "_builder")}

  def files(self) -> list[pathlib.Path]:
    """The shards; see `data.content`."""
    return sorted(self._folder.glob(f"*-{self._split}.*"))

  def identity(self) -> dict[str, Any]:
    """See `fingerprint.Identified`."""
    return {"file names": self.names, "labels": self.labels}

  def check(self) -> None:
    """Counts the images: TFDS has checked them when it prepared them."""
    self.findings.saw("images", len(self.names))

  @functools.cached_property
  def _builder(self) -> Any:
    import tensorflow_datasets as tfds  # takes seconds, and the other readers do not need it

    return tfds.builder_from_directory(self._folder)

  @functools.cached_property
  def _records(self) -> Any:
    import tensorflow_datasets as tfds  # as above

    try:
      return self._builder.as_data_source(self._split, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
      info = self._builder.info
      raise ValueError(
        f"{self._folder} is stored as {info.file_format.value}, which cannot be read by position. Prepare it "
        f"again in another folder: tfds build {info.name} --file_format=array_record --data_dir=FOLDER"
      ) from error
