"""Published classification sets, each in a tiny folder of its own layout."""

import logging
import pickle
import warnings

import numpy as np
import pytest
from scipy import io as scipy_io

from frozen_vision.data import classes as class_names
from frozen_vision.data import content, fingerprint
from frozen_vision.data.classification import augment, benchmarks, cifar, folders, listed
from tests.data.classification import published

# Writer, name, {part: labels in the order of the lists}.
_THREE = {part: [0, 1, 2] for part in ("train", "validation", "test")}
_TWO = {"train": [0, 1, 2], "test": [0, 1, 2]}
CASES = {
  "aircraft": (published.aircraft, "aircraft", _THREE),
  "cars": (published.cars, "cars", {"train": [0, 1, 2] * 2, "test": [0, 1, 2] * 2}),
  "cifar10": (published.cifar10, "cifar10", {"train": [0, 1, 2] * 5, "test": [0, 1, 2]}),
  "cifar10 binary": (published.cifar10_binary, "cifar10", {"train": [0, 1, 2] * 5, "test": [0, 1, 2]}),
  "cifar100": (published.cifar100, "cifar100", {"train": [2, 1, 0], "test": [2, 1, 0]}),
  "cifar100 binary": (published.cifar100_binary, "cifar100", {"train": [2, 1, 0], "test": [2, 1, 0]}),
  "dtd": (published.dtd, "dtd", _THREE),
  "flowers": (published.flowers, "flowers", _THREE | {"validation": [2, 1, 0]}),
  "food": (published.food, "food", _TWO),
  "pets": (published.pets, "pets", {"train": [0, 1, 2], "test": [0, 1, 2]}),
  "sun397": (published.sun397, "sun397", _TWO),
  "cropdisease": (published.cropdisease, "cropdisease", {"all": [0, 0, 1, 1, 2, 2]}),
  "eurosat": (published.eurosat, "eurosat", {"all": [0, 0, 1, 1, 2, 2]}),
  "isic": (published.isic, "isic", {"all": [0, 1, 2, 0, 1, 2]}),
}


@pytest.mark.parametrize("case", CASES)
def test_layouts(case, tmp_path):
  write, name, expected = CASES[case]
  write(tmp_path)
  parts = benchmarks.open_benchmark(name, tmp_path)
  assert set(parts) == set(expected) == set(benchmarks.BENCHMARKS[name].images)
  for part, source in parts.items():
    assert sorted(source.labels.tolist()) == sorted(expected[part])
    assert source.labels.dtype == np.int32 and len(source.classes) == 3
    source.check()
    assert len(source) == len(expected[part]) and source.findings.totals == {"images": len(source)}
    for index in range(len(source)):
      record = source[index]
      colour = folders.record_image(record)[4, 4]
      assert np.argmax(colour) == record["label"], f"{part} {record['name']}"
    assert len({source[index]["name"] for index in range(len(source))}) == len(source)
    assert content.digest(pickle.loads(pickle.dumps(source))) == content.digest(source)
    assert fingerprint.of_source(source)["examples"] == len(source)


def test_pets_in_the_order_of_names(tmp_path):
  published.pets(tmp_path)
  assert benchmarks.open_benchmark("pets", tmp_path)["test"].classes == ["Abyssinian", "beagle", "Sphynx"]


def test_caltech_draws_thirty_of_each_class(tmp_path):
  published.caltech101(tmp_path)
  parts = benchmarks.open_benchmark("caltech101", tmp_path)
  assert np.bincount(parts["train"].labels).tolist() == [30, 30, 30]
  assert np.bincount(parts["test"].labels).tolist() == [1, 2, 3]
  assert not set(parts["train"].names) & set(parts["test"].names)
  assert parts["train"].names == benchmarks.open_benchmark("caltech101", tmp_path)["train"].names


def test_voc_has_several_classes_for_an_image(tmp_path):
  published.voc2007(tmp_path, class_names.VOC)
  parts = benchmarks.open_benchmark("voc2007", tmp_path)
  assert parts["train"].labels.dtype == bool and parts["train"].labels.shape == (3, 20)
  expected = [[0, 1], [1], [2]]
  for source in parts.values():
    assert [np.flatnonzero(row).tolist() for row in source.labels] == expected
  example = augment.EvalTransform(8)(parts["validation"][0])
  assert example["label"].dtype == np.int32 and np.flatnonzero(example["label"]).tolist() == [0, 1]


