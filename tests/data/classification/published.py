"""Writes tiny data sets in the layouts of their authors; every image has the colour of its class."""

from collections.abc import Sequence
import pathlib
import pickle

import numpy as np
from PIL import Image
from scipy import io as scipy_io

COLOURS = ((220, 30, 30), (30, 220, 30), (30, 30, 220))


def image(path: pathlib.Path, label: int) -> None:
  """An image of 8 x 10 px."""
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (10, 8), COLOURS[label % 3]).save(path, quality=95)


def text(path: pathlib.Path, lines: list[str]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("\n".join(lines) + "\n")


def aircraft(root: pathlib.Path) -> None:
  data = root / "fgvc-aircraft-2013b" / "data"
  classes = ["707-320", "A300B4", "Cessna 172"]
  text(data / "variants.txt", classes)
  for start, split in ((0, "train"), (3, "val"), (6, "test")):
    text(data / f"images_variant_{split}.txt", [f"{start + i:07d} {name}" for i, name in enumerate(classes)])
  for number in range(9):
    image(data / "images" / f"{number:07d}.jpg", number % 3)


def caltech101(root: pathlib.Path) -> None:
  for label, name in enumerate(("BACKGROUND_Google", "accordion", "yin_yang")):
    for number in range(31 + label):
      image(root / "101_ObjectCategories" / name / f"image_{number + 1:04d}.jpg", label)


def cars(root: pathlib.Path) -> None:
  (root / "stanford_cars" / "devkit").mkdir(parents=True)
  root = root / "stanford_cars"
  scipy_io.savemat(
    root / "devkit" / "cars_meta.mat", {"class_names": np.array(["AM", "Audi", "BMW"], object)}
  )
  kinds = [("fname", object), ("class", object)]
  for split, path in (
    ("train", root / "devkit" / "cars_train_annos.mat"),
    ("test", root / "cars_test_annos_withlabels.mat"),
  ):
    rows = [(f"{number:05d}.jpg", 1 + number % 3) for number in range(6)]
    scipy_io.savemat(path, {"annotations": np.array(rows, kinds)})
    for name, label in rows:
      image(root / f"cars_{split}" / name, label - 1)


def _planes(labels: list[int]) -> np.ndarray:
  return np.stack([np.repeat(np.array(COLOURS[label % 3], np.uint8), 1024) for label in labels])


def python2_batch(data: np.ndarray, labels: list[int]) -> bytes:
  """A batch as Python 2 pickled it, in whose strings are bytes."""
  shape = b"K" + bytes([len(data)]) + b"M\x00\x0c\x86"  # (n, 3072)
  dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
  array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
  content = b"T" + len(data.tobytes()).to_bytes(4, "little") + data.tobytes()
  numbers = b"".join(b"K" + bytes([label]) for label in labels)
  state = b"(K\x01" + shape + dtype + b"\x89" + content + b"tb"
  return b"\x80\x02}(U\x04data" + array + state + b"U\x06labels](" + numbers + b"eu."


def cifar10(root: pathlib.Path) -> None:
  folder = root / "cifar-10-batches-py"
  folder.mkdir(parents=True)
  (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["red", "green", "blue"]}))
  for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
    (folder / name).write_bytes(python2_batch(_planes([0, 1, 2]), [0, 1, 2]))


def cifar10_binary(root: pathlib.Path) -> None:
  folder = root / "cifar-10-batches-bin"
  text(folder / "batches.meta.txt", ["red", "green", "blue", ""])
  for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
    records = np.concatenate([np.arange(3, dtype=np.uint8)[:, None], _planes([0, 1, 2])], axis=1)
    records.tofile(folder / f"{name}.bin")


def cifar100(root: pathlib.Path) -> None:
  folder = root / "cifar-100-python"
  folder.mkdir(parents=True)
  (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["red", "green", "blue"]}))
  for name in ("train", "test"):
    content = {"data": _planes([2, 1, 0]), "fine_labels": [2, 1, 0], "coarse_labels": [0, 0, 0]}
    (folder / name).write_bytes(pickle.dumps(content))


def cifar100_binary(root: pathlib.Path) -> None:
  text(root / "fine_label_names.txt", ["red", "green", "blue"])
  text(root / "coarse_label_names.txt", ["colour"])
  for name in ("train", "test"):
    labels = np.array([[0, 2], [0, 1], [0, 0]], np.uint8)
    np.concatenate([labels, _planes([2, 1, 0])], axis=1).tofile(root / f"{name}.bin")


def _in_folders(root: pathlib.Path, classes: tuple[str, ...], count: int) -> list[str]:
  names = [f"{name}/{name.replace('/', '_')}_{number}" for name in classes for number in range(count)]
  for name in names:
    image(root / f"{name}.jpg", classes.index(name.rpartition("/")[0]))
  return names


