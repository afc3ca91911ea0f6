"""TFDS builder that writes a COCO source as ArrayRecord shards. Needs TensorFlow; reading does not.

The image files' own bytes are kept, not re-encoded, and the segmentations as JSON of the polygons
or run lengths they were, so that what is read back is what was there.
"""

import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from frozen_vision.data import coco, prepared_coco


class FrozenVisionCoco(tfds.core.GeneratorBasedBuilder):
  """One split of COCO-format data; the config of the same name holds it."""

  name = prepared_coco.BUILDER_NAME
  VERSION = tfds.core.Version(prepared_coco.VERSION)

  def __init__(self, *, source: coco.CocoSource, split: str, data_dir: str):
    self._source = source
    self._split = split
    config = tfds.core.BuilderConfig(name=split, description=repr(source))
    super().__init__(data_dir=data_dir, config=config, file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features.FeaturesDict({
        "image": tfds.features.Text(doc="the image file's bytes"),
        "image_id": tfds.features.Scalar(np.int64),
        "file_name": tfds.features.Text(),
        "size": tfds.features.Tensor(shape=(2,), dtype=np.int32, doc="height, width"),
        "boxes": tfds.features.Tensor(shape=(None, 4), dtype=np.float32, doc="xyxy in pixels"),
        "labels": tfds.features.Tensor(shape=(None,), dtype=np.int32),
        "crowd": tfds.features.Tensor(shape=(None,), dtype=np.bool_),
        "area": tfds.features.Tensor(shape=(None,), dtype=np.float32),
        "annotation_ids": tfds.features.Tensor(shape=(None,), dtype=np.int64),
        "segmentations": tfds.features.Text(doc="JSON list: polygons or RLE of each annotation"),
    })
    metadata = tfds.core.MetadataDict(prepared_coco.metadata(self._source))
    # Without shuffling, example i of the shards is example i of the source.
    return self.dataset_info_from_configs(
        description="Instances in COCO format, as prepared by frozen_vision.",
        features=features, metadata=metadata, disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
    del dl_manager  # nothing is downloaded
    return {self._split: self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
    for index in range(len(self._source)):
      record, data = self._source.read(index)
      height, width = record.pop("height"), record.pop("width")
      record["segmentations"] = json.dumps(record["segmentations"], separators=(",", ":"))
      yield index, {"image": data, "size": (height, width), **record}


def write(source: coco.CocoSource, split: str, out: pathlib.Path) -> pathlib.Path:
  """Writes `source` below `out`, in place of what was there; returns the folder of the shards."""
  target = prepared_coco.folder(out, split)
  # Also what an interrupted run left beside it; TFDS would take shards that are there as done.
  shutil.rmtree(target.parent, ignore_errors=True)
  tfds.disable_progress_bar()
  with tempfile.TemporaryDirectory() as unused:  # TFDS insists on a folder for downloads
    builder = FrozenVisionCoco(source=source, split=split, data_dir=str(out))
    builder.download_and_prepare(download_dir=unused)
  prepared_coco.write_index(source, out, split)
  return target
