"""`--mode=probe`, from a config to its results."""

import json
import shutil
import types

import numpy as np
import pytest

from frozen_vision import config_files, probe
from frozen_vision.probes import suite
from frozen_vision.tasks import build as tasks_build
from tests import tiny


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """Six classes of 24 images each to train on, 8 to validate and 8 to test."""
  folder = tmp_path_factory.mktemp("images")
  for part, images in (("train", 24), ("validation", 8)):
    tiny.image_folder(folder / part, classes=6, images=images)
  shutil.copytree(folder / "validation", folder / "test")
  config = tasks_build.read_config(tiny.classification(folder / "train", folder / "validation"))
  return config.replace(
    {
      "eval_batch_size": 24,
      "classification.probe.episodes": 10,
      "classification.probe.shots": (5, 20),
      "classification.test": str(folder / "test"),
    }
  )


def test_results_are_written(config, tmp_path):
  found = probe.probe(config, tmp_path)
  assert found == json.loads((tmp_path / "probe.json").read_text())
  assert found["examples"] == {"train": 144, "validation": 48, "test": 48}
  assert found["validation_data"] == "given" and found["seed"] == config.seed
  assert found["linear"]["test"] > 0.3  # each class has a colour of its own
  assert set(found["knn"]) == {"10", "20", "100"}  # 192 images vote, fewer than 200
  assert set(found["few_shot"]) == {"5", "20"} and found["few_shot"]["20"]["classes"] == 6
  assert len(found["backbone"]["key"]["weights"]) >= 32
  with np.load(tmp_path / "examples.npz") as examples:
    assert examples["linear"].shape == (48,) and examples["linear"].mean() == found["linear"]["test"]
    assert examples["knn_20"].mean() == found["knn"]["20"]
    assert examples["few_shot_5"].mean() == pytest.approx(found["few_shot"]["5"]["mean"])
  page = (tmp_path / "probe.md").read_text()
  assert page.startswith(
    "# swinv2_nano (random), frozen\n\n144 training, 48 validation and 48 test images at 16 px;"
  )
  # The same again: no chance but the seed.
  assert probe.probe(config, tmp_path / "again") == found


def test_without_test_data_a_part_of_training_is_held_out(config, tmp_path, monkeypatch):
  seen = []

  def run(*parts, **options):
    seen.append((parts, options))
    counts = dict(zip(("train", "validation", "test"), (len(part.labels) for part in parts)))
    return types.SimpleNamespace(to_dict=lambda: {"examples": counts}, to_text=lambda: "", examples={})

  monkeypatch.setattr(suite, "run", run)
  found = probe.probe(config.replace({"classification.test": "", "seed": 1}), tmp_path)
  assert found["examples"] == {"train": 116, "validation": 28, "test": 48}
  assert found["validation_data"] == "20% of the training data"
  [((train, validation, test), options)] = seen
  assert options["seed"] == 1 and options["metric"] == "top1" and options["episodes"] == 10
  np.testing.assert_array_equal(np.bincount(np.append(train.labels, validation.labels)), [24] * 6)
  np.testing.assert_array_equal(np.bincount(test.labels), [8] * 6)


def test_another_task_is_refused():
  with pytest.raises(ValueError, match="config.task is 'action'.*configs/classification.py"):
    probe.probe(tiny.action(), "unused")


def test_the_shipped_config_opens_its_data():
  config = config_files.load_config("classification", {"classification.shapes.train_images": 12})
  task = tasks_build.build_task(config)
  assert [len(source) for source in task.sources.values()] == [12, 300, 300]
  names = [category["name"] for category in task.classes]
  assert names == ["disc", "rectangle", "triangle", "star", "ring", "cross"]
  example = next(task.train_batches(0))
  assert example["image"].shape == (64, 64, 64, 3)
  files = config_files.load_config("classification:files")
  assert files.backbone.weights == "efficientnet_lite0" and files.classification.data == "files"


def test_shapes_follow_from_their_seed():
  config = config_files.load_config("classification")
  sources = tasks_build.build_task(config).sources
  records = {split: source[7] for split, source in sources.items()}
  assert all(record["label"] == 1 and record["image"].shape == (64, 64, 3) for record in records.values())
  images = [record["image"] for record in records.values()]
  assert not any(np.array_equal(images[i], images[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
  np.testing.assert_array_equal(sources["train"][7]["image"], images[0])
  assert type(sources["train"])(8, seed=1)[7]["image"].tobytes() != images[0].tobytes()
  with pytest.raises(ValueError, match="image_size is 16"):
    type(sources["train"])(8, image_size=16)