def dtd(root: pathlib.Path) -> None:
  names = _in_folders(root / "dtd" / "images", ("banded", "dotted", "zigzagged"), 3)
  for number, split in enumerate(("train", "val", "test")):
    text(root / "dtd" / "labels" / f"{split}1.txt", [f"{name}.jpg" for name in names[number::3]])
    text(root / "dtd" / "labels" / f"{split}2.txt", ["wrong/split.jpg"])


def flowers(root: pathlib.Path) -> None:
  labels = [1, 2, 3] * 3
  for number, label in enumerate(labels, 1):
    image(root / "jpg" / f"image_{number:05d}.jpg", label - 1)
  scipy_io.savemat(root / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
  splits = {"trnid": [[1, 2, 3]], "valid": [[6, 5, 4]], "tstid": [[7, 8, 9]]}
  scipy_io.savemat(root / "setid.mat", {name: np.array(ids, np.uint16) for name, ids in splits.items()})


def food(root: pathlib.Path) -> None:
  names = _in_folders(root / "food-101" / "images", ("apple_pie", "pho", "waffles"), 2)
  text(root / "food-101" / "meta" / "classes.txt", ["apple_pie", "pho", "waffles"])
  for number, split in enumerate(("train", "test")):
    text(root / "food-101" / "meta" / f"{split}.txt", names[number::2])


def pets(root: pathlib.Path) -> None:
  root = root / "oxford-iiit-pet"
  breeds = ("Abyssinian", "beagle", "Sphynx")
  for breed in breeds:
    for number in (1, 2):
      image(root / "images" / f"{breed}_{number}.jpg", sorted(breeds, key=str.lower).index(breed))
  for number, split in ((1, "trainval"), (2, "test")):
    lines = [f"{breed}_{number} {label} 1 1" for label, breed in enumerate(breeds, 1)]
    text(
      root / "annotations" / f"{split}.txt", [*(["#Image CLASS-ID SPECIES BREED ID"] * (number == 1)), *lines]
    )


def sun397(root: pathlib.Path) -> None:
  classes = ("a/abbey", "b/bakery/shop", "z/zoo")
  names = _in_folders(root / "SUN397", classes, 2)
  text(root / "SUN397" / "Partitions" / "ClassName.txt", [f"/{name}" for name in classes])
  for number, split in enumerate(("Training", "Testing")):
    text(root / "SUN397" / "Partitions" / f"{split}_01.txt", [f"/{name}.jpg" for name in names[number::2]])


def voc2007(root: pathlib.Path, classes: Sequence[str]) -> None:
  """Image i of three shows class i; the first one also class 1, and class 2 as difficult."""
  root = root / "VOCdevkit" / "VOC2007"
  for start, split in ((0, "train"), (3, "val"), (6, "test")):
    images = [f"{start + number:06d}" for number in range(3)]
    text(root / "ImageSets" / "Main" / f"{split}.txt", images)
    for column, name in enumerate(classes):
      values = [1 if row == column else -1 for row in range(3)]
      values[0] = {1: 1, 2: 0}.get(column, values[0])
      lines = [f"{name} {value:2d}" for name, value in zip(images, values)]
      text(root / "ImageSets" / "Main" / f"{name}_{split}.txt", lines)
    for number, name in enumerate(images):
      image(root / "JPEGImages" / f"{name}.jpg", number)


def cropdisease(root: pathlib.Path) -> None:
  _in_folders(root / "CropDiseases" / "train", ("Apple___scab", "Corn___rust", "Grape___rot"), 2)
  image(root / "CropDiseases" / "test" / "Apple___scab" / "unused.jpg", 0)


def eurosat(root: pathlib.Path) -> None:
  _in_folders(root / "EuroSAT" / "2750", ("AnnualCrop", "Forest", "SeaLake"), 2)


def isic(root: pathlib.Path) -> None:
  lines = ["image,MEL,NV,BCC"]
  for number in range(6):
    label = number % 3
    image(root / "ISIC2018_Task3_Training_Input" / f"ISIC_{number:07d}.jpg", label)
    lines.append(
      ",".join([f"ISIC_{number:07d}", *("1.0" if column == label else "0.0" for column in range(3))])
    )
  folder = root / "ISIC2018_Task3_Training_GroundTruth"
  text(folder / "ISIC2018_Task3_Training_GroundTruth.csv", lines)


def chestx(root: pathlib.Path) -> None:
  findings = ["Atelectasis", "Effusion", "Atelectasis|Effusion", "No Finding", "Pneumonia", "Nodule"]
  lines = ["Image Index,Finding Labels,Patient Age"]
  for number, finding in enumerate(findings):
    image(root / f"images_{1 + number % 2:03d}" / "images" / f"{number:08d}_000.png", number)
    lines.append(f"{number:08d}_000.png,{finding},50")
  text(root / "Data_Entry_2017.csv", lines)
