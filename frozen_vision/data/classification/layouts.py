"""Reads classification sets in the layouts that their authors publish.

Each function takes the folder that holds the files which `benchmarks` names, and gives the parts of the set:
{"train": source, "test": source}, with "validation" where the authors define one, or {"all": source} where
nothing is split.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import csv
import functools
import pathlib
from typing import Any

from jaxtyping import Int64
import numpy as np
from scipy import io as scipy_io

from frozen_vision.data import classes as class_names
from frozen_vision.data import names as file_names
from frozen_vision.data import text_files
from frozen_vision.data.classification import cifar, folders, listed

Parts = dict[str, Any]  # sources of records by the name of the part

CALTECH_TRAIN_IMAGES = 30  # of every class
CHESTX_CLASSES = ("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumothorax")
_LARGEST = 10_000_000  # number of an image or a class
_SPLITS = {"train": "train", "val": "validation", "test": "test"}


def aircraft(root: pathlib.Path) -> Parts:
  """FGVC-Aircraft: classes are the 100 variants."""
  classes = [line for _, line in _lines(root / "data" / "variants.txt")]
  parts = {}
  for split, part in _SPLITS.items():
    path = root / "data" / f"images_variant_{split}.txt"
    pairs = [_cells(line, 2, path, number, "IMAGE VARIANT") for number, line in _lines(path)]
    found = [file_names.require_inside(f"{name}.jpg", str(path)) for name, _ in pairs]
    labels = _numbers([variant for _, variant in pairs], classes, path)
    parts[part] = listed.ListedImages(root / "data" / "images", found, labels, classes)
  return parts


def caltech101(root: pathlib.Path) -> Parts:
  """Caltech-101: 30 images of each class, drawn with a fixed seed, train; all others test.

  The background is a class, as in arXiv 2011.13377. That paper's own list draws with replacement and has
  between 17 and 30 different images of a class.
  """
  root = root / "101_ObjectCategories"
  source = folders.ImageFolder(root)
  train: list[int] = []
  for label in range(len(source.classes)):
    members = np.flatnonzero(source.labels == label)
    drawn = np.random.default_rng(label).permutation(members)[:CALTECH_TRAIN_IMAGES]
    if len(drawn) == len(members):
      raise ValueError(
        f"{root / source.classes[label]} has {len(members)} images; expected more than the "
        f"{CALTECH_TRAIN_IMAGES} that are trained on. Unpack 101_ObjectCategories.tar.gz again."
      )
    train += drawn.tolist()
  test = np.setdiff1d(np.arange(len(source)), train)
  return {"train": _chosen(root, source, np.sort(train)), "test": _chosen(root, source, test)}


def cars(root: pathlib.Path) -> Parts:
  """Stanford Cars."""
  devkit = root / "devkit"
  tested = devkit / "cars_test_annos_withlabels.mat"
  tested = tested if tested.is_file() else root / tested.name
  classes = [str(name) for name in np.atleast_1d(_mat(devkit / "cars_meta.mat", "class_names"))]
  parts = {}
  for part, path, folder in (
    ("train", devkit / "cars_train_annos.mat", "cars_train"),
    ("test", tested, "cars_test"),
  ):
    annotations = np.atleast_1d(_mat(path, "annotations"))
    if annotations.dtype.names is None or not {"fname", "class"} <= set(annotations.dtype.names):
      raise ValueError(f"{path} has no fields `fname` and `class` in `annotations`; download it again.")
    found = [file_names.require_inside(str(name), str(path)) for name in annotations["fname"]]
    labels = _from_one(annotations["class"], len(classes), path)
    parts[part] = listed.ListedImages(root / folder, found, labels, classes)
  return parts


def cifar10_python(root: pathlib.Path) -> Parts:
  """CIFAR-10 as Python pickles."""
  read = functools.partial(cifar.read_pickle, key="labels")
  classes = cifar.read_names(root / "batches.meta", key="label_names")
  return _cifar(read, [root / f"data_batch_{number}" for number in range(1, 6)], root / "test_batch", classes)


def cifar10_binary(root: pathlib.Path) -> Parts:
  """CIFAR-10 in binary."""
  read = functools.partial(cifar.read_binary, labels=1)
  train = [root / f"data_batch_{number}.bin" for number in range(1, 6)]
  return _cifar(read, train, root / "test_batch.bin", cifar.read_names(root / "batches.meta.txt"))


def cifar100_python(root: pathlib.Path) -> Parts:
  """CIFAR-100 as Python pickles, with its fine labels."""
  read = functools.partial(cifar.read_pickle, key="fine_labels")
  classes = cifar.read_names(root / "meta", key="fine_label_names")
  return _cifar(read, [root / "train"], root / "test", classes)


def cifar100_binary(root: pathlib.Path) -> Parts:
  """CIFAR-100 in binary, with its fine labels."""
  read = functools.partial(cifar.read_binary, labels=2)
  classes = cifar.read_names(root / "fine_label_names.txt")
  return _cifar(read, [root / "train.bin"], root / "test.bin", classes)


def dtd(root: pathlib.Path) -> Parts:
  """Describable Textures, split 1; a class is the folder of an image."""
  lists = {part: root / "labels" / f"{split}1.txt" for split, part in _SPLITS.items()}
  return _by_folder(root / "images", lists)


def flowers(root: pathlib.Path) -> Parts:
  """Oxford Flowers 102; classes have no names in it, but numbers."""
  labels_file, splits_file = root / "imagelabels.mat", root / "setid.mat"
  labels = _whole(_mat(labels_file, "labels"), "labels", labels_file)
  if labels.max() > len(labels):
    raise ValueError(
      f"{labels_file} has {len(labels)} images and the class {labels.max()}; expected an image of every "
      "class. Download it again."
    )
  classes = [f"class {number}" for number in range(1, 1 + int(labels.max()))]
  parts = {}
  for split, part in (("trnid", "train"), ("valid", "validation"), ("tstid", "test")):
    chosen = _whole(_mat(splits_file, split), split, splits_file)
    if chosen.min() < 1 or chosen.max() > len(labels):
      raise ValueError(
        f"{splits_file} names image {chosen.max()}, but {labels_file} has {len(labels)} labels; "
        "download both again."
      )
    found = [f"image_{number:05d}.jpg" for number in chosen]
    parts[part] = listed.ListedImages(
      root / "jpg", found, _from_one(labels[chosen - 1], len(classes), labels_file), classes
    )
  return parts


def food(root: pathlib.Path) -> Parts:
  """Food-101."""
  lists = {"train": root / "meta" / "train.txt", "test": root / "meta" / "test.txt"}
  classes = [line for _, line in _lines(root / "meta" / "classes.txt")]
  return _by_folder(root / "images", lists, ending=".jpg", classes=classes)


def pets(root: pathlib.Path) -> Parts:
  """Oxford-IIIT Pets; the class is the breed, which is the image's name up to its number."""
  found = {}
  for part, path in (("train", "trainval.txt"), ("test", "test.txt")):
    path = root / "annotations" / path
    rows = [
      _cells(line, 4, path, number, "IMAGE CLASS SPECIES BREED")
      for number, line in _lines(path)
      if not line.startswith("#")
    ]
    found[part] = path, [file_names.require_inside(row[0], str(path)) for row in rows]
  breeds = {part: [name.rpartition("_")[0] for name in rows] for part, (_, rows) in found.items()}
  classes = sorted(set(breeds["train"]), key=str.lower)
  return {
    part: listed.ListedImages(
      root / "images", [f"{name}.jpg" for name in rows], _numbers(breeds[part], classes, path), classes
    )
    for part, (path, rows) in found.items()
  }


