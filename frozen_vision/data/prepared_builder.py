"""Shared base of the TFDS builders that write prepared data as ArrayRecord shards. Needs TensorFlow."""

import abc
from collections.abc import Iterable, Iterator, Sequence
import contextlib
import fractions
import functools
import pathlib
import resource
import shutil
import tempfile
from typing import Any, ClassVar

import tensorflow as tf
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer, writer
from tensorflow_datasets.core.utils import shard_utils

from frozen_vision.data import beam as beam_lib
from frozen_vision.data import prepared
from frozen_vision.files import lock

_KEYS = 2**128  # TFDS's keys are smaller
# With Beam, keys of one shard lie in a range of this size.
_SHARD_KEYS = 2**32
# TFDS holds a thousand files open while it writes, which is about the usual limit.
_OPEN_FILES = 4096


class _Writer(writer.ExampleWriter):
  """Writes the fields of each record in the order of their names, which else differs between processes."""

  def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> Any:
    return super().write(path, ((key, _by_name(record)) for key, record in examples))


def _by_name(record: bytes) -> bytes:
  return tf.train.Example.FromString(record).SerializeToString(deterministic=True)


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
    self._planned: tuple[list[tuple[int, Any]], Any] | None = None
    config = tfds.core.BuilderConfig(name=split, description=repr(source))
    super().__init__(data_dir=data_dir, config=config, file_format="array_record")

  @abc.abstractmethod
  def features(self) -> dict[str, Any]:
    """TFDS's features of an example."""

  @abc.abstractmethod
  def metadata(self) -> dict[str, Any]:
    """The metadata that is stored beside the shards."""

  @staticmethod
  @abc.abstractmethod
  def encode(source: Any, task: Any) -> dict[str, Any]:
    """The example of a task of `tasks`, which is an index of the source where it has an example for each."""

  def examples(self) -> Iterator[tuple[fractions.Fraction, dict[str, Any]]]:
    """Examples in order, each with its place among them: ascending, from 0 to less than 1."""
    for index in range(len(self._source)):
      yield fractions.Fraction(index, len(self._source)), self.encode(self._source, index)

  def tasks(self, stack: contextlib.ExitStack) -> tuple[Sequence[Any], Any]:
    """For Beam: a task for each example, in order, and the source that `encode` is given; both must pickle.

    Args:
      stack: closes, when the shards are written, what the tasks need until then.
    """
    del stack
    return range(len(self._source)), self._source

  def plan(self, beam: beam_lib.Beam, stack: contextlib.ExitStack) -> int:
    """Makes Beam write the examples, and returns the number of shards that they take.

    TFDS places an example by its key, which is chosen so that each shard holds what it holds without Beam.
    """
    tasks, source = self.tasks(stack)
    encode = functools.partial(type(self).encode, source)
    sizes = beam.map(functools.partial(_serialized_size, encode, self.info.features), tasks)
    count = shard_utils.ShardConfig().get_number_shards(sum(sizes), len(sizes))
    self._planned = (list(zip(_keys(len(tasks), count), tasks, strict=True)), encode)
    return count

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
    return {self._split: self._pipeline() if self._planned else self._generate_examples()}

  def _example_writer(self) -> writer.ExampleWriter:
    return _Writer(file_format=self.info.file_format)

  def _pipeline(self) -> Any:
    """Beam's transform that makes (key, example) of all."""
    import apache_beam as beam

    keyed, encode = self._planned
    return beam.Create(keyed) | beam.Reshuffle() | beam.MapTuple(functools.partial(_keyed_example, encode))

  def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
    # From a gigabyte on, TFDS sorts by key: a file for each thousandth of all possible keys, one of them at a
    # time in memory. Keys 0, 1, 2, ... would all go into the first.
    for place, example in self.examples():
      yield int(place * _KEYS), example


def _keyed_example(encode: Any, key: int, task: Any) -> tuple[int, dict[str, Any]]:
  return key, encode(task)


def _serialized_size(encode: Any, features: tfds.features.FeaturesDict, task: Any) -> int:
  """Bytes of an example's record."""
  serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
  return len(serializer.serialize_example(features.encode_example(encode(task))))


def _keys(examples: int, shards: int) -> list[int]:
  """Ascending keys that TFDS's writer for Beam distributes over shards as its other writer does.

  It takes shard number `key * shards // largest key` (`shuffle.get_bucket_number`), the last at most.
  """
  keys, first = [], 0
  for shard, end in enumerate(shard_utils.get_shard_boundaries(examples, shards)):
    keys += [shard * _SHARD_KEYS + _SHARD_KEYS // 4 + number for number in range(end - first)]
    first = end
  return [*keys[:-1], shards * _SHARD_KEYS]


def write(
  builder: type[Builder], source: Any, split: str, out: pathlib.Path, beam: beam_lib.Beam | None = None
) -> pathlib.Path:
  """Writes `source` below `out`, in place of what was there; returns the folder of the shards.

  With `beam` its workers do the work, and the records of each shard are the same. What is written is complete
  when its index has been added, see `prepared.Kind.complete`.
  """
  target = builder.KIND.folder(out, split)
  with lock.hold(target.parent.with_name(f".{split}.lock"), f"prepared data in {target}"):
    _write(builder, source, split, out, target, beam)
  return target


def _write(
  builder: type[Builder],
  source: Any,
  split: str,
  out: pathlib.Path,
  target: pathlib.Path,
  beam: beam_lib.Beam | None,
) -> None:
  """Does what `write` does, where nobody else writes."""
  # With what an interrupted run left beside it: TFDS would take shards that are there as done.
  shutil.rmtree(target.parent, ignore_errors=True)
  _allow_open_files()
  tfds.disable_progress_bar()
  with contextlib.ExitStack() as stack:
    unused = stack.enter_context(tempfile.TemporaryDirectory())  # TFDS insists on a folder for downloads
    built = builder(source=source, split=split, data_dir=str(out))
    config = tfds.download.DownloadConfig()
    if beam:
      config.num_shards, config.beam_options = built.plan(beam, stack), beam.pipeline_options()
    built.download_and_prepare(download_dir=unused, download_config=config)


def _allow_open_files() -> None:
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
  if soft != resource.RLIM_INFINITY and soft < wanted:
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
