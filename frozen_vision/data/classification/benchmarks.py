"""The classification sets of transfer benchmarks: where their files are, how they are split and scored.

Eleven sets of "Do Better ImageNet Models Transfer Better?" (arXiv 1805.08974), which "How Well Do
Self-Supervised Models Transfer?" (arXiv 2011.13377) uses, and four of CD-FSL (arXiv 1912.07200) for few-shot
episodes alone. A set is read from its authors' files, from a folder that TensorFlow Datasets has prepared, or
from `train` and `test` folders of classes.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import logging
import os
import pathlib
from typing import Literal

from frozen_vision import messages
from frozen_vision.data.classification import layouts, tfds_images

_logger = logging.getLogger(__name__)

Metric = Literal["top1", "mean_per_class", "map11"]


@dataclasses.dataclass(frozen=True)
class Layout:
  """Files as their authors publish them.

  Attributes:
    marks: paths that must all be there, below the folder of the set.
    read: gives the parts of that folder.
    is_general: other sets have these paths, too.
  """

  marks: tuple[str, ...]
  read: Callable[[pathlib.Path], layouts.Parts]
  is_general: bool = False


@dataclasses.dataclass(frozen=True)
class Tfds:
  """The set in TensorFlow Datasets.

  Attributes:
    name: of the set, with the config.
    splits: TFDS's name of each part.
    label: the feature with the class, or the classes.
  """

  name: str
  splits: Mapping[str, str]
  label: str = "label"


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """One set.

  Attributes:
    title: as papers write it.
    classes: how many there are.
    images: of every part of the authors' files.
    metric: that arXiv 2011.13377 selects and tests by.
    folders: what the folder of the set is called where people unpack it.
    layouts: that are looked for, in this order.
    source: where the files are.
    tfds: None where TFDS does not have the set, or splits it in another way.
    has_folders: whether `train` and `test` folders of classes are looked for too.
  """

  title: str
  classes: int
  images: Mapping[str, int]
  metric: Metric
  folders: tuple[str, ...]
  layouts: tuple[Layout, ...]
  source: str
  tfds: Tfds | None = None
  has_folders: bool = True

  @property
  def is_few_shot(self) -> bool:
    """Whether the set has no split, and serves few-shot episodes alone."""
    return "all" in self.images


_TRAIN_TEST = {"train": "train", "test": "test"}
_THREE = {"train": "train", "validation": "validation", "test": "test"}

BENCHMARKS: dict[str, Benchmark] = {
  "aircraft": Benchmark(
    "FGVC Aircraft",
    100,
    {"train": 3334, "validation": 3333, "test": 3333},
    "mean_per_class",
    ("fgvc-aircraft-2013b",),
    (Layout(("data/images_variant_train.txt", "data/images"), layouts.aircraft),),
    "fgvc-aircraft-2013b.tar.gz of https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
  ),
  "caltech101": Benchmark(
    "Caltech-101",
    102,
    {"train": 3060, "test": 6084},
    "mean_per_class",
    ("caltech-101", "caltech101"),
    (Layout(("101_ObjectCategories",), layouts.caltech101),),
    "caltech-101.zip of https://data.caltech.edu/records/mzrjq-6wc02, and unpack its archive of images",
    Tfds("caltech101", _TRAIN_TEST),
  ),
  "cars": Benchmark(
    "Stanford Cars",
    196,
    {"train": 8144, "test": 8041},
    "top1",
    ("stanford_cars", "cars"),
    (Layout(("devkit/cars_train_annos.mat", "cars_train"), layouts.cars),),
    "cars_train, cars_test, devkit and cars_test_annos_withlabels.mat, as torchvision reads them",
    Tfds("cars196", _TRAIN_TEST),
  ),
  "cifar10": Benchmark(
    "CIFAR-10",
    10,
    {"train": 50000, "test": 10000},
    "top1",
    ("cifar-10-batches-py", "cifar-10-batches-bin"),
    (
      Layout(("data_batch_1", "batches.meta"), layouts.cifar10_python),
      Layout(("data_batch_1.bin", "batches.meta.txt"), layouts.cifar10_binary),
    ),
    "cifar-10-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html",
    Tfds("cifar10", _TRAIN_TEST),
  ),
  "cifar100": Benchmark(
    "CIFAR-100",
    100,
    {"train": 50000, "test": 10000},
    "top1",
    ("cifar-100-python", "cifar-100-binary"),
    (
      Layout(("train", "test", "meta"), layouts.cifar100_python),
      Layout(("train.bin", "fine_label_names.txt"), layouts.cifar100_binary),
    ),
    "cifar-100-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html",
    Tfds("cifar100", _TRAIN_TEST),
  ),
  "dtd": Benchmark(
    "Describable Textures",
    47,
    {"train": 1880, "validation": 1880, "test": 1880},
    "top1",
    ("dtd",),
    (Layout(("labels/train1.txt", "images"), layouts.dtd),),
    "dtd-r1.0.1.tar.gz of https://www.robots.ox.ac.uk/~vgg/data/dtd/",
    Tfds("dtd", _THREE),
  ),
  "flowers": Benchmark(
    "Oxford Flowers",
    102,
    {"train": 1020, "validation": 1020, "test": 6149},
    "mean_per_class",
    ("flowers-102", "flowers"),
    (Layout(("jpg", "imagelabels.mat", "setid.mat"), layouts.flowers),),
    "102flowers.tgz, imagelabels.mat and setid.mat of https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
    Tfds("oxford_flowers102", _THREE),
  ),
  "food": Benchmark(
    "Food-101",
    101,
    {"train": 75750, "test": 25250},
    "top1",
    ("food-101",),
    (Layout(("meta/classes.txt", "images"), layouts.food),),
    "food-101.tar.gz of https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
    Tfds("food101", {"train": "train", "test": "validation"}),
  ),
  "pets": Benchmark(
    "Oxford-IIIT Pets",
    37,
    {"train": 3680, "test": 3669},
    "mean_per_class",
    ("oxford-iiit-pet", "pets"),
    (Layout(("annotations/trainval.txt", "images"), layouts.pets),),
    "images.tar.gz and annotations.tar.gz of https://www.robots.ox.ac.uk/~vgg/data/pets/",
    Tfds("oxford_iiit_pet", _TRAIN_TEST),
  ),
  "sun397": Benchmark(
    "SUN397",
    397,
    {"train": 19850, "test": 19850},
    "top1",
    ("SUN397",),
    (
      Layout(("Training_01.txt",), layouts.sun397),
      Layout(("Partitions/Training_01.txt",), layouts.sun397),
    ),
    "SUN397.tar.gz, with Partitions.zip unpacked in it, of https://vision.princeton.edu/projects/2010/SUN/",
    Tfds("sun397/standard-part1-120k", _TRAIN_TEST),
  ),
  "voc2007": Benchmark(
    "PASCAL VOC 2007",
    20,
    {"train": 2501, "validation": 2510, "test": 4952},
    "map11",
    ("VOCdevkit/VOC2007", "VOC2007"),
    (Layout(("ImageSets/Main/train.txt", "JPEGImages"), layouts.voc2007),),
    "VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar of http://host.robots.ox.ac.uk/pascal/VOC/voc2007/",
    Tfds("voc/2007", _THREE, "labels_no_difficult"),
    has_folders=False,
  ),
  "cropdisease": Benchmark(
    "CropDisease",
    38,
    {"all": 43456},
    "top1",
    ("CropDiseases", "CropDisease", "dataset_for_CropDisease"),
    (Layout(("train",), functools.partial(layouts.one_folder, folder="train"), is_general=True),),
    "the PlantVillage data of Kaggle (saroz014/plant-disease), of whose folder `train` CD-FSL draws",
    has_folders=False,
  ),
  "eurosat": Benchmark(
    "EuroSAT",
    10,
    {"all": 27000},
    "top1",
    ("EuroSAT", "eurosat"),
    (Layout(("2750",), functools.partial(layouts.one_folder, folder="2750")),),
    "EuroSAT.zip (RGB) of https://github.com/phelber/EuroSAT",
    Tfds("eurosat/rgb", {"all": "train"}),
    has_folders=False,
  ),
  "isic": Benchmark(
    "ISIC 2018",
    7,
    {"all": 10015},
    "top1",
    ("ISIC", "isic"),
    (Layout(("ISIC2018_Task3_Training_Input",), layouts.isic),),
    "ISIC2018_Task3_Training_Input.zip and _GroundTruth.zip of https://challenge.isic-archive.com/data/",
    has_folders=False,
  ),
  "chestx": Benchmark(
    "ChestX",
    7,
    {"all": 25847},
    "top1",
    ("ChestX", "chestx", "chestxray8"),
    (Layout(("Data_Entry_2017.csv",), layouts.chestx),),
    "images_001.tar.gz to images_012.tar.gz and Data_Entry_2017.csv of NIH ChestX-ray8",
    has_folders=False,
  ),
}


def benchmark(name: str) -> Benchmark:
  """The row of a set.

  Raises:
    ValueError: an unknown name; lists the known ones.
  """
  if name not in BENCHMARKS:
    raise ValueError(f"{name!r} is no known set; known: {', '.join(BENCHMARKS)}.")
  return BENCHMARKS[name]


def open_benchmark(name: str, root: str | os.PathLike[str], *, is_shared: bool = False) -> layouts.Parts:
  """Opens a set in whatever layout is there.

  Args:
    name: of `BENCHMARKS`.
    root: the folder of the set, one that holds a folder of the set's name, or TFDS's `data_dir`.
    is_shared: the root is for several sets, so that folders which any set may have, such as `train`, count
      below a folder of the set's name only.

  Returns:
    Sources of records by part: "train", "test" and, where the authors define one, "validation"; "all" of a
    set without a split. Labels are int32 [n]; bool [n, classes] of VOC 2007.

  Raises:
    FileNotFoundError: nothing of it is there; says what was looked for and where it is to be had.
    ValueError: an unknown name, or files that are damaged or contradict each other.
  """
  row, root = benchmark(name), pathlib.Path(root).expanduser()
  own = [root / folder for folder in (*row.folders, name)]
  places = [*own, root]
  for layout in row.layouts:
    for place in own if is_shared and layout.is_general else places:
      if all((place / mark).exists() for mark in layout.marks):
        return _noted(row, place, layout.read(place), is_whole=True)
  if row.tfds:
    prepared = tfds_images.find_prepared(root, row.tfds.name)
    if prepared:
      parts = {
        part: tfds_images.TfdsImages(prepared, split, label=row.tfds.label)
        for part, split in row.tfds.splits.items()
      }
      return _noted(row, prepared, parts)
  if row.has_folders:
    for place in own if is_shared else places:
      if layouts.find_folder(place, "train") and layouts.find_folder(place, "test"):
        return _noted(row, place, layouts.class_folders(place))
  raise FileNotFoundError(_not_found(name, row, root))


def _noted(
  row: Benchmark, place: pathlib.Path, parts: layouts.Parts, is_whole: bool = False
) -> layouts.Parts:
  """The parts, with a warning where they are not those of the published set."""
  found = {part: len(source) for part, source in parts.items()}
  classes = len(next(iter(parts.values())).classes)
  counts = ", ".join(f"{count:,} {part}" for part, count in found.items())
  _logger.info("%s in %s: %s images of %d classes.", row.title, place, counts, classes)
  if classes != row.classes or (is_whole and found != dict(row.images)):
    published = ", ".join(f"{count:,} {part}" for part, count in row.images.items())
    _logger.warning(
      "%s has %s images of %d classes as published; scores on these files are not those of papers.",
      row.title,
      published,
      row.classes,
    )
  return parts


def _not_found(name: str, row: Benchmark, root: pathlib.Path) -> str:
  options = [" and ".join(layout.marks) for layout in row.layouts]
  if row.tfds:
    options.append(f"{row.tfds.name}/VERSION of TFDS")
  if row.has_folders:
    options.append("train and test with a folder for each class")
  places = messages.listed([str(root), *(str(root / folder) for folder in (name, *row.folders))])
  advice = f"Get {row.source}"
  if row.tfds:
    advice += f", or run: tfds build {row.tfds.name} --file_format=array_record --data_dir={root}"
  return f"{row.title} is not in {places}; expected {', or '.join(options)}. {advice}."
