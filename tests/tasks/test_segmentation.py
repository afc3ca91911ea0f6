"""The segmentation task: one loop for every head, label maps at original sizes, files that can be checked."""

import json

import jax
import numpy as np
from PIL import Image
import pytest

from frozen_vision.data.segmentation import label_maps
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import loop as train
from frozen_vision.training import step
from tests import samples, tiny


def recomputed_iou(truth, predicted, num_classes):
  """Another few lines than the evaluator's: sets of pixels, class by class."""
  ious = []
  for c in range(num_classes):
    both = union = 0
    for t, p in zip(truth, predicted):
      known = t != 255
      both += int(np.sum((t == c) & (p == c) & known))
      union += int(np.sum(((t == c) | (p == c)) & known))
    ious.append(both / union if union else None)
  return ious


@pytest.mark.parametrize("head", ["linear", "upernet", "mask2former"])
def test_a_run_leaves_label_maps_that_say_what_the_metrics_say(tmp_path, head):
  config = tiny.segmentation(head)
  config.pictures = 2
  metrics = train.train(config, tmp_path)
  validation = tasks_build.build_task(config)._validation
  predicted, truth = [], []
  for i in range(3):
    name = f"{validation.name(i)}.png"
    predicted.append(np.asarray(Image.open(tmp_path / "label_maps" / name)))
    truth.append(np.asarray(Image.open(tmp_path / "ground_truth" / name)))
    np.testing.assert_array_equal(truth[-1], validation.label(i))
    assert predicted[-1].shape == (64, 64)
  wanted = recomputed_iou(truth, predicted, 7)
  per_class = json.loads((tmp_path / "per_class.json").read_text())
  assert list(per_class) == list(validation.class_names)
  for entry, iou in zip(per_class.values(), wanted):
    assert entry["IoU"] == pytest.approx(iou, abs=1e-12)
  known = [iou for iou in wanted if iou is not None]
  assert metrics["mIoU"] == pytest.approx(sum(known) / len(known), abs=1e-12)
  assert metrics["pixel_accuracy"] == pytest.approx(
    np.mean(np.stack(truth) == np.stack(predicted)), abs=1e-12
  )
  assert list((tmp_path / "pictures").glob("*.png"))
  losses = [value for _, value in tiny.metrics(tmp_path)["train/loss"]]
  assert len(losses) == 4 and np.isfinite(losses).all()
  if head == "linear":  # once: it compiles the prediction again
    assert train.evaluate(config, tmp_path)["mIoU"] == metrics["mIoU"]


@pytest.mark.slow
def test_a_linear_head_learns_the_scenes(tmp_path):
  config = tiny.segmentation("linear")
  config.update(dict(steps=60, batch_size=4, log_every=20, checkpoint_every=60, ema_decay=0.0))
  config.optimizer.learning_rate = 1e-2
  config.segmentation.update(dict(short_sides=(64,), category_max_area=1.0, colour_jitter=False))
  train.train(config, tmp_path)
  losses = [value for _, value in tiny.metrics(tmp_path)["train/loss"]]
  assert losses[-1] < 0.8 * losses[0]


def _evaluated(config):
  """Label maps of the untrained model for the first batch, and the scores of the whole frame."""
  task = tasks_build.build_task(config)
  model = task.build_model()
  with task.eval_batches() as batches:
    batch = next(batches)

  @jax.jit
  def run(batch):
    features = task.features(model, batch, None)
    scores = model.head.predict_semantic(features, batch["image"].shape[1:3])
    outputs = task.predict(model, batch, features)
    return task.to_source(outputs, batch, task.evaluations["val"].largest_size)["label_map"], scores

  found, scores = run(step.device_batch(batch))
  return task, batch, np.asarray(found), np.asarray(scores)


def _files_of_scenes(config, folder):
  root = samples.segmentation_root(folder)
  config.segmentation.update(
    dict(
      data="files",
      root=str(root),
      classes="meta.json",
      train=dict(images="train/images", labels="train/labels"),
      validation=dict(images="val/images", labels="val/labels"),
    )
  )


