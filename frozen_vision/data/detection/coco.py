"""COCO-format instance data, read straight from disk: images plus an annotation JSON.

The classes come from the file: label i is the i-th category in the order of ids, which may be any
integers; `category_ids` maps back for output. What the checks found is in `source.findings`.
"""

import abc
from collections.abc import Callable, Collection, Mapping, Sequence
import copy
import dataclasses
import functools
import hashlib
import os
import pathlib
from typing import Any, Self

from jaxtyping import Bool, Float32, Int32, Int64
import numpy as np
from pycocotools import mask as mask_utils

from frozen_vision.data import findings, fingerprint, image_checks
from frozen_vision.data import images as image_io
from frozen_vision.data.detection import class_lists as class_lists_lib
from frozen_vision.data.detection import coco_annotations as checks
from frozen_vision.data.detection import coco_conventions, coco_files, coco_table, mask_encoding

CocoError = checks.CocoError


def load_coco(
  annotation_file: str | os.PathLike[str], image_dir: str | os.PathLike[str], **options: Any
) -> "CocoSource":
  """Opens any COCO-format annotation file and the folder of its images.

  Args:
    annotation_file: JSON with `images`, `categories` and, unless the images are unlabelled (as in
      COCO's `image_info_test*.json`), `annotations`. `iscrowd` may be absent.
    image_dir: what the records' `file_name` is relative to.
    **options: of `open_annotations`.

  Raises:
    FileNotFoundError: the file or the folder is absent.
    CocoError: the file cannot be used; the message lists what is wrong with it.
    OutsideError: a file name that leads out of the folder.
  """
  path, folder = pathlib.Path(annotation_file), pathlib.Path(image_dir)
  if not folder.is_dir():
    raise FileNotFoundError(f"{folder}: no such folder of images (for {path}).")
  return open_annotations(functools.partial(checks.read_json, path), path, folder, **options)


def open_annotations(
  read: Callable[[], Mapping[str, Any]],
  path: pathlib.Path,
  folder: pathlib.Path,
  *,
  image_ids: Collection[int] | np.ndarray | None = None,
  drop_empty: bool = False,
  categories: Sequence[Mapping[str, Any]] | None = None,
  require_masks: bool | None = True,
  check_files: bool = True,
  check_sizes: bool = False,
  check_images: bool = False,
  allow_outside: bool = False,
) -> "CocoSource":
  """Opens annotations of COCO's form, whatever they are read from.

  Args:
    read: gives the content of a COCO file; called again for the ground truth, and sent to worker processes.
    path: what errors call it.
    folder: of the images.
    image_ids: keep these images only.
    drop_empty: drop images that have no object left but crowds, as mmdet's `filter_empty_gt`
      does for training. Never use it for evaluation: the metric counts false alarms there.
    categories: the label space that a model was trained with (`train_source.categories`), where
      it must not come from this file. The file may list fewer categories, but not others.
    require_masks: drop annotations without a usable mask; False keeps them, for data that has boxes only;
      None drops them where the file has masks at all (`CocoSource.has_masks`).
    check_files: look for every image file now, in any Unicode form, and drop what is missing (counted).
    check_sizes: read every image's header now, and drop what does not fit its record (counted).
      Costs about a tenth of a millisecond per image; otherwise reading such an image fails.
    check_images: look at the beginning and the end of every image file now, and drop what cannot be read
      (counted).
    allow_outside: take file names that are absolute or lead out of the folder.

  Raises:
    CocoError, OutsideError: as `load_coco`.
  """
  raw = read()
  problems = findings.Findings(checks.PROBLEMS)
  own_categories = checks.read_categories(raw, path, problems)
  categories = coco_conventions.label_space(own_categories, categories, path)
  chosen = None if image_ids is None else {int(identity) for identity in image_ids}
  rows = checks.read_images(raw, path, folder, problems, chosen, allow_outside=allow_outside)
  if check_files or check_sizes or check_images:
    rows = coco_files.check_files(rows, folder, problems, sizes=check_sizes, contents=check_images)
  if not rows:
    raise CocoError(f"{path}: no usable image in {folder}.\n{problems}")
  coco_conventions.require_pixels(raw, rows, path)
  has_masks = coco_conventions.have_masks(raw, rows)
  if require_masks is None:
    require_masks = has_masks
  annotations = list(checks.read_annotations(raw, rows, categories, problems, require_masks=require_masks))
  labelled = "annotations" in raw
  if labelled and raw["annotations"] and not annotations and _all_dropped(raw, rows):
    raise CocoError(f"{path}: none of its {len(raw['annotations'])} annotations is usable.\n{problems}")
  if annotations and all(row.crowd for row in annotations):
    problems.saw("files")
    problems.add("crowd_only", f"all {len(annotations)} of {path.name}")
  table = coco_table.CocoTable.build(rows, annotations)
  if drop_empty:
    without = np.flatnonzero(table.objects_per_image() == 0)
    problems.notes += _without_objects(len(without), len(table))
    table = table.take(np.flatnonzero(table.objects_per_image() > 0))
    if not len(table):
      raise nothing_to_train_on(path, problems)
  source = CocoSource(read, path, folder, table, categories, labelled, require_masks, problems, has_masks)
  source.class_lists = class_lists_lib.read(raw, rows, categories, path)
  return source