def test_chestx_keeps_images_with_one_of_seven_findings(tmp_path):
  published.chestx(tmp_path)
  [source] = benchmarks.open_benchmark("chestx", tmp_path).values()
  assert source.names == [
    "images_001/images/00000000_000.png",
    "images_002/images/00000001_000.png",
    "images_002/images/00000005_000.png",
  ]
  assert [source.classes[label] for label in source.labels] == ["Atelectasis", "Effusion", "Nodule"]


def test_folders_of_classes_serve_too(tmp_path, caplog):
  for part in ("train", "val", "test"):
    for label, name in enumerate(("a", "b", "c")):
      published.image(tmp_path / "food" / part / name / f"{part}.png", label)
  with caplog.at_level(logging.WARNING):
    parts = benchmarks.open_benchmark("food", tmp_path)
  assert list(parts) == ["train", "validation", "test"] and parts["validation"].names[1] == "b/val.png"
  assert "101 classes as published" in caplog.text
  published.image(tmp_path / "food" / "test" / "d" / "x.png", 0)
  with pytest.raises(
    ValueError, match="has other classes than .*train: 4 classes in place of 3: it adds 'd'"
  ):
    benchmarks.open_benchmark("food", tmp_path)


def test_what_is_not_there_is_named(tmp_path):
  message = (
    "Describable Textures is not in .*labels/train1.txt and images, or dtd/VERSION of TFDS.*dtd-r1.0.1"
  )
  with pytest.raises(FileNotFoundError, match=message):
    benchmarks.open_benchmark("dtd", tmp_path)
  with pytest.raises(ValueError, match="'mnist' is no known set; known: aircraft, caltech101"):
    benchmarks.open_benchmark("mnist", tmp_path)
  published.dtd(tmp_path)
  (tmp_path / "dtd" / "images" / "banded" / "banded_0.jpg").unlink()
  with pytest.raises(FileNotFoundError, match="1 of 3 listed images are not below .*banded/banded_0.jpg"):
    benchmarks.open_benchmark("dtd", tmp_path)


@pytest.mark.parametrize(
  "name, file, text, message",
  [
    ("dtd", "dtd/labels/val1.txt", "../../x.jpg", "leads out of its folder"),
    ("dtd", "dtd/labels/val1.txt", "x.jpg", "line 1: has no folder"),
    ("food", "food-101/meta/train.txt", "cake/1", "names the class 'cake', which is none of the 3 known"),
    (
      "aircraft",
      "fgvc-aircraft-2013b/data/images_variant_val.txt",
      "12",
      "line 1: '12'; expected IMAGE VARIANT",
    ),
    ("cars", "stanford_cars/devkit/cars_train_annos.mat", "no", "is no readable MATLAB file"),
    ("cifar10", "cifar-10-batches-py/data_batch_2", "no", "is no pickle of CIFAR"),
    ("flowers", "setid.mat", "no", "is no readable MATLAB file"),
    (
      "isic",
      "ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv",
      "image,MEL\na,0.0",
      "line 2: 0 classes",
    ),
    ("chestx", "Data_Entry_2017.csv", "Image,Labels\na,b", "no rows with the column 'Image Index'"),
  ],
)
def test_damaged_files_are_named(name, file, text, message, tmp_path):
  getattr(published, name)(tmp_path)
  (tmp_path / file).write_text(text)
  with pytest.raises(ValueError, match=message):
    benchmarks.open_benchmark(name, tmp_path)


@pytest.mark.parametrize("values", ["text", [1.5, np.nan, 2], []])
def test_numbers_in_matlab_files(values, tmp_path):
  published.flowers(tmp_path)
  scipy_io.savemat(tmp_path / "imagelabels.mat", {"labels": values})
  with pytest.raises(ValueError, match="imagelabels.mat has `labels` that are no list of whole numbers"):
    benchmarks.open_benchmark("flowers", tmp_path)
  scipy_io.savemat(tmp_path / "imagelabels.mat", {"labels": [1e6] + [1] * 8})
  with pytest.raises(ValueError, match="9 images and the class 1000000; expected an image of every class"):
    benchmarks.open_benchmark("flowers", tmp_path)


def test_batches_of_both_pythons():
  data = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
  batch = published.python2_batch(data, [3, 1])
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # NumPy's about the name of its module in old pickles
    theirs = pickle.loads(batch, encoding="bytes")
  assert theirs[b"labels"] == [3, 1] and np.array_equal(theirs[b"data"], data)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_batch_that_python_3_wrote(protocol, tmp_path):
  data = np.random.default_rng(0).integers(0, 256, (2, 3072), np.uint8)
  (tmp_path / "batch").write_bytes(pickle.dumps({b"data": data, b"labels": [3, 1]}, protocol))
  pixels, labels = cifar.read_pickle(tmp_path / "batch", key="labels")
  np.testing.assert_array_equal(pixels, data.reshape(2, 3, 32, 32).transpose(0, 2, 3, 1))
  assert labels.tolist() == [3, 1]


