"""The shipped photographs: licences, attribution, and annotations that fit the shrunk images."""

import json
import pathlib

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
import pytest

from frozen_vision.data.detection import photos
from tests import paths

LICENCES = {4: "CC BY 2.0", 7: "No known copyright restrictions"}


@pytest.fixture(scope="module")
def sample():
  found = photos.sample_photos()
  return json.loads(found.annotations.read_text()), found.images


def masks_of(annotation, image):
  segmentation = annotation["segmentation"]
  if isinstance(segmentation, list):
    segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, image["height"], image["width"]))
  return coco_mask.decode(segmentation).astype(bool)


def test_every_shipped_image_is_attributed_under_a_free_licence(sample):
  data, folder = sample
  shipped = sorted(path.name for path in folder.iterdir())
  assert shipped == sorted(image["file_name"] for image in data["images"])
  assert len(shipped) == 50
  rows = [
    line for line in (folder.parent / "ATTRIBUTION.md").read_text().splitlines() if line.startswith("| `")
  ]
  assert len(rows) == len(shipped)
  for image in data["images"]:
    assert image["license"] in LICENCES, image
    (row,) = [row for row in rows if f"`{image['file_name']}`" in row]
    assert image["flickr_url"].startswith("http") and f"<{image['flickr_url']}>" in row
    assert f"| {image['id']} (" in row
    assert f"[{LICENCES[image['license']]}](https://" in row
    assert "shrunk" in row
  text = (folder.parent / "ATTRIBUTION.md").read_text()
  assert "COCO Consortium" in text and "https://creativecommons.org/licenses/by/4.0/" in text


def test_licences_are_those_of_the_source(sample):
  data, _ = sample
  root = paths.data_dir("coco_subset")
  source = {}
  for split in ("train2017", "val2017"):
    loaded = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
    source.update({image["id"]: image for image in loaded["images"]})
  for image in data["images"]:
    for key in ("license", "flickr_url", "file_name"):
      assert image[key] == source[image["id"]][key]


def test_the_folder_is_small_and_images_have_their_recorded_size(sample):
  data, folder = sample
  files = [path for path in folder.parent.rglob("*") if path.is_file()]
  assert sum(path.stat().st_size for path in files) <= 1600 * 1024
  for image in data["images"]:
    with Image.open(folder / image["file_name"]) as file:
      assert file.mode == "RGB" and file.size == (image["width"], image["height"])
      assert max(file.size) == 320
      assert not file.getexif()


def test_annotations_fit_the_shrunk_images(sample):
  data, _ = sample
  images = {image["id"]: image for image in data["images"]}
  categories = {category["id"] for category in data["categories"]}
  assert len(categories) == 80
  assert len({annotation["id"] for annotation in data["annotations"]}) == len(data["annotations"])
  empty = set(images) - {annotation["image_id"] for annotation in data["annotations"]}
  assert empty == {58636, 226111}  # as in COCO
  assert len({annotation["category_id"] for annotation in data["annotations"]}) >= 20
  errors = {}
  for annotation in data["annotations"]:
    image = images[annotation["image_id"]]
    assert annotation["category_id"] in categories
    x, y, w, h = annotation["bbox"]
    assert w >= 1 and h >= 1
    assert x >= 0 and y >= 0 and x + w <= image["width"] + 0.05 and y + h <= image["height"] + 0.05
    mask = masks_of(annotation, image)
    assert mask.any()
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    tight = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    errors[annotation["id"]] = np.abs(tight - [x, y, x + w, y + h]).max()
    # Areas of polygons and of rasterised masks differ along the border, by half a pixel of it.
    assert abs(mask.sum() - annotation["area"]) <= 4 + 0.75 * (w + h) + 0.1 * annotation["area"]
  # Parts of objects that are thinner than a pixel are in a box and not in a mask.
  assert sum(error > 2 for error in errors.values()) <= 0.01 * len(errors)


def test_a_missing_sample_is_a_clear_error(monkeypatch, tmp_path):
  monkeypatch.setattr(photos, "__file__", str(tmp_path / "photos.py"))
  with pytest.raises(FileNotFoundError, match="lacks the package's data files"):
    photos.sample_photos()


def test_every_photograph_is_trained_or_validated_on(sample):
  train, validation = photos.split_ids()
  assert len(train) == 34 and len(validation) == 16
  assert set(train) | set(validation) == {image["id"] for image in sample[0]["images"]}


def test_paths_are_plain(sample):
  found = photos.sample_photos()
  assert isinstance(found.annotations, pathlib.Path) and found.annotations.is_file()
  assert found.images.is_dir()
