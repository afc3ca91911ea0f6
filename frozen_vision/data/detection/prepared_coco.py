"""Reads COCO data that `python -m frozen_vision.data.prepare coco` has written; no TensorFlow."""

from collections.abc import Collection
import functools
import json
import os
import pathlib
from typing import Any

from jaxtyping import Int64
import numpy as np

from frozen_vision.data import findings, prepared
from frozen_vision.data.detection import class_lists, coco
from frozen_vision.data.detection import coco_annotations as checks
from frozen_vision.files import atomic

_PER_OBJECT = ("boxes", "labels", "crowd", "area", "annotation_ids")
KIND = prepared.Kind(
  "frozen_vision_coco",
  "coco --images DIR --annotations FILE --out {out} --split {split}",
  fields=("image", "image_id", "file_name", "size", "segmentations", *_PER_OBJECT),
)
_GROUND_TRUTH_FILE = "ground_truth.json"


def metadata(source: coco.CocoSource) -> dict[str, Any]:
  """The metadata that the builder stores beside the shards."""
  return {
    "categories": list(source.categories),
    "labelled": source.labelled,
    "annotation_file": source.annotation_file.name,
    "findings": source.findings.as_dict(),
    "has_masks": source.has_masks,
  }


def write_index(source: coco.CocoSource, out: str | os.PathLike[str], split: str) -> None:
  """Adds the ground truth and the index to finished shards, and so completes them."""
  atomic.write_json(KIND.folder(out, split) / _GROUND_TRUTH_FILE, source.ground_truth)
  lists = source.class_lists.arrays() if source.class_lists else {}
  KIND.complete(out, split, image_ids=source.image_ids, objects=source.objects_per_image(), **lists)


class PreparedCoco(coco.InstanceSource):
  """Prepared COCO data: the same records, in the same order, as the source it was made from.

  Sent to a worker process it is a path and one integer per image, and LVIS's lists.

  Attributes:
    class_lists: as `CocoSource.class_lists`; what earlier versions wrote has none.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    split: str,
    *,
    image_ids: Collection[int] | np.ndarray | None = None,
    drop_empty: bool = False,
  ):
    """Opens a split.

    Args:
      directory: the folder that was `--out` of the preparation.
      split: the `--split` of the preparation.
      image_ids: keep these images only.
      drop_empty: drop images without objects other than crowds, for training.

    Raises:
      FileNotFoundError: nothing complete is there.
      CocoError: `image_ids` has ids that are not there, or nothing is left.
    """
    self.directory = pathlib.Path(directory)
    self.split = split
    self._shards = prepared.Shards(KIND, directory, split)
    stored = self._shards.metadata(categories=list, labelled=bool)
    index = self._shards.index(image_ids="i", objects="i")
    self._shards.require_length(len(index["image_ids"]), objects=index["objects"])
    for category in stored["categories"]:
      if not isinstance(category, dict) or not {"id", "name"} <= category.keys():
        raise self._shards.damaged("metadata.json", f"a category is {category!r:.60}")
    self.categories = tuple(stored["categories"])
    self.findings = findings.from_dict(checks.PROBLEMS, stored.get("findings"))
    self.labelled = stored["labelled"]
    self.has_masks = stored.get("has_masks", True)  # absent in what earlier versions wrote
    try:
      self.class_lists = class_lists.from_arrays(index, len(self.categories))
    except ValueError as error:
      raise self._shards.damaged("index.npz", error) from error
    ids, objects = index["image_ids"], index["objects"]
    keep = np.ones(len(ids), bool)
    if image_ids is not None:
      chosen = {int(identity) for identity in image_ids}
      absent = sorted(chosen - set(ids.tolist()))
      if absent:
        raise coco.CocoError(f"{self._shards.folder}: has no images with these ids: {absent[:5]}.")
      keep &= np.isin(ids, list(chosen))
    if drop_empty:
      keep &= objects > 0
    if not keep.any():
      raise coco.CocoError(f"{self._shards.folder}: no image is left of {len(ids)}.")
    self._positions = np.flatnonzero(keep)
    self._image_ids = ids[keep]
    self._objects = objects[keep]

  def __len__(self) -> int:
    return len(self._positions)

  def __repr__(self) -> str:
    return f"PreparedCoco({self._shards.folder}, {len(self)} images, {self.num_classes} classes)"

  def identity(self) -> dict[str, Any]:
    """See `fingerprint.Identified`."""
    return {
      "image ids": self._image_ids,
      "annotations": self._shards.file_digest(_GROUND_TRUTH_FILE),
      "shards": self._shards.identity(),
    }

  def __getstate__(self) -> dict[str, Any]:
    return {key: value for key, value in self.__dict__.items() if key != "ground_truth"}

  def read(self, index: int) -> tuple[dict[str, Any], bytes]:
    if not 0 <= index < len(self):
      raise IndexError(f"image {index} of {len(self)}.")
    stored = self._shards[int(self._positions[index])]
    height, width = stored["size"].tolist()
    record = {
      "image_id": int(stored["image_id"]),
      "file_name": stored["file_name"].decode("utf-8", "replace"),
      "height": height,
      "width": width,
      "boxes": stored["boxes"],
      "labels": stored["labels"],
      "segmentations": self._segmentations(stored, index),
      "crowd": stored["crowd"],
      "area": stored["area"],
      "annotation_ids": stored["annotation_ids"],
    }
    if self.class_lists is not None:
      record |= self.class_lists.record(record["image_id"])
    return record, stored["image"]

  def _segmentations(self, stored: dict[str, Any], index: int) -> list[Any]:
    """The segmentations of a record, if all that it has for each object fits together."""
    position = int(self._positions[index])
    try:
      segmentations = json.loads(stored["segmentations"])
    except (ValueError, RecursionError) as error:
      raise self._shards.damaged(self._shards.shard_of(position), error) from error
    labels = stored["labels"]
    lengths = {len(segmentations), *(len(stored[name]) for name in _PER_OBJECT)}
    if len(lengths) > 1 or (len(labels) and not 0 <= labels.min() <= labels.max() < self.num_classes):
      raise self._shards.damaged(
        self._shards.shard_of(position), f"the objects of example {position} do not fit together"
      )
    return segmentations

  @property
  def image_ids(self) -> Int64[np.ndarray, "m"]:
    return self._image_ids

  def objects_per_image(self) -> Int64[np.ndarray, "m"]:
    """How many annotations that are not crowds each image has."""
    return self._objects

  @functools.cached_property
  def ground_truth(self) -> dict[str, Any]:
    """As `CocoSource.ground_truth` of the source that was prepared."""
    truth = self._shards.json(_GROUND_TRUTH_FILE)
    kept = set(self._image_ids.tolist())
    try:
      images = [image for image in truth["images"] if image["id"] in kept]
      annotations = [row for row in truth["annotations"] if row["image_id"] in kept]
    except (KeyError, TypeError) as error:
      raise self._shards.damaged(_GROUND_TRUTH_FILE, error) from error
    return {**truth, "images": images, "annotations": annotations}