def test_labels_of_a_batch_are_numbers(tmp_path):
  content_of = {b"data": np.zeros((1, 3072), np.uint8), b"labels": ["x"]}
  (tmp_path / "batch").write_bytes(pickle.dumps(content_of, 2))
  with pytest.raises(ValueError, match="batch holds no batch of CIFAR"):
    cifar.read_pickle(tmp_path / "batch", key="labels")


def test_a_pickle_is_not_executed(tmp_path):
  published.cifar10(tmp_path)

  class Evil:
    def __reduce__(self):
      return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

  for content_of in (Evil(), {"data": Evil(), "labels": [1]}):
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(content_of))
    with pytest.raises(ValueError, match="data_batch_1"):
      benchmarks.open_benchmark("cifar10", tmp_path)
  assert not (tmp_path / "ran").exists()


def test_joined_sources(tmp_path):
  published.flowers(tmp_path)
  parts = benchmarks.open_benchmark("flowers", tmp_path)
  both = listed.Joined(parts["train"], parts["validation"])
  assert len(both) == 6 and both.labels.tolist() == [0, 1, 2, 2, 1, 0]
  assert [both[index]["name"] for index in range(6)] == both.names
  assert both[-1]["name"] == parts["validation"].names[-1]
  assert content.digest(both) != content.digest(listed.Joined(parts["validation"], parts["train"]))
  assert fingerprint.of_source(both)["examples"] == 6


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
  """`dtd` and `voc/2007` as TFDS prepares them, and `food101` without positions."""
  tfds = pytest.importorskip("tensorflow_datasets")

  class Base(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("3.0.1")

    def _split_generators(self, manager):
      del manager
      return {split: self._generate_examples() for split in ("train", "validation", "test")}

  class Dtd(Base, skip_registration=True):
    name = "dtd"

    def _info(self):
      label = tfds.features.ClassLabel(names=["a", "b", "c"])
      features = {"file_name": tfds.features.Text(), "image": tfds.features.Image(), "label": label}
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self):
      for number in range(4):
        image = np.full((8, 10, 3), published.COLOURS[number % 3], np.uint8)
        yield number, {"image": image, "label": number % 3, "file_name": f"{number}.jpg"}

  class Food(Dtd, skip_registration=True):
    name = "food101"

  class Voc(Base, skip_registration=True):
    name = "voc"
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="2007")]

    def _info(self):
      label = tfds.features.Sequence(tfds.features.ClassLabel(names=["a", "b", "c"]))
      features = {"image": tfds.features.Image(), "labels_no_difficult": label, "labels": label}
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self):
      image = np.zeros((8, 10, 3), np.uint8)
      for number, labels in enumerate(([0, 2], [], [1])):
        yield number, {"image": image, "labels_no_difficult": labels, "labels": [0, 1, 2]}

  folder = tmp_path_factory.mktemp("tfds")
  tfds.disable_progress_bar()
  for builder, file_format in ((Dtd, "array_record"), (Voc, "array_record"), (Food, "tfrecord")):
    builder(data_dir=folder, file_format=file_format).download_and_prepare(download_dir=folder / "downloads")
  return folder


def test_sets_that_tfds_has_prepared(tfds_folder):
  parts = benchmarks.open_benchmark("dtd", tfds_folder)
  assert list(parts) == ["train", "validation", "test"]
  source = pickle.loads(pickle.dumps(parts["test"]))
  assert source.classes == ["a", "b", "c"] and sorted(source.labels) == [0, 0, 1, 2]
  for index in range(4):
    record = source[index]
    assert isinstance(record["image"], bytes)
    assert folders.record_image(record)[4, 4].tolist() == list(published.COLOURS[record["label"]])
  assert content.digest(source) == content.digest(parts["test"]) != content.digest(parts["train"])
  voc = benchmarks.open_benchmark("voc2007", tfds_folder)["train"]
  assert voc.labels.dtype == bool
  assert sorted(np.flatnonzero(row).tolist() for row in voc.labels) == [[], [0, 2], [1]]


def test_a_format_without_positions_is_refused(tfds_folder):
  with pytest.raises(ValueError, match="stored as tfrecord.*tfds build food101 --file_format=array_record"):
    benchmarks.open_benchmark("food", tfds_folder)