def _without_objects(count: int, total: int) -> list[str]:
  return [f"{count:,} of {total:,} images have no object, and are not trained on"] if count else []


def nothing_to_train_on(path: pathlib.Path, problems: findings.Findings) -> CocoError:
  """The error about a file whose objects are all crowds, or that has none."""
  if "crowd_only" in problems.counts:
    return CocoError(
      f"{path}: every annotation is a crowd (iscrowd 1), a region of many objects that is not trained on, so "
      "no image has an object. Set iscrowd to 0 in annotations of single objects."
    )
  return CocoError(f"{path}: no image has an object to train on.\n{problems}")


def coco_root(
  root: str | os.PathLike[str], split: str, *, year: str = "2017", **options: Any
) -> "CocoSource":
  """Opens a split of the standard layout.

  Args:
    root: holds `{split}{year}/` and `annotations/instances_{split}{year}.json`; for the
      unlabelled splits "test" and "test-dev" it is `test{year}/` and
      `annotations/image_info_{split}{year}.json`.
    split: "train", "val", "test" or "test-dev".
    year: "2017" or "2014".
    **options: of `load_coco`.

  Raises:
    FileNotFoundError, CocoError: as `load_coco`.
    ValueError: an unknown split.
  """
  match split:
    case "train" | "val":
      folder, file = split, "instances"
    case "test" | "test-dev":
      folder, file = "test", "image_info"
    case _:
      raise ValueError(f"split is {split!r}; expected train, val, test or test-dev.")
  root = pathlib.Path(root)
  annotation_file = root / "annotations" / f"{file}_{split}{year}.json"
  return load_coco(annotation_file, root / f"{folder}{year}", **options)


def hold_out(source: "CocoSource", fraction: float, *, seed: int) -> tuple["CocoSource", "CocoSource"]:
  """Splits a source into images to train on and images to evaluate on.

  Which images are held out depends on `seed` and their ids: hardly any changes sides when the file grows.

  Args:
    fraction: of the images, between 0 and 1; at least one is held out.

  Returns:
    (training, validation). Training images have an object that is no crowd.

  Raises:
    ValueError: a fraction that is not between 0 and 1.
    CocoError: nothing is left to train on.
  """
  if not 0 < fraction < 1:
    raise ValueError(f"The fraction of images held out is {fraction}; expected a number between 0 and 1.")
  draw = [hashlib.sha256(f"{seed} {image_id}".encode()).digest() for image_id in source.image_ids]
  order = sorted(range(len(source)), key=draw.__getitem__)
  held_out = sorted(order[: max(1, round(fraction * len(source)))])
  with_objects = np.flatnonzero(source.objects_per_image())
  kept = sorted(set(with_objects.tolist()) - set(held_out))
  if not with_objects.size:
    raise nothing_to_train_on(source.annotation_file, source.findings)
  if not kept:
    raise CocoError(
      f"{source.annotation_file}: of {len(source)} images {len(held_out)} are held out, and no other"
      " has an object to train on."
    )
  train, validation = source.take(kept), source.take(held_out)
  validation.findings = findings.Findings(checks.PROBLEMS)  # those of the file are the training's
  return train, validation