def sun397(root: pathlib.Path) -> Parts:
  """SUN397, split 1; a class is the path of the image's folder."""
  lists = {"train": "Training_01.txt", "test": "Testing_01.txt"}
  folder = root if (root / "Training_01.txt").is_file() else root / "Partitions"
  names_file = next(
    (path for path in (root / "ClassName.txt", folder / "ClassName.txt") if path.is_file()), None
  )
  if names_file is None:
    raise FileNotFoundError(f"{root / 'ClassName.txt'} is not there; it comes with Partitions.zip of SUN397.")
  classes = [line.strip("/") for _, line in _lines(names_file)]
  return _by_folder(root, {part: folder / name for part, name in lists.items()}, classes=classes)


def voc2007(root: pathlib.Path) -> Parts:
  """PASCAL VOC 2007 with the classes of every image, bool [n, 20].

  A class of which an image shows only objects that are marked as difficult is not among its classes.
  """
  lists = root / "ImageSets" / "Main"
  parts = {}
  for split, part in _SPLITS.items():
    order = [line.split()[0] for _, line in _lines(lists / f"{split}.txt")]
    row_of = {name: row for row, name in enumerate(order)}
    labels = np.zeros((len(order), len(class_names.VOC)), bool)
    for column, name in enumerate(class_names.VOC):
      path = lists / f"{name}_{split}.txt"
      for number, line in _lines(path):
        image, value = _cells(line, 2, path, number, "IMAGE -1|0|1")
        if image not in row_of or value not in ("-1", "0", "1"):
          raise text_files.TextError(
            f"{path}, line {number}: {line!r}; expected an image of {split}.txt and -1, 0 or 1."
          )
        labels[row_of[image], column] = value == "1"
    found = [file_names.require_inside(f"{name}.jpg", str(lists / f"{split}.txt")) for name in order]
    parts[part] = listed.ListedImages(root / "JPEGImages", found, labels, list(class_names.VOC))
  return parts