def test_predictions_are_made_at_the_original_size(tmp_path):
  config = tiny.segmentation("linear")
  _files_of_scenes(config, tmp_path)
  config.segmentation.eval_frame = (64, 96)
  task, batch, found, scores = _evaluated(config)
  assert found.shape[1] >= 90 and found.shape[2] >= 120
  height, width = batch["image_size"][0]
  content = Image.fromarray  # one class at a time, Pillow's own bilinear filter
  resized = np.stack(
    [
      np.asarray(content(scores[0, :height, :width, k]).resize((120, 90), Image.Resampling.BILINEAR))
      for k in range(scores.shape[-1])
    ],
    axis=-1,
  )
  top = np.sort(resized, axis=-1)
  clear = top[..., -1] - top[..., -2] > 1e-5
  assert clear.mean() > 0.99
  np.testing.assert_array_equal(found[0, :90, :120][clear], resized.argmax(-1)[clear])
  evaluator = task.evaluator()
  evaluator.update({"label_map": found}, batch)
  wanted = recomputed_iou(
    [task._validation.label(i) for i in batch["index"]], [row[:90, :120] for row in found], 7
  )
  for entry, iou in zip(evaluator.per_class().values(), wanted):
    assert entry["IoU"] == (None if iou is None else pytest.approx(iou, abs=1e-12))


def test_testing_at_several_scales_mirrored_and_in_windows_runs():
  config = tiny.segmentation("linear")
  plain = _evaluated(config)[2]
  config.segmentation.test.update(dict(scales=(1.0, 0.5), flip=True, window=(32, 32), stride=(16, 16)))
  task, batch, found, _ = _evaluated(config)
  assert batch["image.1"].shape == (2, 32, 32, 3)
  assert found.shape == plain.shape and found.dtype == np.uint8
  assert (found != plain).any() and (found < 7).all()


def test_options_that_do_not_fit_are_named(tmp_path):
  config = tiny.segmentation("linear")
  config.segmentation.head.level = (0,)
  with pytest.raises(
    ValueError, match="segmentation.head.level: linear has no such option; did you mean .*head.levels"
  ):
    tasks_build.build_task(config)
  for key, value, message in (
    ("segmentation.data", "cityscapes", "'cityscapes'; expected scenes, ade20k, files or prepared"),
    ("segmentation.head.name", "fcn", "'fcn'; known: mask2former, plain_mask, upernet, linear"),
  ):
    config = tiny.segmentation("linear")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
      tasks_build.build_task(config)
  config = tiny.segmentation("linear")
  config.segmentation.update(dict(data="files", root=str(tmp_path)))
  with pytest.raises(ValueError, match="needs --config.segmentation.classes=PATH"):
    tasks_build.build_task(config)
  config.segmentation.classes = "classes.json"
  config.segmentation.train.update(dict(images="i", labels="l"))
  with pytest.raises(
    FileNotFoundError, match="segmentation.classes: .*classes.json does not exist.*root=FOLDER"
  ):
    tasks_build.build_task(config)
  config.segmentation.update(dict(data="ade20k", root=str(tmp_path / "absent")))
  with pytest.raises(FileNotFoundError, match="segmentation.root.*absent does not exist. Download ADE"):
    tasks_build.build_task(config)


def _files(root, rng, *, labels=3):
  """Three images of different sizes, `labels` of them labelled."""
  for kind in ("images", "labels"):
    (root / kind).mkdir(parents=True)
  for i, size in enumerate(((40, 60), (64, 48), (30, 30))):
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / "images" / f"{i}.jpg")
    if i < labels:
      label = rng.integers(0, 2, size, dtype=np.uint8)
      (root / "labels" / f"{i}.png").write_bytes(label_maps.encode(label))
  (root / "classes.txt").write_text("one\ntwo\n")


def test_unlabelled_images_are_predicted_and_not_scored(tmp_path):
  rng = np.random.default_rng(0)
  _files(tmp_path / "train", rng)
  _files(tmp_path / "test", rng, labels=1)
  config = tiny.segmentation("linear")
  config.update(dict(steps=1, pictures=3))
  config.segmentation.update(
    dict(
      data="files",
      root=str(tmp_path),
      classes="train/classes.txt",
      train=dict(images="train/images", labels="train/labels"),
      validation=dict(images="test/images", labels="test/labels"),
    )
  )
  with pytest.raises(ValueError, match="2 of 3 images .* have no label image .*: 1.jpg, 2.jpg"):
    tasks_build.build_task(config)
  config.segmentation.unlabelled = "keep"
  metrics = train.train(config, tmp_path / "run")
  assert "mIoU" in metrics
  for name, size in (("0", (60, 40)), ("1", (48, 64)), ("2", (30, 30))):
    with Image.open(tmp_path / "run" / "label_maps" / f"{name}.png") as written:
      assert written.size == size
  per_class = json.loads((tmp_path / "run" / "per_class.json").read_text())
  pixels = [entry["pixels"] for entry in per_class.values()]
  assert sum(pixels) == 40 * 60
