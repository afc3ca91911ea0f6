"""`python -m frozen_vision.transfer`: several sets and backbones, kept results, and errors."""

import dataclasses
import json
import types

import numpy as np
from PIL import Image
import pytest

from frozen_vision import transfer
from frozen_vision.config import BackboneOptions
from frozen_vision.data import classes as class_names
from frozen_vision.data.classification import benchmarks
from frozen_vision.freezing import embeddings, prepare
from frozen_vision.probes import linear
from frozen_vision.report import entries
from tests import tiny

_SETTINGS = transfer.Settings(image_size=16, shots=(2, 50), episodes=5, neighbours=(3,))
_VOC_IMAGES = 60


def _entry(label, **overrides):
  options = BackboneOptions("swinv2_nano", "random", overrides=tiny.SMALL_BACKBONE | overrides)
  return entries.Entry(label, label, options, "random", "")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Pets as folders of classes, VOC 2007 and EuroSAT in their own layouts."""
  root = tmp_path_factory.mktemp("data")
  for part, images in (("train", 10), ("test", 9)):
    tiny.image_folder(root / "pets" / part, classes=5, images=images)
  tiny.image_folder(root / "EuroSAT" / "2750", classes=5, images=17)
  voc = root / "VOCdevkit" / "VOC2007"
  lists = voc / "ImageSets" / "Main"
  for folder in (lists, voc / "JPEGImages"):
    folder.mkdir(parents=True)
  rng = np.random.default_rng(0)
  for start, split in enumerate(("train", "val", "test")):
    names = [f"{start * _VOC_IMAGES + number:06d}" for number in range(_VOC_IMAGES)]
    (lists / f"{split}.txt").write_text("\n".join(names))
    for column, name in enumerate(class_names.VOC):
      values = [1 if column in (number % 20, (number + 7) % 20) else -1 for number in range(_VOC_IMAGES)]
      lines = [f"{image} {value:2d}" for image, value in zip(names, values)]
      (lists / f"{name}_{split}.txt").write_text("\n".join(lines))
    for name in names:
      Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(voc / "JPEGImages" / f"{name}.jpg")
  return root


def test_sets_backbones_and_seeds(data, tmp_path, monkeypatch):
  monkeypatch.setattr(linear, "GRID", (1.0, 100.0))
  shared = prepare.Backbones()
  # Weights of a file: the same whatever the seed.
  fixed = types.SimpleNamespace(of=lambda config: shared.of(dataclasses.replace(config, seed=0)))
  monkeypatch.setattr(prepare, "Backbones", lambda: fixed)
  sets = transfer.open_sets([], data)
  assert list(sets) == ["pets", "voc2007", "eurosat"]
  backbones = [_entry("one"), _entry("two", residual_norm_init=0.5)]
  options = dict(settings=_SETTINGS, batch_size=60)
  found = transfer.run(backbones, sets, tmp_path, **options)
  for label in ("one", "two"):
    pets, voc, eurosat = (found["results"][name][label][0] for name in sets)
    assert pets["examples"] == {"train": 40, "validation": 10, "test": 45} and set(pets["knn"]) == {"3"}
    assert pets["linear"]["metric"] == "mean_per_class" and 0 <= pets["linear"]["test"] <= 1
    assert voc["linear"]["metric"] == "map11" and set(voc) == {"examples", "linear", "knn", "few_shot"}
    assert voc["examples"] == {"train": 60, "validation": 60, "test": 60} and not voc["few_shot"]
    assert set(eurosat["few_shot"]) == {"2"} and "linear" not in eurosat
    assert eurosat["few_shot"]["2"]["mean"] > 0.3  # each class has a colour of its own
  page = (tmp_path / "transfer.md").read_text()
  for section in (
    "| Oxford-IIIT Pets, mean accuracy of classes | PASCAL VOC 2007, mean AP at 11 points | mean |",
    "## 5-way 2-shot\n\n5 episodes, nearest class mean, ± the 95% interval of the mean.",
    "| backbone | Oxford-IIIT Pets | EuroSAT | mean |",
  ):
    assert section in page
  assert "50-shot" not in page
  assert json.loads((tmp_path / "transfer.json").read_text())["results"] == found["results"]

  # What is there is not computed again: not the results, and with another seed not the embeddings.
  passes = []
  monkeypatch.setattr(embeddings, "_embed", lambda *unused: passes.append(1))
  pets = {"pets": sets["pets"]}
  again = transfer.run(backbones[:1], pets, tmp_path, seeds=(0, 1), **options)
  first, second = again["results"]["pets"]["one"]
  assert first == found["results"]["pets"]["one"][0] and second["linear"] != first["linear"]
  assert "± the standard deviation over seeds 0, 1" in (tmp_path / "transfer.md").read_text()
  fewer = dataclasses.replace(_SETTINGS, episodes=7)
  other = transfer.run(backbones[:1], pets, tmp_path, settings=fewer, batch_size=60)
  [result] = other["results"]["pets"]["one"]
  assert result["linear"] == first["linear"] and result["few_shot"] != first["few_shot"]
  assert not passes


def test_sets_by_name_and_path(data, tmp_path):
  with pytest.raises(
    ValueError, match="'mine' is no known set, and .* is no folder of images; known are aircraft"
  ):
    transfer.open_sets([f"mine={tmp_path / 'absent'}"], data)
  with pytest.raises(ValueError, match="names 'pets' twice"):
    transfer.open_sets(["pets", f"pets={data}"], data)
  with pytest.raises(ValueError, match="names 'pets' without a folder; give --data=FOLDER or pets=PATH"):
    transfer.open_sets(["pets"], None)
  for part in ("train", "test"):  # of one's own, and no published set
    tiny.image_folder(tmp_path / part, images=1)
  with pytest.raises(FileNotFoundError, match="holds none of the sets aircraft.* give --sets=mine="):
    transfer.open_sets([], tmp_path)
  with pytest.raises(FileNotFoundError, match="Oxford-IIIT Pets is not in"):
    transfer.open_sets(["pets"], tmp_path)
  assert list(transfer.open_sets([f"pets={tmp_path}"], None)["pets"].parts) == ["train", "test"]
  found = transfer.open_sets([f"mine={data / 'pets'}", f"few={data / 'EuroSAT' / '2750'}", "eurosat"], data)
  assert {name: list(each.parts) for name, each in found.items()} == {
    "mine": ["train", "test"],
    "few": ["all"],
    "eurosat": ["all"],
  }
  assert found["mine"].metric == "top1" and found["eurosat"].title == benchmarks.BENCHMARKS["eurosat"].title


def test_unreadable_images_are_counted_and_many_refused(data, tmp_path):
  tiny.image_folder(tmp_path / "few", classes=6, images=2)
  broken = sorted((tmp_path / "few").rglob("*.*"))[:2]
  broken[0].write_bytes(b"no image")
  found = transfer.open_sets([f"mine={tmp_path / 'few'}"], None)
  assert len(found["mine"].parts["all"]) == 11
  broken[1].write_bytes(b"no image")
  with pytest.raises(ValueError, match="mine, all: 2 of 12 images would be left out"):
    transfer.open_sets([f"mine={tmp_path / 'few'}"], None)


def test_sets_and_seeds_that_cannot_be(data, tmp_path):
  for name in ("../mine", "", "a/b"):
    with pytest.raises(ValueError, match=f"--sets has the name {name!r}, which a folder of results cannot"):
      transfer.open_sets([f"{name}={data / 'pets'}"], None)
  tiny.image_folder(tmp_path / "few", classes=4, images=3)
  with pytest.raises(ValueError, match="few has images of 4 classes and no train and test folders"):
    transfer.open_sets([f"few={tmp_path / 'few'}"], None)
  with pytest.raises(ValueError, match="--seeds is 0 0; expected one or more different numbers"):
    transfer.run([], {}, tmp_path / "out", seeds=(0, 0))
  with pytest.raises(SystemExit):
    transfer.main(["--backbones=swinv2_nano", f"--workdir={tmp_path}", "--seeds", "-1"])


def test_errors_of_the_command_are_one_sentence(data, tmp_path, capsys):
  command = ["--backbones=swinv2_x", f"--data={data}", "--sets=eurosat", f"--workdir={tmp_path}"]
  assert transfer.main(command) == 1
  assert "swinv2_x" in capsys.readouterr().err
  assert transfer.main([*command, "--sets=dtd"]) == 1
  assert "Error: Describable Textures is not in" in capsys.readouterr().err
  assert not list(tmp_path.iterdir())
  with pytest.raises(SystemExit):
    transfer.main([*command, "--episodes=0"])