def isic(root: pathlib.Path) -> Parts:
  """ISIC 2018, task 3: the training images; the ground truth has a column for each class."""
  path = next(iter(sorted(root.glob("ISIC2018_Task3_Training_GroundTruth*/*GroundTruth.csv"))), None)
  path = path or root / "ISIC2018_Task3_Training_GroundTruth.csv"
  rows = _table(path, ("image",))
  classes = [name for name in rows[0] if name != "image"]
  labels = []
  for number, row in enumerate(rows, 2):
    chosen = [label for label, name in enumerate(classes) if _is_one(row[name])]
    if len(chosen) != 1:
      raise text_files.TextError(f"{path}, line {number}: {len(chosen)} classes are 1.0; expected one.")
    labels += chosen
  found = [file_names.require_inside(f"{row['image']}.jpg", str(path)) for row in rows]
  folder = root / "ISIC2018_Task3_Training_Input"
  return {"all": listed.ListedImages(folder, found, np.asarray(labels), classes)}


def _is_one(cell: str) -> bool:
  try:
    return float(cell) == 1
  except ValueError:
    return False


def chestx(root: pathlib.Path) -> Parts:
  """ChestX-ray8 as in CD-FSL: images with one finding, of seven (without Pneumonia and No Finding)."""
  path = root / "Data_Entry_2017.csv"
  rows = _table(path, ("Image Index", "Finding Labels"))
  rows = [row for row in rows if row["Finding Labels"] in CHESTX_CLASSES]
  if not rows:
    raise text_files.TextError(f"{path} has no image with one finding of {', '.join(CHESTX_CLASSES)}.")
  where = {file.name: file.relative_to(root).as_posix() for file in sorted(root.rglob("*.png"))}
  # A file that is in no folder keeps its name, for the error about absent files.
  found = [where.get(row["Image Index"], row["Image Index"]) for row in rows]
  found = [file_names.require_inside(name, str(path)) for name in found]
  labels = [CHESTX_CLASSES.index(row["Finding Labels"]) for row in rows]
  return {"all": listed.ListedImages(root, found, np.asarray(labels), CHESTX_CLASSES)}


def one_folder(root: pathlib.Path, *, folder: str) -> Parts:
  """A folder of class folders without a split."""
  return {"all": folders.ImageFolder(root / folder)}


def class_folders(root: pathlib.Path) -> Parts:
  """`train`, `test` and perhaps `val`: folders of class folders, or archives of them."""
  found = {part: find_folder(root, part) for part in ("train", "validation", "test")}
  sources = {part: folders.open_source(path) for part, path in found.items() if path is not None}
  for part, source in sources.items():
    differing = class_names.difference(sources["train"].classes, source.classes)
    if differing:
      raise ValueError(
        f"{found[part]} has other classes than {found['train']}: {differing}. Put a classes.json with all "
        "names beside the folders."
      )
  return sources


def find_folder(root: pathlib.Path, part: str) -> pathlib.Path | None:
  """The folder or archive of a part below a root; None if there is none."""
  stems = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}[part]
  for stem in stems:
    for ending in ("", *folders.TAR_SUFFIXES):
      path = root / f"{stem}{ending}"
      if path.is_file() if ending else path.is_dir():
        return path
  return None


def _chosen(root: pathlib.Path, source: folders.ImageFolder, positions: np.ndarray) -> listed.ListedImages:
  found = [source.names[position] for position in positions]
  return listed.ListedImages(root, found, source.labels[positions], source.classes)


