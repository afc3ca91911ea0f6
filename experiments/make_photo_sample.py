"""Makes the photographs that ship with the package, frozen_vision/data/detection/photos/, from COCO.

All images under CC BY 2.0 or without known copyright restrictions are taken that have a Flickr link, and none
under another licence. Annotations are scaled with the images.

    python experiments/make_photo_sample.py --coco=../shared/data/coco_subset

Needs Pillow and pycocotools. The JPEG bytes depend on Pillow's version (made with 13.0).
"""

import argparse
import json
import pathlib
import shutil

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

LONG_SIDE = 320
QUALITY = 85
# COCO's `license` ids whose images may be redistributed here: name and text of the licence.
ALLOWED = {
  4: ("CC BY 2.0", "https://creativecommons.org/licenses/by/2.0/"),
  7: ("No known copyright restrictions", "https://www.flickr.com/commons/usage/"),
}
# Image ids that come first, the others behind them by split and id: people, animals, vehicles, food;
# furniture; near and far; one in grey.
FIRST = (
  *(204805, 234748, 352257, 358083, 458756, 491525, 516008),
  *(126107, 160012, 165518, 214753, 377575, 423617, 475678, 519208),
)
OUTPUT = pathlib.Path(__file__).resolve().parent.parent / "frozen_vision" / "data" / "detection" / "photos"


def scaled_annotation(annotation: dict, old: dict, width: int, height: int) -> dict:
  """Scales the polygons or RLE of a COCO annotation; box and area follow from the record's own."""
  sx, sy = width / old["width"], height / old["height"]
  segmentation = annotation["segmentation"]
  if isinstance(segmentation, list):
    scaled = [
      [round(x * (sx if i % 2 == 0 else sy), 2) for i, x in enumerate(polygon)] for polygon in segmentation
    ]
  else:
    if isinstance(segmentation["counts"], list):
      segmentation = coco_mask.frPyObjects(segmentation, old["height"], old["width"])
    # Box-filtered coverage at one half keeps the area of a mask that is mostly larger than a pixel.
    mask = Image.fromarray(coco_mask.decode(segmentation) * np.uint8(255))
    mask = np.asarray(mask.resize((width, height), Image.Resampling.BOX)) >= 128
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    scaled = dict(size=[height, width], counts=rle["counts"].decode("ascii"))
  x, y, w, h = annotation["bbox"]
  return {
    **annotation,
    "segmentation": scaled,
    "bbox": [round(v, 2) for v in (x * sx, y * sy, w * sx, h * sy)],
    "area": round(annotation["area"] * sx * sy, 2),
  }


def allowed(sources: dict[str, dict]) -> list[tuple[str, dict]]:
  """(split, record) of every image that may be redistributed, those of `FIRST` first."""
  found = [
    (split, record)
    for split, source in sources.items()
    for record in sorted(source["images"], key=lambda record: record["id"])
    if record["license"] in ALLOWED and record.get("flickr_url")
  ]
  places = {image_id: place for place, image_id in enumerate(FIRST)}
  return sorted(found, key=lambda item: places.get(item[1]["id"], len(FIRST)))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--coco", type=pathlib.Path, required=True, help="folder in COCO's layout")
  coco = parser.parse_args().coco
  sources = {
    split: json.loads((coco / "annotations" / f"instances_{split}.json").read_text())
    for split in ("train2017", "val2017")
  }
  shutil.rmtree(OUTPUT, ignore_errors=True)
  (OUTPUT / "images").mkdir(parents=True)
  images, annotations, rows = [], [], []
  for split, record in allowed(sources):
    image_id = record["id"]
    with Image.open(coco / split / record["file_name"]) as file:
      image = file.convert("RGB")
    if image.size != (record["width"], record["height"]):
      raise ValueError(f"{record['file_name']} is {image.size}, its record says otherwise.")
    scale = LONG_SIDE / max(image.size)
    width, height = (round(side * scale) for side in image.size)
    # A fresh save drops EXIF, thumbnails and other metadata of the original.
    image.resize((width, height), Image.Resampling.LANCZOS).save(
      OUTPUT / "images" / record["file_name"], quality=QUALITY, optimize=True
    )
    keys = ("id", "file_name", "license", "flickr_url", "coco_url", "date_captured")
    images.append({key: record[key] for key in keys} | dict(width=width, height=height))
    annotations += [
      scaled_annotation(a, record, width, height)
      for a in sources[split]["annotations"]
      if a["image_id"] == image_id
    ]
    name, url = ALLOWED[record["license"]]
    rows.append(
      f"| `{record['file_name']}` | {image_id} ({split}) | <{record['flickr_url']}> "
      f"| [{name}]({url}) | shrunk to {width}x{height} |"
    )
  licenses = [item for item in sources["train2017"]["licenses"] if item["id"] in ALLOWED]
  info = dict(
    description="Photographs from COCO 2017, shrunk, with annotations scaled; see ATTRIBUTION.md",
    url="https://cocodataset.org",
    contributor="COCO Consortium (annotations, CC BY 4.0)",
    version="1",
  )
  categories = sources["train2017"]["categories"]
  data = dict(info=info, licenses=licenses, images=images, annotations=annotations, categories=categories)
  (OUTPUT / "instances.json").write_text(json.dumps(data, separators=(",", ":")) + "\n")
  (OUTPUT / "ATTRIBUTION.md").write_text(ATTRIBUTION.format(rows="\n".join(rows)))


ATTRIBUTION = """# Photographs and annotations in this folder

The photographs come from Flickr through [COCO](https://cocodataset.org) 2017 and are not covered by
the licence of the software. Each was shrunk to 320 pixels on its longer side, re-encoded as JPEG
and stripped of metadata; nothing else was changed. Each belongs to the Flickr member who published
it at the address given; none of them endorses this software or its use.

The annotations in `instances.json` are those of COCO, credited to the COCO Consortium, under
[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/); coordinates, boxes, masks and areas were
scaled with the images. `experiments/make_photo_sample.py` made this folder.

| file | COCO image id | Flickr | licence | changes |
|---|---|---|---|---|
{rows}
"""


if __name__ == "__main__":
  main()
