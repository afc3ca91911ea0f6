"""PASCAL VOC detection data, read straight from disk: an XML for every image, a list for every split.

The layout is that of VOCdevkit, of VOC2007 and VOC2012 and of what labelling programs write alike:

    ROOT/VOC2007/Annotations/000005.xml     or, with one year only, ROOT/Annotations/...
    ROOT/VOC2007/ImageSets/Main/trainval.txt
    ROOT/VOC2007/JPEGImages/000005.jpg

Boxes in the files are inclusive and count pixels from 1; here they are xywh in pixels from 0, as COCO has
them. Objects that are marked difficult are crowds for COCO's metrics, which neither reward nor punish finding
them, and are ignored likewise by VOC's (`metrics.voc_ap`).
"""

from collections.abc import Sequence
import functools
import os
import pathlib
import re
from typing import Any, Literal
from xml.etree import ElementTree

from frozen_vision.data import classes, text_files
from frozen_vision.data import images as image_io
from frozen_vision.data import names as data_names
from frozen_vision.data.detection import coco
from frozen_vision.messages import short

HOW_TO_GET = (
  "Download VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar from "
  "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/, and VOCtrainval_11-May-2012.tar from .../VOC/voc2012/, "
  "unpack them into one folder, and give its VOCdevkit with --config.detection.root=FOLDER."
)
# How the average precision of a year was measured; a data set's `info` says it under this key.
AP_KEY = "average_precision"
AveragePrecision = Literal["11_points", "area"]
_LARGEST_XML = 2**24
_NUMBERED = re.compile(r"\d+(_\d+)?")
_SIDES = ("xmin", "ymin", "xmax", "ymax")


def load_voc(
  root: str | os.PathLike[str],
  splits: Sequence[str],
  *,
  class_names: Sequence[str] = classes.VOC,
  difficult: Literal["object", "crowd"] = "crowd",
  average_precision: AveragePrecision | Literal["auto"] = "auto",
  **options: Any,
) -> coco.CocoSource:
  """Opens splits of VOC's layout as one source.

  Args:
    root: VOCdevkit, or the folder of one year.
    splits: such as "2007_trainval" and "2012_trainval": the year of a folder VOCYEAR, and the name of a list
      in its ImageSets/Main; of a root that is such a folder itself, the name alone.
    class_names: the classes; label i is the i-th, its category id i + 1.
    difficult: what difficult objects are: "object" trains on them, as detectron2's loader does; "crowd" does
      not, and is what evaluation needs.
    average_precision: how VOC measures these data. "auto": 11 points of recall where all splits are of 2007,
      else the area under the curve, which VOC took from 2010 on.
    **options: of `coco.load_coco`.

  Raises:
    FileNotFoundError: no such folder, list or annotation.
    CocoError: a file that cannot be used, or an object of another class; names the file.
  """
  root = pathlib.Path(root)
  if average_precision == "auto":
    is_2007 = all(split.startswith("2007_") or root.name == "VOC2007" for split in splits)
    average_precision = "11_points" if is_2007 else "area"
  read = functools.partial(
    _read, root, tuple(splits), tuple(class_names), difficult == "crowd", average_precision
  )
  return coco.open_annotations(read, root, root, **{"require_masks": False, **options})


def _read(
  root: pathlib.Path, splits: Sequence[str], class_names: Sequence[str], as_crowds: bool, measure: str
) -> dict[str, Any]:
  """All annotations of the splits as the content of a COCO file."""
  if not splits:
    raise coco.CocoError(f"{root}: no split is given; expected some such as 2007_trainval.")
  listed = [(folder, name) for split in splits for folder, name in _listed(root, split)]
  ids = _ids(listed)
  files = {folder: _images(folder / "JPEGImages") for folder, _ in listed}
  labels = {name: label + 1 for label, name in enumerate(class_names)}
  images, annotations = [], []
  for (folder, name), image_id in zip(listed, ids):
    path = folder / "Annotations" / f"{name}.xml"
    entry, objects = _read_xml(path, labels, as_crowds)
    file = files[folder].get(name, f"{name}.jpg")
    image = {"id": image_id, "file_name": (folder / "JPEGImages" / file).relative_to(root).as_posix()}
    images.append(image | entry)
    for one in objects:
      annotations.append({"id": len(annotations) + 1, "image_id": image_id, **one})
  return {
    "info": {"description": f"PASCAL VOC {', '.join(splits)}", AP_KEY: measure},
    "images": images,
    "annotations": annotations,
    "categories": [{"id": label, "name": name} for name, label in labels.items()],
  }


