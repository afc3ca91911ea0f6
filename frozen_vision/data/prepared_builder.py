"""Shared base of the TFDS builders that write prepared data as ArrayRecord shards. Needs TensorFlow."""

import abc
from collections.abc import Iterator
import fractions
import pathlib
import resource
import shutil
import tempfile
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from frozen_vision.data import prepared
from frozen_vision.files import lock

_KEYS = 2**128  # TFDS's keys are smaller
# TFDS holds a thousand files open while it writes, which is about the usual limit.
_OPEN_FILES = 4096


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """One split, its examples in the order of the source; the config of the split's name holds it.

  Attributes:
    KIND: of the data; TFDS's `name` and `VERSION` follow from it.
    DESCRIPTION: one sentence.
  """

  KIND: ClassVar[prepared.Kind]
  DESCRIPTION: ClassVar[str]

  def __init_subclass__(cls, **options: Any):
    cls.name, cls.VERSION = cls.KIND.builder, tfds.core.Version(cls.KIND.version)
    super().__init_subclass__(**options)

  def __init__(self, *, source: Any, split: str, data_dir: str):
    self._source = source
    self._split = split
    config = tfds.core.BuilderConfig(name=split, description=repr(source))
    super().__init__(data_dir=data_dir, config=config, file_format="array_record")

  @abc.abstractmethod
  def features(self) -> dict[str, Any]:
    """TFDS's features of an example."""

  @abc.abstractmethod
  def metadata(self) -> dict[str, Any]:
    """The metadata that is stored beside the shards."""

  @abc.abstractmethod
  def examples(self) -> Iterator[tuple[fractions.Fraction, dict[str, Any]]]:
    """Examples in order, each with its place among them: ascending, from 0 to less than 1."""

  def _info(self) -> tfds.core.DatasetInfo:
    # Without shuffling, example i of the shards is example i of the source.
    return self.dataset_info_from_configs(
      description=self.DESCRIPTION,
      features=tfds.features.FeaturesDict(self.features()),
      metadata=tfds.core.MetadataDict(self.metadata()),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
    del dl_manager  # nothing is downloaded
    return {self._split: self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
    # From a gigabyte on, TFDS sorts by key: a file for each thousandth of all possible keys, one of them at a
    # time in memory. Keys 0, 1, 2, ... would all go into the first.
    for place, example in self.examples():
      yield int(place * _KEYS), example


def write(builder: type[Builder], source: Any, split: str, out: pathlib.Path) -> pathlib.Path:
  """Writes `source` below `out`, in place of what was there; returns the folder of the shards.

  It is complete when its index has been added, see `prepared.Kind.complete`.
  """
  target = builder.KIND.folder(out, split)
  with lock.hold(target.parent.with_name(f".{split}.lock"), f"prepared data in {target}"):
    _write(builder, source, split, out, target)
  return target


def _write(builder: type[Builder], source: Any, split: str, out: pathlib.Path, target: pathlib.Path) -> None:
  """Does what `write` does, where nobody else writes."""
  # With what an interrupted run left beside it: TFDS would take shards that are there as done.
  shutil.rmtree(target.parent, ignore_errors=True)
  _allow_open_files()
  tfds.disable_progress_bar()
  with tempfile.TemporaryDirectory() as unused:  # TFDS insists on a folder for downloads
    built = builder(source=source, split=split, data_dir=str(out))
    built.download_and_prepare(download_dir=unused)


def _allow_open_files() -> None:
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
  if soft != resource.RLIM_INFINITY and soft < wanted:
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
