"""A small generated truth of LVIS's, and detections with everything that its metric treats in its own way."""

from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

_SIDE = 240
_CATEGORIES = 12
_MANY = 3  # the image with more detections than count


def truth(seed: int = 0) -> dict[str, Any]:
  """Eight images; every category is in few of them, and images say which others they were searched for."""
  rng = np.random.default_rng(seed)
  ids = [3 * i + 2 for i in range(_CATEGORIES)]
  images, annotations = [], []
  for image_id in range(10, 18):
    present = rng.choice(ids, 4, replace=False).tolist()
    absent = [identity for identity in ids if identity not in present]
    images.append(
      dict(
        id=image_id,
        height=_SIDE,
        width=_SIDE,
        neg_category_ids=rng.choice(absent, 3, replace=False).tolist(),
        not_exhaustive_category_ids=present[:2] if image_id % 2 else [],
      )
    )
    for category in present if image_id != 12 else ():  # one image without an object
      for _ in range(rng.integers(1, 4)):
        annotations.append(_object(rng, image_id, category) | dict(id=len(annotations) + 1))
  categories = [
    dict(id=identity, name=str(identity), frequency="rcf"[i % 3]) for i, identity in enumerate(ids)
  ]
  return dict(images=images, categories=categories, annotations=annotations)


def detections(truth: dict[str, Any], seed: int = 1) -> list[dict[str, Any]]:
  """Disturbed objects, objects of another class, and noise; none in one image and too many in another."""
  rng = np.random.default_rng(seed)
  ids = [category["id"] for category in truth["categories"]]
  found = []
  for annotation in truth["annotations"]:
    for disturbed in rng.uniform(0.0, 0.25, rng.integers(0, 3)):
      x, y, w, h = annotation["bbox"]
      box = np.array([x, y, w, h]) + rng.normal(0, disturbed, 4) * (w, h, w, h)
      found.append(_shape(annotation["image_id"], annotation["category_id"], np.abs(box)))
    if rng.random() < 0.3:
      found.append(_shape(annotation["image_id"], int(rng.choice(ids)), np.array(annotation["bbox"])))
  for image in truth["images"]:
    count = 320 if image["id"] == 10 + _MANY else 15
    found += [_object(rng, image["id"], int(category)) for category in rng.choice(ids, count)]
  scores = np.round(rng.random(len(found)), 2)  # many equal ones
  found = [row | dict(score=float(score)) for row, score in zip(found, scores)]
  for row in found:
    row.pop("area")
  return [row for row in found if row["image_id"] != 16]


def _object(rng: np.random.Generator, image_id: int, category: int) -> dict[str, Any]:
  side = rng.choice([12, 50, 120]) * rng.uniform(0.7, 1.3, 2)
  return _shape(image_id, category, np.concatenate([rng.uniform(0, _SIDE - side), side]))


def _shape(image_id: int, category: int, box: np.ndarray) -> dict[str, Any]:
  """An ellipse that fills the box."""
  x, y, w, h = np.round(box, 2).tolist()
  rows, columns = np.mgrid[:_SIDE, :_SIDE] + 0.5
  inside = ((columns - x - w / 2) / (w / 2 + 1e-9)) ** 2 + ((rows - y - h / 2) / (h / 2 + 1e-9)) ** 2 <= 1
  rle = mask_utils.encode(np.asfortranarray(inside.astype(np.uint8)))
  return dict(
    image_id=image_id,
    category_id=category,
    bbox=[x, y, w, h],
    area=float(mask_utils.area(rle)),
    segmentation=dict(size=[_SIDE, _SIDE], counts=rle["counts"].decode("ascii")),
  )