def _listed(root: pathlib.Path, split: str) -> list[tuple[pathlib.Path, str]]:
  """(folder of the year, name of the image) of everything in a split's list."""
  year, _, name = split.rpartition("_")
  folder = root / f"VOC{year}" if year and (root / f"VOC{year}").is_dir() else root
  if year and folder == root and root.name != f"VOC{year}":
    name = split  # a name with an underscore
  path = folder / "ImageSets" / "Main" / f"{name}.txt"
  if not path.is_file():
    there = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt") if "_" not in p.stem)) or "no lists"
    raise FileNotFoundError(
      f"{path}: no such list of images, which the split {split!r} is read from; {path.parent} has {there}. "
      "Expected VOC's layout: ImageSets/Main, Annotations and JPEGImages below a folder VOCYEAR. "
      f"{HOW_TO_GET}"
    )
  try:
    lines = text_files.read_text(path).split("\n")
  except text_files.TextError as error:
    raise coco.CocoError(str(error)) from error
  found = [line.split()[0] for line in lines if line.split()]  # a class's list has 1 or -1 behind the name
  if not found:
    raise coco.CocoError(f"{path}: lists no images.")
  for name in found:
    data_names.require_inside(name, f"{path}, image {name!r},")
  return [(folder, name) for name in dict.fromkeys(found)]


def _ids(listed: Sequence[tuple[pathlib.Path, str]]) -> list[int]:
  """Image ids: the year and the digits of a VOC name, so that they last; else numbers from 1."""
  ids = [
    int(re.sub(r"\D", "", folder.name + name)) if _NUMBERED.fullmatch(name) and len(name) < 12 else 0
    for folder, name in listed
  ]
  return ids if len(set(ids)) == len(ids) and all(ids) else list(range(1, len(ids) + 1))


def _images(folder: pathlib.Path) -> dict[str, str]:
  """{name without ending: file} of the images in a folder."""
  if not folder.is_dir():
    raise FileNotFoundError(f"{folder}: no such folder of images. {HOW_TO_GET}")
  return {
    path.relative_to(folder).with_suffix("").as_posix(): path.relative_to(folder).as_posix()
    for path in data_names.files_below(folder)
    if path.suffix.lower() in image_io.SUFFIXES
  }


def _read_xml(
  path: pathlib.Path, labels: dict[str, int], as_crowds: bool
) -> tuple[dict[str, int], list[dict[str, Any]]]:
  """(height and width, if the file has usable ones; the objects as COCO's annotations) of a file."""
  if not path.is_file():
    raise FileNotFoundError(
      f"{path}: no such annotation of a listed image. (Annotations of the test images of VOC2012 were never "
      "published.)"
    )
  data = path.read_bytes() if path.stat().st_size <= _LARGEST_XML else b"<!ENTITY"
  if b"<!ENTITY" in data or b"<!DOCTYPE" in data:
    raise coco.CocoError(
      f"{path}: is larger than 16 MiB or declares entities; expected a plain VOC annotation."
    )
  try:
    tree = ElementTree.fromstring(data)
  except (ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: an unknown encoding
    raise coco.CocoError(f"{path}: is no readable XML ({error}).") from error
  if tree.tag != "annotation":
    raise coco.CocoError(
      f"{path}: is an XML of {short(tree.tag)}; expected VOC's, with `annotation` around an image's objects."
    )
  entry = {}
  height, width = (_number(tree.find(f"size/{side}")) for side in ("height", "width"))
  if height and width:
    entry = {"height": int(height), "width": int(width)}
  objects = [
    _object(element, f"{path}, object {number}", labels, as_crowds)
    for number, element in enumerate(tree.findall("object"), start=1)
  ]
  return entry, objects


def _object(
  element: ElementTree.Element, where: str, labels: dict[str, int], as_crowds: bool
) -> dict[str, Any]:
  name = (element.findtext("name") or "").strip()
  if name not in labels:
    raise coco.CocoError(
      f"{where}: is of the class {short(name)}; known: {', '.join(labels)}. Give the classes of your data, a "
      "JSON list, with --config.detection.voc.classes=FILE."
    )
  sides = [_number(element.find(f"bndbox/{side}")) for side in _SIDES]
  difficult = _number(element.find("difficult")) == 1
  annotation = {"category_id": labels[name], "difficult": int(difficult)}
  annotation["iscrowd"] = int(difficult and as_crowds)
  if None in sides:
    # Without a box; the checks of COCO's files count it and say so.
    return annotation | {"bbox": [element.findtext(f"bndbox/{side}") for side in _SIDES]}
  left, top, right, bottom = sides
  width, height = right - left + 1, bottom - top + 1
  return annotation | {
    "bbox": [left - 1, top - 1, width, height],
    "area": max(width, 0.0) * max(height, 0.0),
  }


def _number(element: ElementTree.Element | None) -> float | None:
  """The number in an element, which some annotations write with decimals; None where there is none."""
  try:
    value = float((element.text or "").strip()) if element is not None else None
  except ValueError:
    return None
  return value if value is not None and abs(value) < 1e9 else None  # NaN is not
