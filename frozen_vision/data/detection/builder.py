"""TFDS builder that writes a COCO source as ArrayRecord shards. Needs TensorFlow; reading does not.

The image files' own bytes are kept, not re-encoded, and the segmentations as JSON of the polygons
or run lengths they were, so that what is read back is what was there.
"""

import json
import pathlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from frozen_vision.data import beam as beam_lib
from frozen_vision.data import prepared_builder
from frozen_vision.data.detection import class_lists, coco, prepared_coco


class FrozenVisionCoco(prepared_builder.Builder):
  """One split of COCO-format data."""

  KIND = prepared_coco.KIND
  DESCRIPTION = "Instances in COCO format, as prepared by frozen_vision."

  def features(self) -> dict[str, Any]:
    return {
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
    }

  def metadata(self) -> dict[str, Any]:
    return prepared_coco.metadata(self._source)

  @staticmethod
  def encode(source: coco.CocoSource, task: int) -> dict[str, Any]:
    record, data = source.read(task)
    height, width = record.pop("height"), record.pop("width")
    for name in class_lists.KEYS.values():  # the index has them
      record.pop(name, None)
    record["segmentations"] = json.dumps(record["segmentations"], separators=(",", ":"))
    return {"image": data, "size": (height, width), **record}


def write(
  source: coco.CocoSource, split: str, out: pathlib.Path, beam: beam_lib.Beam | None = None
) -> pathlib.Path:
  """Writes `source` below `out`, in place of what was there; returns the folder of the shards."""
  target = prepared_builder.write(FrozenVisionCoco, source, split, out, beam)
  prepared_coco.write_index(source, out, split)
  return target
