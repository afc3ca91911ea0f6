"""TFDS builder that writes images with normals and depth as ArrayRecord shards. Needs TensorFlow.

The files' own bytes are kept, not re-encoded.
"""

import pathlib
from typing import Any

import tensorflow_datasets as tfds

from frozen_vision.data import beam as beam_lib
from frozen_vision.data import prepared_builder
from frozen_vision.data.dense import folders, prepared_dense


class FrozenVisionDense(prepared_builder.Builder):
  """One split of images with normals, depth or both."""

  KIND = prepared_dense.KIND
  DESCRIPTION = "Images with surface normals and depth, as prepared by frozen_vision."

  def features(self) -> dict[str, Any]:
    files = {what: tfds.features.Text(doc="the file's bytes") for what in ("image", *self._source.targets)}
    suffixes = {f"{what}_suffix": tfds.features.Text(doc="its ending") for what in files}
    return {**files, **suffixes, "name": tfds.features.Text()}

  def metadata(self) -> dict[str, Any]:
    return prepared_dense.metadata(self._source)

  @staticmethod
  def encode(source: folders.DenseFolders, task: int) -> dict[str, Any]:
    record: dict[str, Any] = {"name": source.name(task)}
    for what in ("image", *source.targets):
      name, record[what] = source.encoded(task, what)
      record[f"{what}_suffix"] = pathlib.PurePath(name).suffix
    return record


def write(
  source: folders.DenseFolders, split: str, out: pathlib.Path, beam: beam_lib.Beam | None = None
) -> pathlib.Path:
  """Writes `source` below `out`, in place of what was there; returns the folder of the shards."""
  target = prepared_builder.write(FrozenVisionDense, source, split, out, beam)
  prepared_dense.write_index(source, out, split)
  return target
