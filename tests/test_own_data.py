"""Data of one's own, from the command line: a COCO JSON and the folder of its images are enough."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
from pycocotools import coco as official_coco
from pycocotools import cocoeval
import pytest

from frozen_vision.data.detection import coco, photos
from tests import tiny

_ROOT = pathlib.Path(__file__).resolve().parent.parent
# COCO's category -> another name and id; neither in COCO's order nor close together.
_CATEGORIES = {1: (70001, "passer-by"), 18: (12, "Stühle"), 9: (5, "cup (any)"), 3: (330, "vehicle")}


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
  """(JSON, folder) of ten photographs under other names, with other categories, image and annotation ids."""
  source = photos.sample_photos()
  content = json.loads(source.annotations.read_text())
  annotations = [row for row in content["annotations"] if row["category_id"] in _CATEGORIES]
  counts = {}
  for row in annotations:
    counts[row["image_id"]] = counts.get(row["image_id"], 0) + 1
  chosen = sorted(counts, key=lambda image: (-counts[image], image))[:10]
  folder = tmp_path_factory.mktemp("own") / "site a"
  folder.mkdir()
  image_ids = {image: 10**12 + 17 * place for place, image in enumerate(chosen)}
  images = []
  for row in content["images"]:
    if row["id"] in image_ids:
      name = f"Straße {chosen.index(row['id'])}.jpg"
      shutil.copy(source.images / row["file_name"], folder / name)
      images.append(dict(id=image_ids[row["id"]], file_name=name, height=row["height"], width=row["width"]))
  rows = [
    {
      **row,
      "id": 5000 - place,
      "image_id": image_ids[row["image_id"]],
      "category_id": _CATEGORIES[row["category_id"]][0],
    }
    for place, row in enumerate(row for row in annotations if row["image_id"] in image_ids)
  ]
  path = folder.parent / "mine.json"
  path.write_text(
    json.dumps(
      dict(
        images=images,
        annotations=rows,
        categories=[dict(id=identity, name=name) for identity, name in _CATEGORIES.values()],
      )
    )
  )
  return path, folder


def test_held_out_images_stay_held_out_as_the_file_grows(own_data):
  source = coco.load_coco(*own_data)
  train, validation = coco.hold_out(source, 0.2, seed=0)

  def ids(part):
    return set(part.image_ids.tolist())

  assert len(train) == 8 and len(validation) == 2
  assert not ids(train) & ids(validation) and ids(train) | ids(validation) == ids(source)
  assert train.categories == validation.categories == source.categories
  assert {row["image_id"] for row in validation.ground_truth["annotations"]} == ids(validation)
  # One image fewer: nothing that was for training becomes held out but to fill a place.
  smaller = source.take(range(9))
  held_out = ids(coco.hold_out(smaller, 0.2, seed=0)[1])
  assert len(held_out) == 2 and len(held_out & ids(validation)) >= 1
  others = {tuple(coco.hold_out(source, 0.2, seed=seed)[1].image_ids) for seed in range(8)}
  assert len(others) > 3


def test_what_cannot_be_held_out(own_data):
  source = coco.load_coco(*own_data)
  with pytest.raises(ValueError, match="held out is 1.5; expected a number between 0 and 1"):
    coco.hold_out(source, 1.5, seed=0)
  with pytest.raises(coco.CocoError, match="of 1 images 1 are held out, and no other"):
    coco.hold_out(source.take([0]), 0.2, seed=0)


def _run(*arguments):
  process = subprocess.run(
    [sys.executable, "-m", "frozen_vision.main", "--config=configs/coco_htc.py:files", *arguments],
    cwd=_ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=900,
  )
  assert process.returncode == 0, process.stdout
  return process.stdout


@pytest.mark.slow
def test_two_paths_train_and_evaluate(own_data, tmp_path):
  annotations, images = own_data
  workdir = tmp_path / "run"
  arguments = [
    f"--workdir={workdir}",
    f"--config.detection.train.annotations={annotations}",
    f"--config.detection.train.images={images}",
  ]
  head = tiny.SMALL_HEAD | dict(max_detections=10)
  arguments += [f"--config.detection.head.{name}={value}" for name, value in head.items()]
  small = {
    "steps": 2,
    "batch_size": 2,
    "log_every": 1,
    "tensorboard": False,
    "pictures": 1,
    "optimizer.warmup_steps": 1,
    "detection.head.name": "mask_rcnn",
    "detection.neck.channels": 8,
    "detection.frame": (64, 64),
    "detection.eval_frame": (64, 64),
  }
  arguments += [f"--config.{name}={value}" for name, value in small.items()]
  output = _run(*arguments)
  assert "8 training and 2 validation images, held out of one file, 4 classes" in output
  series = tiny.metrics(workdir)
  assert [step for step, _ in series["train/loss"]] == [1, 2]

  # The official evaluation of what was written, against the file as it was given.
  held_out = coco.hold_out(coco.load_coco(annotations, images), 0.2, seed=0)[1].image_ids.tolist()
  written = workdir / "detections.json"
  detections = json.loads(written.read_text())
  assert {row["category_id"] for row in detections} <= {identity for identity, _ in _CATEGORIES.values()}
  assert len({row["category_id"] for row in detections}) > 1
  assert {row["image_id"] for row in detections} == set(held_out)
  truth = official_coco.COCO(str(annotations))
  for kind, name in (("bbox", "box"), ("segm", "mask")):
    official = cocoeval.COCOeval(truth, truth.loadRes(str(written)), kind)
    official.params.imgIds = held_out
    official.evaluate()
    official.accumulate()
    official.summarize()
    found = [series[f"eval/{name}_{key}"][-1][1] for key in ("AP", "AP50", "AP75")]
    np.testing.assert_allclose(found, official.stats[:3], atol=1e-9)
  assert list((workdir / "pictures").glob("*.png"))

  output = _run("--mode=evaluate", *arguments)
  assert "Evaluating step 2" in output and json.loads(written.read_text()) == detections
