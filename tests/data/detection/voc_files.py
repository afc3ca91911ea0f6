"""Tiny folders in PASCAL VOC's layout."""

import pathlib

import numpy as np
from PIL import Image

# (class, xmin, ymin, xmax, ymax, difficult): inclusive pixels from 1, as the files have them.
Object = tuple[str, float, float, float, float, int]


def write(folder: pathlib.Path, lists: dict[str, dict[str, list[Object]]], *, side: int = 64) -> pathlib.Path:
  """Writes one year.

  Args:
    folder: such as VOCdevkit/VOC2007.
    lists: {split: {image: objects}}.
  """
  rng = np.random.default_rng(0)
  for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
    (folder / name).mkdir(parents=True, exist_ok=True)
  for split, images in lists.items():
    (folder / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in images))
    for name, objects in images.items():
      pixels = rng.integers(0, 60, (side, side, 3), np.uint8)
      for _, left, top, right, bottom, _ in objects:
        pixels[int(top) - 1 : int(bottom), int(left) - 1 : int(right)] += 150
      Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg")
      (folder / "Annotations" / f"{name}.xml").write_text(xml(name, objects, side))
  return folder


def xml(name: str, objects: list[Object], side: int = 64) -> str:
  """An annotation as VOC writes it; the person in it has parts with boxes of their own."""
  return (
    f"<annotation><folder>VOC</folder><filename>{name}.jpg</filename>"
    f"<size><width>{side}</width><height>{side}</height><depth>3</depth></size>"
    + "".join(
      f"<object><name>{label}</name><pose>Left</pose><truncated>0</truncated><difficult>{difficult}</difficult>"
      f"<bndbox><xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox>"
      + (
        "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
        if label == "person"
        else ""
      )
      + "</object>"
      for label, left, top, right, bottom, difficult in objects
    )
    + "</annotation>"
  )


def devkit(root: pathlib.Path) -> pathlib.Path:
  """VOC2007 with trainval and test, and VOC2012 with trainval."""
  write(
    root / "VOC2007",
    {
      "trainval": {
        "000005": [("chair", 5, 7, 30, 40, 0), ("person", 31, 5, 60, 50, 1)],
        "000007": [("car", 1, 1, 64, 64, 0)],
        "000009": [("dog", 10, 10, 20, 20, 1)],
      },
      "test": {"000001": [("dog", 8, 12, 50, 52, 0), ("person", 2, 2, 20, 30, 1)], "000002": []},
    },
  )
  write(root / "VOC2012", {"trainval": {"2007_000027": [("person", 20.5, 11, 40.25, 60, 0)]}})
  return root
