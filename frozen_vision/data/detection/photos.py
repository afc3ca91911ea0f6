"""The small sample of real photographs that ships with the package.

50 photographs of COCO under CC BY 2.0 or without known copyright restrictions, at most 320 pixels
wide or high, with COCO's instance annotations for all 80 categories, scaled alike. Authors and
licences: `photos/ATTRIBUTION.md`. Good for a first look at real pictures, too few for a score to compare.
"""

import json
import pathlib
from typing import NamedTuple


class SamplePhotos(NamedTuple):
  """Paths of the sample: a COCO instances JSON, and the folder of the files that it names."""

  annotations: pathlib.Path
  images: pathlib.Path


def sample_photos() -> SamplePhotos:
  """Paths of the annotations and of the image folder.

  Raises:
    FileNotFoundError: when the package was installed without its data files.
  """
  folder = pathlib.Path(__file__).resolve().parent / "photos"
  paths = SamplePhotos(annotations=folder / "instances.json", images=folder / "images")
  for path in paths:
    if not path.exists():
      raise FileNotFoundError(
        f"{path} is absent: this installation lacks the package's data files. Install "
        "frozen_vision again, from a full checkout or a built wheel."
      )
  return paths


def split_ids() -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Image ids of the sample to train on (34), and to validate on (16, every third).

  Raises:
    FileNotFoundError: when the package was installed without its data files.
  """
  ids = [image["id"] for image in json.loads(sample_photos().annotations.read_text())["images"]]
  return tuple(i for place, i in enumerate(ids) if place % 3 != 2), tuple(ids[2::3])
