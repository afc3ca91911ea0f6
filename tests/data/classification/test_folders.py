"""Folder and tar sources, and the augmentation of classification records."""

import io
import json
import pickle
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageEnhance, ImageOps
import pytest

from frozen_vision.data.classification import augment
from frozen_vision.data.classification import folders as classification
from frozen_vision.ops import mixup
from tests import paths


def encoded(seed, size=(8, 10)):
  pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "PNG")
  return pixels, buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
  root = tmp_path / "train"
  for number, name in enumerate(["dog/b.png", "dog/a.png", "cat/2.png", "cat/10.png", "ant/x.png"]):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(encoded(number)[1])
  (root / "dog" / ".hidden.png").write_bytes(b"")
  (root / "dog" / "notes.txt").write_text("not an image")
  return root


def pack(folder, path):
  with tarfile.open(path, "w:" + path.suffix[1:].replace("tar", "")) as archive:
    for file in sorted(folder.rglob("*"), reverse=True):
      archive.add(file, arcname="./" + file.relative_to(folder).as_posix(), recursive=False)
  return path


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.xz"])
def test_folder_and_tar_give_the_same_records(folder, tmp_path, suffix):
  from_folder = classification.open_source(folder)
  from_tar = classification.open_source(pack(folder, tmp_path / f"train.{suffix}"))
  assert from_folder.classes == from_tar.classes == ["ant", "cat", "dog"]
  assert from_folder.names == from_tar.names
  assert from_folder.names == ["ant/x.png", "cat/10.png", "cat/2.png", "dog/a.png", "dog/b.png"]
  np.testing.assert_array_equal(from_folder.labels, [0, 1, 1, 2, 2])
  decoded = classification.DecodedImages(pickle.loads(pickle.dumps(from_tar)))
  for i in range(5):
    assert from_folder[i] == from_tar[i]
    np.testing.assert_array_equal(decoded[i]["image"], classification.record_image(from_folder[i]))
    assert decoded[i]["label"] == from_tar[i]["label"] and decoded[i]["label"].dtype == np.int32
  np.testing.assert_array_equal(decoded[4]["image"], encoded(0)[0])


def test_class_order_comes_from_the_file_or_the_argument(folder, tmp_path):
  (tmp_path / "classes.json").write_text(json.dumps(["dog", "cat", "ant"]))
  archive = pack(folder, tmp_path / "train.tar")
  for source in (classification.ImageFolder(folder), classification.ImageTar(archive)):
    assert source.classes == ["dog", "cat", "ant"]
    assert source.names[0] == "dog/a.png" and source.labels[0] == 0
  source = classification.ImageFolder(folder, classes=["cat", "dog", "ant"])
  assert source.names[0] == "cat/10.png"


def test_errors_name_what_is_wrong(folder, tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere"):
    classification.open_source(tmp_path / "nowhere")
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="empty holds no images"):
    classification.open_source(tmp_path / "empty")
  with pytest.raises(ValueError, match=r"class folders \['dog'\]"):
    classification.ImageFolder(folder, classes=["cat", "ant"])
  with pytest.raises(ValueError, match=r"no image of the listed classes \['emu'\]"):
    classification.ImageFolder(folder, classes=["cat", "ant", "dog", "emu"])
  with pytest.raises(ValueError, match="twice"):
    classification.ImageFolder(folder, classes=["cat", "ant", "dog", "dog"])
  archive = pack(folder, tmp_path / "train.tar.xz")
  broken = tmp_path / "broken.tar.xz"
  broken.write_bytes(archive.read_bytes()[:-200])
  with pytest.raises(ValueError, match="broken.tar.xz"):
    classification.ImageTar(broken)
  text = tmp_path / "file.txt"
  text.write_text("x")
  with pytest.raises(ValueError, match="neither a folder nor an archive"):
    classification.open_source(text)
  (folder / "cat" / "bad.png").write_bytes(b"no image")
  with pytest.raises(ValueError, match="cat/bad.png"):
    classification.DecodedImages(classification.ImageFolder(folder))
  (folder / "cat" / "bad.png").write_bytes(encoded(0, (5, 5))[1])
  with pytest.raises(ValueError, match="one size"):
    classification.DecodedImages(classification.ImageFolder(folder))
  (folder / "loose.png").write_bytes(encoded(0)[1])
  with pytest.raises(ValueError, match="loose.png outside of any class"):
    classification.ImageFolder(folder)


def test_cifar10():
  source = classification.open_source(paths.data_dir("cifar10_jpeg") / "test.tar.xz")
  assert len(source) == 10_000
  assert source.classes[0] == "airplane" and source.classes[9] == "truck"
  np.testing.assert_array_equal(np.bincount(source.labels), np.full(10, 1000))
  assert classification.record_image(source[1234]).shape == (32, 32, 3)


class Draws(np.random.Generator):
  """Stands in for a generator: `random` gives a fixed value."""

  def __init__(self, value):
    super().__init__(np.random.PCG64(0))
    self._value = value

  def random(self):
    return self._value