class InstanceSource(abc.ABC):
  """Images with instances by position; the records of `__getitem__` have these keys:

  image uint8 [h, w, 3], RGB after EXIF rotation; image_id int; file_name str; height, width int;
  boxes float32 [n, 4], xyxy in pixels of the image; labels int32 [n]; segmentations, n polygon
  lists or compressed RLE dicts (`masks` rasterises them), None where `require_masks` was off and
  there is none; crowd bool [n]; area float32 [n]; annotation_ids int64 [n].

  Attributes:
    categories: COCO category records, in the order of labels.
    labelled: False when the annotations are unknown, as for a test set.
    has_masks: False when no annotation has a mask, as detection exports have it.
  """

  categories: tuple[dict[str, Any], ...]
  labelled: bool
  has_masks: bool = True

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @abc.abstractmethod
  def read(self, index: int) -> tuple[dict[str, Any], bytes]:
    """The record without its image, and the bytes of the image file, neither of them decoded."""

  @property
  @abc.abstractmethod
  def ground_truth(self) -> dict[str, Any]:
    """COCO dict of the source's images, as the official evaluation reads it."""

  @property
  @abc.abstractmethod
  def image_ids(self) -> Int64[np.ndarray, "m"]:
    """The official ids of all images."""

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The record at `index` with its image decoded; see the class.

    Raises:
      IndexError: outside [0, len).
      ImageError: the image is unusable, or its size is not the record's.
    """
    record, data = self.read(index)
    where = self.where(index, record)
    image = image_io.decode_image(data, name=where)
    image_checks.check_size(image.shape[:2], {**record, "file_name": where}, data)
    return {"image": image, **record}

  def where(self, index: int, record: Mapping[str, Any]) -> str:
    """What errors call the image of a record: the path of its file, where there is one."""
    return record["file_name"]

  @property
  def class_names(self) -> tuple[str, ...]:
    return tuple(category["name"] for category in self.categories)

  @property
  def category_ids(self) -> Int64[np.ndarray, "k"]:
    """The official category id of each label."""
    return np.asarray([category["id"] for category in self.categories], np.int64)

  @property
  def num_classes(self) -> int:
    return len(self.categories)


def masks(record: Mapping[str, Any]) -> Bool[np.ndarray, "n h w"]:
  """Rasterises a record's segmentations with pycocotools, at the size of its image.

  Raises:
    ValueError: an annotation has no mask.
  """
  height, width = record["height"], record["width"]
  if not record["segmentations"]:
    return np.zeros((0, height, width), bool)
  if any(segmentation is None for segmentation in record["segmentations"]):
    raise ValueError(
      f"{record['file_name']}: has annotations without masks, which this use needs; load the"
      " data with require_masks=True, which drops them."
    )
  rles = [mask_encoding.to_rle(s, height, width) for s in record["segmentations"]]
  return np.ascontiguousarray(mask_utils.decode(rles).transpose(2, 0, 1)).astype(bool)


class CocoSource(InstanceSource):
  """COCO-format data on disk; made by `load_coco` and `coco_root`.

  Holds flat arrays only, no images and no Python object per annotation, so that it is cheap to
  send to worker processes.

  Attributes:
    findings: what the checks of the annotation file and of the images counted.
    class_lists: of an LVIS file; records then have `negative_classes`, `not_exhaustive_classes`, int32 [k].
  """

  class_lists: class_lists_lib.ClassLists | None = None

  def __init__(
    self,
    read: Callable[[], Mapping[str, Any]],
    annotation_file: pathlib.Path,
    image_dir: pathlib.Path,
    table: coco_table.CocoTable,
    categories: tuple[dict[str, Any], ...],
    labelled: bool,
    require_masks: bool,
    found: findings.Findings,
    has_masks: bool,
  ):
    self._read = read
    self.annotation_file = annotation_file
    self.image_dir = image_dir
    self.categories = categories
    self.labelled = labelled
    self.has_masks = has_masks
    self.findings = found
    self._table = table
    self._require_masks = require_masks

  def __len__(self) -> int:
    return len(self._table)

  def __repr__(self) -> str:  # Grain writes it into its messages
    return f"CocoSource({self.annotation_file}, {len(self)} images, {self.num_classes} classes)"

  def __getstate__(self) -> dict[str, Any]:
    return {key: value for key, value in self.__dict__.items() if key != "ground_truth"}

  def identity(self) -> dict[str, Any]:
    """See `fingerprint.Identified`."""
    annotations = {field.name: getattr(self._table, field.name) for field in dataclasses.fields(self._table)}
    return {
      "file names": list(annotations.pop("file_names")),
      "annotations": annotations,
      "file sizes": fingerprint.file_sizes(self.files()),
      **({} if self.class_lists is None else {"class lists": dataclasses.asdict(self.class_lists)}),
    }

  def read(self, index: int) -> tuple[dict[str, Any], bytes]:
    record = self.record(index)
    return record, image_io.read_bytes(self.image_path(index))

  def where(self, index: int, record: Mapping[str, Any]) -> str:
    return str(self.image_path(index))

  def record(self, index: int) -> dict[str, Any]:
    """The record without "image"; touches no file."""
    record = self._table.record(_checked_index(index, len(self)))
    return record if self.class_lists is None else record | self.class_lists.record(record["image_id"])

  def image_path(self, index: int) -> pathlib.Path:
    return self.image_dir / self._table.file_names[_checked_index(index, len(self))]

  def files(self) -> list[pathlib.Path]:
    """The image of every record; see `data.content`."""
    return [self.image_path(index) for index in range(len(self))]

  def take(self, indices: Sequence[int]) -> Self:
    """The source of the images at these positions."""
    other = copy.copy(self)
    other.__dict__.pop("ground_truth", None)
    other.findings = copy.deepcopy(self.findings)
    other._table = self._table.take(np.asarray(indices, np.int64))
    return other

  @property
  def image_ids(self) -> Int64[np.ndarray, "m"]:
    return self._table.image_ids

  def objects_per_image(self) -> Int64[np.ndarray, "m"]:
    """How many annotations that are not crowds each image has."""
    return self._table.objects_per_image()

  def objects(self) -> tuple[Int32[np.ndarray, "m 2"], Int64[np.ndarray, "a"], Float32[np.ndarray, "a 4"]]:
    """(height, width) of every image; the image's position and the box of all annotations but crowds."""
    return self._table.sizes, *self._table.objects()

  def labelled_objects(self) -> tuple[Int64[np.ndarray, "a"], Int32[np.ndarray, "a"]]:
    """(position of the image, label) of all annotations but crowds."""
    return self._table.objects()[0], self._table.labels[~self._table.crowd]

  def counts(self) -> dict[str, int]:
    """Numbers for a summary: images, annotations, crowds, images without objects."""
    return {
      "images": len(self),
      "annotations": len(self._table.labels),
      "crowd": int(self._table.crowd.sum()),
      "images without objects": int((self.objects_per_image() == 0).sum()),
    }

  @functools.cached_property
  def ground_truth(self) -> dict[str, Any]:
    """The annotation file, parsed again, restricted to the source's images.

    Annotations are as in the file, unclipped, those with a box of zero size included, so that the
    official metrics of the file come out; without those that an evaluator cannot read, and with
    `id`, `area` and `iscrowd` filled in. `annotations` is empty for unlabelled images.
    """
    raw = self._read()
    problems = findings.Findings(checks.PROBLEMS)  # counted before
    rows = self._table.image_rows()
    entries = {}
    for entry in raw["images"]:
      if isinstance(entry, dict):
        entries.setdefault(checks.integer(entry.get("id")), entry)
    images = [{**entries[row.id], **dataclasses.asdict(row)} for row in rows]
    annotations = []
    for row in checks.read_annotations(
      raw, rows, self.categories, problems, require_masks=self._require_masks
    ):
      annotations.append(coco_conventions.evaluable(row, self.categories))
    return {
      "info": raw.get("info", {}),
      "licenses": raw.get("licenses", []),
      "images": images,
      "annotations": annotations,
      "categories": [dict(category) for category in self.categories],
    }


def _checked_index(index: int, length: int) -> int:
  if not 0 <= index < length:
    raise IndexError(f"image {index} of {length}.")
  return int(index)


def _all_dropped(raw: Mapping[str, Any], rows: Sequence[checks.ImageRow]) -> bool:
  """Whether annotations were expected: the whole file is in use, or some name these images."""
  if len(rows) == len(raw["images"]):
    return True
  kept = {row.id for row in rows}
  return any(
    isinstance(annotation, dict) and checks.integer(annotation.get("image_id")) in kept
    for annotation in raw["annotations"]
  )