def _by_folder(
  root: pathlib.Path,
  lists: Mapping[str, pathlib.Path],
  *,
  ending: str = "",
  classes: Sequence[str] | None = None,
) -> Parts:
  """Parts by lists of images, whose class is the path of their folder."""
  found = {}
  for part, path in lists.items():
    lines = [(number, line.lstrip("/")) for number, line in _lines(path)]
    if loose := next((number for number, line in lines if "/" not in line), None):
      raise text_files.TextError(f"{path}, line {loose}: has no folder; expected CLASS/IMAGE.")
    found[part] = [file_names.require_inside(line + ending, str(path)) for _, line in lines]
  of_part = {part: [name.rpartition("/")[0] for name in images] for part, images in found.items()}
  classes = classes or sorted({name for folder in of_part.values() for name in folder})
  return {
    part: listed.ListedImages(root, images, _numbers(of_part[part], classes, lists[part]), classes)
    for part, images in found.items()
  }


def _cifar(
  read: Callable[[pathlib.Path], Any],
  train: Sequence[pathlib.Path],
  test: pathlib.Path,
  classes: Sequence[str],
) -> Parts:
  parts = {}
  for part, paths in (("train", train), ("test", [test])):
    for path in paths:
      if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; unpack the whole archive.")
    pixels, labels = cifar.joined([read(path) for path in paths])
    if labels.min() < 0 or labels.max() >= len(classes):
      raise ValueError(
        f"{test.parent} has the labels {labels.min()} to {labels.max()}, but {len(classes)} class names; "
        "download it again."
      )
    parts[part] = listed.PixelImages(pixels, labels, classes)
  return parts


def _lines(path: pathlib.Path) -> list[tuple[int, str]]:
  """(number, text) of the lines of a list that are not empty."""
  lines = [(number, line.strip()) for number, line in enumerate(text_files.read_text(path).split("\n"), 1)]
  return [(number, line) for number, line in lines if line]


def _cells(line: str, count: int, path: pathlib.Path, number: int, expected: str) -> list[str]:
  """The cells of a line, of which the last may hold spaces."""
  cells = line.split(maxsplit=count - 1)
  if len(cells) != count:
    raise text_files.TextError(f"{path}, line {number}: {line[:60]!r}; expected {expected}.")
  return cells


def _table(path: pathlib.Path, needed: Iterable[str]) -> list[dict[str, str]]:
  """The rows of a table with a header."""
  rows = list(csv.DictReader(text_files.read_text(path).splitlines()))
  missing = [name for name in needed if not rows or name not in rows[0]]
  if missing:
    raise text_files.TextError(f"{path} has no rows with the column {missing[0]!r}; download it again.")
  broken = next((number for number, row in enumerate(rows, 2) if None in row or None in row.values()), None)
  if broken:
    raise text_files.TextError(f"{path}, line {broken}: has another number of cells than the header.")
  return rows


def _numbers(labels: Sequence[str], classes: Sequence[str], path: pathlib.Path) -> np.ndarray:
  """Labels as positions among the classes."""
  found = class_names.numbers(labels, classes)
  if None in found:
    unknown = labels[found.index(None)]
    raise text_files.TextError(
      f"{path} names the class {unknown!r}, which is none of the {len(classes)} known: {list(classes[:5])}."
    )
  return np.asarray(found, np.int32)


def _from_one(labels: np.ndarray, count: int, path: pathlib.Path) -> np.ndarray:
  """Labels that begin at 1 as labels that begin at 0."""
  labels = _whole(labels, "classes", path)
  if labels.min() < 1 or labels.max() > count:
    raise ValueError(f"{path} has the classes {labels.min()} to {labels.max()}; expected 1 to {count}.")
  return (labels - 1).astype(np.int32)


def _whole(values: np.ndarray, name: str, path: pathlib.Path) -> Int64[np.ndarray, "n"]:
  """The whole numbers in a variable of a MATLAB file; some of its programs store them as decimals."""
  try:
    found = np.atleast_1d(values).astype(np.float64)
  except (TypeError, ValueError):  # text, or arrays in an array
    found = np.zeros(0)
  if found.ndim != 1 or not found.size or not np.all((found == np.round(found)) & (np.abs(found) < _LARGEST)):
    raise ValueError(f"{path} has `{name}` that are no list of whole numbers; download it again.")
  return found.astype(np.int64)


def _mat(path: pathlib.Path, key: str) -> np.ndarray:
  """A variable of a MATLAB file, without dimensions of one."""
  try:
    content = scipy_io.loadmat(path, squeeze_me=True)
  except FileNotFoundError as error:
    raise FileNotFoundError(f"{path} is not there; it comes with the data set.") from error
  except Exception as error:  # SciPy's readers raise many kinds
    raise ValueError(f"{path} is no readable MATLAB file ({error}); download it again.") from error
  if key not in content:
    raise ValueError(f"{path} has no variable {key!r}; download it again.")
  return np.asarray(content[key])