def test_operations_agree_with_pillow():
  generator = np.random.default_rng(0)
  fill, draws = (1, 2, 3), Draws(0.9)  # signs stay positive, bilinear
  for size, low, high in (((20, 16), 0, 256), ((32, 32), 60, 130), ((4, 4), 7, 8)):
    image = Image.fromarray(generator.integers(low, high, (*size, 3), np.uint8))
    expected = {
      augment._equalize: ImageOps.equalize(image),
      augment._invert: ImageOps.invert(image),
      augment._posterize: ImageOps.posterize(image, 2),
      augment._solarize: ImageOps.solarize(image, 128),
      augment._contrast: ImageEnhance.Contrast(image).enhance(1.45),
      augment._colour: ImageEnhance.Color(image).enhance(1.45),
      augment._brightness: ImageEnhance.Brightness(image).enhance(1.45),
      augment._sharpness: ImageEnhance.Sharpness(image).enhance(1.45),
      augment._rotate: image.rotate(15, Image.Resampling.BILINEAR, fillcolor=fill),
    }
    for operation, result in expected.items():
      np.testing.assert_array_equal(operation(image, 0.5, fill, draws), result, err_msg=operation.__name__)
    stretched = np.asarray(augment._auto_contrast(image, 0.5, fill, draws), int)
    assert np.abs(stretched - np.asarray(ImageOps.autocontrast(image), int)).max() <= 1


def test_augmentation_is_a_function_of_the_generator():
  record = {"image": encoded(0, (32, 32))[0], "label": np.int32(3), "name": "x"}
  for transform in (augment.TrainTransform(size=32, padding=4), augment.TrainTransform(size=24, erasing=1.0)):
    before = record["image"].copy()
    results = []
    for seed in (1, 1, 2):
      results.append(transform(record, np.random.default_rng(seed))["image"])
    assert results[0].shape == (transform.size, transform.size, 3) and results[0].dtype == np.uint8
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])
    np.testing.assert_array_equal(record["image"], before)


def test_every_operation_keeps_size_at_any_magnitude():
  image = Image.fromarray(encoded(1, (9, 13))[0])
  generator = np.random.default_rng(0)
  for magnitude in (0.0, 10.0):
    policy = augment.RandAugment(num_ops=40, magnitude=magnitude, magnitude_std=5, probability=1.0)
    for _ in range(5):
      assert policy(image, generator).size == image.size


def test_crops_stay_inside():
  generator = np.random.default_rng(0)
  image = Image.new("RGB", (40, 6), (9, 9, 9))
  for _ in range(30):
    crop = np.asarray(augment.random_resized_crop(image, (8, 12), generator, scale=(0.3, 1.0)))
    assert crop.shape == (8, 12, 3) and (crop == 9).all()
  pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
  moved = {augment.random_crop_with_padding(pixels, 1, generator).tobytes() for _ in range(200)}
  assert len(moved) == 9 and pixels.tobytes() in moved


def test_evaluation_view():
  pixels = np.zeros((20, 40, 3), np.uint8)
  pixels[:, 10:30] = 200
  record = {"image": pixels, "label": np.int32(1), "name": "x"}
  view = augment.EvalTransform(size=20)(record)
  assert view["image"].shape == (20, 20, 3) and (view["image"] == 200).all()
  assert augment.EvalTransform(size=12, crop_fraction=0.5)(record)["image"].shape == (12, 12, 3)


def mix(**options):
  """Labels [200, 2] and images [200, 2, 8, 8] of 200 mixed batches of a black and a white image."""
  images = jnp.stack([jnp.zeros((8, 8, 1)), jnp.ones((8, 8, 1))])
  keys = jax.random.split(jax.random.key(0), 200)
  run = jax.jit(jax.vmap(lambda key: mixup.mixup_cutmix(images, jnp.eye(2), key, **options)))
  images, labels = run(keys)
  np.testing.assert_allclose(labels.sum(-1), 1.0, rtol=1e-6)
  # Labels follow the pixels: the share of white is the share of the white image's class.
  np.testing.assert_allclose(images.mean((2, 3, 4)), labels[:, :, 1], atol=1e-6)
  return np.asarray(images), np.asarray(labels)


def test_mixup_and_cutmix():
  images, labels = mix(mixup_alpha=0.8, cutmix_alpha=0.0, prob=0.5)
  assert np.ptp(images, axis=(2, 3)).max() < 1e-6
  assert 0.4 < (labels[:, 0, 0] == 1.0).mean() < 0.65
  images, labels = mix(mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=0.25)
  cut = np.ptp(images[:, 0], axis=(1, 2, 3)) > 0
  assert 0.12 < cut.mean() < 0.33
  assert set(np.unique(images[cut])) == {0.0, 1.0}
  assert abs(labels[:, 0, 0].mean() - 0.5) < 0.1
  images = jnp.ones((2, 4, 4, 3))
  assert (
    mixup.mixup_cutmix(images, jnp.eye(2), jax.random.key(0), mixup_alpha=0.0, cutmix_alpha=0.0)[0] is images
  )
  with pytest.raises(ValueError, match="mixup_alpha is -1"):
    mixup.mixup_cutmix(images, jnp.eye(2), jax.random.key(0), mixup_alpha=-1.0)


def test_images_are_held_out_of_every_class(folder):
  source = classification.open_source(folder)
  train, held = classification.hold_out(source, 0.5)
  assert sorted(train.names + held.names) == source.names and not set(train.names) & set(held.names)
  assert [name.split("/")[0] for name in held.names] == ["cat", "dog"]  # the only ant is trained on
  assert held.classes == source.classes and held[1]["name"] == held.names[1]
  assert held[1]["label"] == held.labels[1] == source.classes.index("dog")
  assert held.identity()["file names"] == held.names and len(held.identity()["file sizes"]) == 2
  assert classification.hold_out(source, 0.5)[1].names == held.names
  with pytest.raises(ValueError, match="between 0 and 1"):
    classification.hold_out(source, 1.0)
  for name in ("dog/a.png", "cat/2.png"):
    (folder / name).unlink()
  with pytest.raises(ValueError, match="No class has two images"):
    classification.hold_out(classification.open_source(folder), 0.5)
