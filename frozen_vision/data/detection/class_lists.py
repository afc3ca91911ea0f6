"""Which classes an image was searched for, as LVIS's files say (arXiv 1908.03195, section 2.3)."""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

from jaxtyping import Int32, Int64
import numpy as np

from frozen_vision import messages
from frozen_vision.data.detection import coco_annotations as checks

# Keys of an image in LVIS's files, and what records call their labels.
KEYS = {"neg_category_ids": "negative_classes", "not_exhaustive_category_ids": "not_exhaustive_classes"}


@dataclasses.dataclass(frozen=True)
class ClassLists:
  """Both lists of every image, as flat arrays, so that they are cheap to send to worker processes.

  Attributes:
    image_ids: in ascending order.
    starts: by name in records: labels of image i are starts[i] to starts[i + 1].
    labels: by name in records, ascending within an image.
  """

  image_ids: Int64[np.ndarray, "m"]
  starts: dict[str, np.ndarray]
  labels: dict[str, np.ndarray]

  def record(self, image_id: int) -> dict[str, Int32[np.ndarray, "_n"]]:
    """The labels that an image is known not to show, and those of which only some objects are marked."""
    row = int(np.searchsorted(self.image_ids, image_id))
    return {
      name: self.labels[name][starts[row] : starts[row + 1]].copy() for name, starts in self.starts.items()
    }

  def arrays(self) -> dict[str, np.ndarray]:
    """What the index of prepared data keeps; `from_arrays` reads it."""
    ends = {f"{name}_starts": starts for name, starts in self.starts.items()}
    return {"class_list_images": self.image_ids, **ends, **self.labels}


def from_arrays(index: Mapping[str, np.ndarray], num_classes: int) -> ClassLists | None:
  """The lists of `ClassLists.arrays`; None where there are none.

  Raises:
    ValueError: arrays that do not fit together.
  """
  if "class_list_images" not in index:
    return None
  ids, names = index["class_list_images"], tuple(KEYS.values())
  for name in names:
    starts, labels = index.get(f"{name}_starts"), index.get(name)
    fits = all(isinstance(x, np.ndarray) and x.ndim == 1 and x.dtype.kind == "i" for x in (starts, labels))
    fits = fits and len(starts) == len(ids) + 1 and starts[0] == 0 and starts[-1] == len(labels)
    if not fits or np.any(np.diff(starts) < 0) or np.any((labels < 0) | (labels >= num_classes)):
      raise ValueError(f"{name} of images do not fit them")
  return ClassLists(
    ids, {name: index[f"{name}_starts"] for name in names}, {name: index[name] for name in names}
  )


def read(
  raw: Mapping[str, Any],
  rows: Sequence[checks.ImageRow],
  categories: Sequence[Mapping[str, Any]],
  path: pathlib.Path,
) -> ClassLists | None:
  """The lists of the images of an annotation file; None where no image has any.

  Args:
    raw: the parsed file.
    rows: its usable images.
    categories: the label space.
    path: of the file, for errors.

  Raises:
    CocoError: an image without both lists where others have them, or a list that is none of category ids.
  """
  wanted = {row.id for row in rows}
  entries = {}
  for entry in raw["images"]:
    identity = checks.integer(entry.get("id")) if isinstance(entry, dict) else None
    if identity in wanted:
      entries.setdefault(identity, entry)
  if not any(key in entry for entry in entries.values() for key in KEYS):
    return None
  label_of = {category["id"]: label for label, category in enumerate(categories)}
  ids = sorted(entries)
  starts, labels = {}, {}
  for key, name in KEYS.items():
    found = []
    for identity in ids:
      listed = entries[identity].get(key)
      if not isinstance(listed, list) or not all(isinstance(x, int) and x in label_of for x in listed):
        raise checks.CocoError(
          f"{path}: image {identity} has {key} = {messages.short(listed)}; expected a list of ids of its "
          "'categories', as in every image of an LVIS file."
        )
      found.append(sorted({label_of[x] for x in listed}))
    starts[name] = np.cumsum([0, *map(len, found)])
    labels[name] = np.array([label for row in found for label in row], np.int32)
  return ClassLists(np.array(ids, np.int64), starts, labels)
