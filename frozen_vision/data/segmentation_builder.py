"""TFDS builder that writes labelled images as ArrayRecord shards. Needs TensorFlow; reading does not.

The image files' own bytes are kept, not re-encoded. Label images become 8-bit PNG of class indices, 255
without a class.
"""

import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from frozen_vision.data import label_maps, prepared_segmentation, segmentation


class FrozenVisionSegmentation(tfds.core.GeneratorBasedBuilder):
  """One split of labelled images; the config of the same name holds it."""

  name = prepared_segmentation.BUILDER_NAME
  VERSION = tfds.core.Version(prepared_segmentation.VERSION)

  def __init__(self, *, source: segmentation.EncodedSource, split: str, data_dir: str):
    self._source = source
    self._split = split
    config = tfds.core.BuilderConfig(name=split, description=repr(source))
    super().__init__(data_dir=data_dir, config=config, file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features.FeaturesDict({
        "image": tfds.features.Text(doc="the image file's bytes"),
        "label": tfds.features.Text(doc="PNG of class indices, 255 without a class; empty if unlabelled"),
        "name": tfds.features.Text(),
    })
    metadata = tfds.core.MetadataDict(prepared_segmentation.metadata(self._source))
    # Without shuffling, example i of the shards is example i of the source.
    return self.dataset_info_from_configs(
        description="Images with a class for every pixel, as prepared by frozen_vision.",
        features=features, metadata=metadata, disable_shuffling=True)

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
    del dl_manager  # nothing is downloaded
    return {self._split: self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
    for index in range(len(self._source)):
      label = self._source.label(index)
      yield index, {
          "image": self._source.image_bytes(index), "name": self._source.name(index),
          "label": b"" if label is None else label_maps.encode(label),
      }


def write(source: segmentation.EncodedSource, split: str, out: pathlib.Path) -> pathlib.Path:
  """Writes `source` below `out`, in place of what was there; returns the folder of the shards."""
  target = prepared_segmentation.folder(out, split)
  # Also what an interrupted run left beside it; TFDS would take shards that are there as done.
  shutil.rmtree(target.parent, ignore_errors=True)
  tfds.disable_progress_bar()
  with tempfile.TemporaryDirectory() as unused:  # TFDS insists on a folder for downloads
    builder = FrozenVisionSegmentation(source=source, split=split, data_dir=str(out))
    builder.download_and_prepare(download_dir=unused)
  prepared_segmentation.write_index(source, out, split)
  return target
