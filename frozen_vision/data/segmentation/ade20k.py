"""ADE20K for semantic segmentation, the scene parsing benchmark's 150 classes (Zhou et al. 2017)."""

import os
import pathlib

from frozen_vision.data.segmentation import label_maps, sources

SPLITS = ("training", "validation")

# Row i of the benchmark's objectInfo150.txt, the first of its synonyms: label i + 1 in the files.
CLASS_NAMES = (
  "wall",
  "building",
  "sky",
  "floor",
  "tree",
  "ceiling",
  "road",
  "bed",
  "windowpane",
  "grass",
  "cabinet",
  "sidewalk",
  "person",
  "earth",
  "door",
  "table",
  "mountain",
  "plant",
  "curtain",
  "chair",
  "car",
  "water",
  "painting",
  "sofa",
  "shelf",
  "house",
  "sea",
  "mirror",
  "rug",
  "field",
  "armchair",
  "seat",
  "fence",
  "desk",
  "rock",
  "wardrobe",
  "lamp",
  "bathtub",
  "railing",
  "cushion",
  "base",
  "box",
  "column",
  "signboard",
  "chest of drawers",
  "counter",
  "sand",
  "sink",
  "skyscraper",
  "fireplace",
  "refrigerator",
  "grandstand",
  "path",
  "stairs",
  "runway",
  "case",
  "pool table",
  "pillow",
  "screen door",
  "stairway",
  "river",
  "bridge",
  "bookcase",
  "blind",
  "coffee table",
  "toilet",
  "flower",
  "book",
  "hill",
  "bench",
  "countertop",
  "stove",
  "palm",
  "kitchen island",
  "computer",
  "swivel chair",
  "boat",
  "bar",
  "arcade machine",
  "hovel",
  "bus",
  "towel",
  "light",
  "truck",
  "tower",
  "chandelier",
  "awning",
  "streetlight",
  "booth",
  "television receiver",
  "airplane",
  "dirt track",
  "apparel",
  "pole",
  "land",
  "bannister",
  "escalator",
  "ottoman",
  "bottle",
  "buffet",
  "poster",
  "stage",
  "van",
  "ship",
  "fountain",
  "conveyer belt",
  "canopy",
  "washer",
  "plaything",
  "swimming pool",
  "stool",
  "barrel",
  "basket",
  "waterfall",
  "tent",
  "bag",
  "minibike",
  "cradle",
  "oven",
  "ball",
  "food",
  "step",
  "tank",
  "trade name",
  "microwave",
  "pot",
  "animal",
  "bicycle",
  "lake",
  "dishwasher",
  "screen",
  "blanket",
  "sculpture",
  "hood",
  "sconce",
  "vase",
  "traffic light",
  "tray",
  "ashcan",
  "fan",
  "pier",
  "crt screen",
  "plate",
  "monitor",
  "bulletin board",
  "shower",
  "radiator",
  "glass",
  "clock",
  "flag",
)

# 0 is "other objects": neither trained on nor scored.
FORMAT = label_maps.LabelFormat(
  CLASS_NAMES, values=tuple(range(1, len(CLASS_NAMES) + 1)), ignored=(0, label_maps.IGNORE)
)

HOW_TO_GET = (
  "Download ADEChallengeData2016.zip from http://data.csail.mit.edu/places/ADEchallenge/, unpack it and "
  "give the folder that holds images/ and annotations/."
)


def ade20k_root(
  root: str | os.PathLike[str], split: str, *, unlabelled: str = "error"
) -> sources.LabelledImages:
  """Opens a split of the official layout.

  Args:
    root: holds `images/{split}/*.jpg` and `annotations/{split}/*.png`.
    split: "training" or "validation".
    unlabelled: of `LabelledImages`.

  Raises:
    FileNotFoundError: no such folder; says how to get the data.
    ValueError: an unknown split, or as `LabelledImages` raises.
  """
  if split not in SPLITS:
    raise ValueError(f"split is {split!r}; expected one of {SPLITS}.")
  root = pathlib.Path(root)
  folders = root / "images" / split, root / "annotations" / split
  for folder in folders:
    if not folder.is_dir():
      raise FileNotFoundError(f"{folder} is not a folder, so {root} is not ADE20K's. {HOW_TO_GET}")
  return sources.LabelledImages(*folders, FORMAT, unlabelled=unlabelled)
