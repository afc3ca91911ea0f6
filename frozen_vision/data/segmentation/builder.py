"""TFDS builder that writes labelled images as ArrayRecord shards. Needs TensorFlow; reading does not.

The image files' own bytes are kept, not re-encoded. Label images become 8-bit PNG of class indices, 255
without a class.
"""

import pathlib
from typing import Any

import tensorflow_datasets as tfds

from frozen_vision.data import beam as beam_lib
from frozen_vision.data import prepared_builder
from frozen_vision.data.segmentation import label_maps, prepared_segmentation, sources


class FrozenVisionSegmentation(prepared_builder.Builder):
  """One split of labelled images."""

  KIND = prepared_segmentation.KIND
  DESCRIPTION = "Images with a class for every pixel, as prepared by frozen_vision."

  def features(self) -> dict[str, Any]:
    return {
      "image": tfds.features.Text(doc="the image file's bytes"),
      "label": tfds.features.Text(doc="PNG of class indices, 255 without a class; empty if unlabelled"),
      "name": tfds.features.Text(),
    }

  def metadata(self) -> dict[str, Any]:
    return prepared_segmentation.metadata(self._source)

  @staticmethod
  def encode(source: sources.EncodedSource, task: int) -> dict[str, Any]:
    label = source.label(task)
    return {
      "image": source.image_bytes(task),
      "name": source.name(task),
      "label": b"" if label is None else label_maps.encode(label),
    }


def write(
  source: sources.EncodedSource, split: str, out: pathlib.Path, beam: beam_lib.Beam | None = None
) -> pathlib.Path:
  """Writes `source` below `out`, in place of what was there; returns the folder of the shards."""
  target = prepared_builder.write(FrozenVisionSegmentation, source, split, out, beam)
  prepared_segmentation.write_index(source, out, split)
  return target
