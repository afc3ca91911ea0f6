"""TFDS builder that writes labelled images as ArrayRecord shards. Needs TensorFlow; reading does not.

The image files' own bytes are kept, not re-encoded. Label images become 8-bit PNG of class indices, 255
without a class.
"""

from collections.abc import Iterator
import fractions
import pathlib
from typing import Any

import tensorflow_datasets as tfds

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

  def examples(self) -> Iterator[tuple[fractions.Fraction, dict[str, Any]]]:
    for index in range(len(self._source)):
      label = self._source.label(index)
      yield (
        fractions.Fraction(index, len(self._source)),
        {
          "image": self._source.image_bytes(index),
          "name": self._source.name(index),
          "label": b"" if label is None else label_maps.encode(label),
        },
      )


def write(source: sources.EncodedSource, split: str, out: pathlib.Path) -> pathlib.Path:
  """Writes `source` below `out`, in place of what was there; returns the folder of the shards."""
  target = prepared_builder.write(FrozenVisionSegmentation, source, split, out)
  prepared_segmentation.write_index(source, out, split)
  return target
