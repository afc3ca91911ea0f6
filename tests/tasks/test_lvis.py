"""Detection on LVIS's layout from beginning to end: training, metrics by frequency, and the second stage."""

import json

import numpy as np
import pytest

from frozen_vision.files import trees
from frozen_vision.heads import files as head_files
from frozen_vision.runs import checkpoints as checkpoint
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import loop
from tests import paths, tiny

_IMAGES = 16
_ABSENT = 77  # a category that no image shows


def _lvis_file(root, path):
  """Images of `coco_subset` as LVIS has them: addresses, frequencies, and what they were searched for."""
  raw = json.loads((root / "annotations" / "instances_train2017.json").read_text())
  objects = [row for row in raw["annotations"] if not row["iscrowd"]]
  images_of = {}
  for row in objects:
    images_of.setdefault(row["category_id"], set()).add(row["image_id"])
  ids = sorted(images_of, key=lambda identity: -len(images_of[identity]))[:6]
  chosen = sorted(set().union(*(images_of[identity] for identity in ids)))[:_IMAGES]
  objects = [row for row in objects if row["image_id"] in chosen and row["category_id"] in ids]
  shown = {image: {row["category_id"] for row in objects if row["image_id"] == image} for image in chosen}
  images = []
  for entry in raw["images"]:
    if entry["id"] in chosen:
      absent = sorted(set(ids) - shown[entry["id"]])
      images.append(
        {
          **{key: entry[key] for key in ("id", "height", "width")},
          "coco_url": f"http://images.cocodataset.org/train2017/{entry['file_name']}",
          "neg_category_ids": [*absent[:2], _ABSENT],
          "not_exhaustive_category_ids": sorted(shown[entry["id"]])[:1],
        }
      )
  categories = [
    dict(id=identity, name=str(identity), frequency="ffccrr"[i]) for i, identity in enumerate(ids)
  ]
  categories.append(dict(id=_ABSENT, name="absent", frequency="r"))
  rows = [{**row, "id": i + 1} for i, row in enumerate(objects)]
  path.write_text(json.dumps(dict(images=images, annotations=rows, categories=categories)))
  return path


@pytest.fixture
def config(tmp_path):
  root = paths.data_dir("coco_subset")
  annotations = str(_lvis_file(root, tmp_path / "lvis.json"))
  config = tiny.detection()
  config.update(dict(steps=2, checkpoint_every=2, ema_decay=0.0))
  config.data.allow_drops = True  # many objects are too small for a frame of 64 px
  options = config.detection
  options.data, options.repeat_threshold = "files", 0.5
  for split in (options.train, options.validation):
    split.update(dict(annotations=annotations, images=str(root)))
  options.head.update(dict(with_masks=False, class_loss="sigmoid", federated_classes=4))
  return config


def _trained(workdir, config):
  model = loop.build_model(tasks_build.build_task(config), config)
  with checkpoint.Checkpoints(workdir) as checkpoints:
    trainable, _, _ = checkpoints.restore_evaluated(model.trainable, model.mutable, averaged=False)
  return {path: np.asarray(leaf) for path, leaf in trees.flatten(trainable).items()}


def test_both_stages_of_lvis(tmp_path, config):
  task = tasks_build.build_task(config)
  assert "images of rare classes up to" in task.headline and "searched for" not in task.headline
  with task.train_batches(0) as batches:
    batch = next(batches)
  [absent] = [label for label, row in enumerate(task.classes) if row["id"] == _ABSENT]
  assert batch["negative"].shape == (2, 7) and batch["negative"][:, absent].all()
  metrics = loop.train(config, tmp_path / "first")
  assert {"box_AP", "box_AP_rare", "box_AP_common", "box_AP_frequent", "box_AR_300"} <= set(metrics)

  # The second stage: the classifier alone, by a class-balanced loss.
  first = _trained(tmp_path / "first", config)
  head = tmp_path / "first.safetensors"
  head_files.save(head, first, source="first stage")
  config.detection.init.path = str(head)
  config.detection.repeat_threshold = 0.0
  config.detection.head.update(dict(class_balance=0.9))
  config.trainable = ("head/box_heads/.*/classes/.*",)
  metrics = loop.train(config, tmp_path / "second")
  assert np.isfinite(tiny.metrics(tmp_path / "second")["train/loss"][-1][1]) and "box_AP_rare" in metrics
  second = _trained(tmp_path / "second", config)
  assert set(second) == {f"head/box_heads/0/classes/{name}" for name in ("kernel", "bias")}
  for path, leaf in second.items():
    assert np.any(leaf != first[path]) and np.allclose(leaf, first[path], atol=0.1)

  head_files.save(head, {path: leaf + 1 for path, leaf in first.items()}, source="another first stage")
  with pytest.raises(ValueError, match="frozen parts of neck and head from .*first.safetensors, which holds"):
    loop.evaluate(config, tmp_path / "second")
