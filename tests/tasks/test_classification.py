"""Classification on published sets: what is trained and tested on, and several labels an image."""

import types

from flax import nnx
import jax
import numpy as np
import pytest

from frozen_vision.data import batches, classes
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import loop
from tests import tiny
from tests.data.classification import published


def _config(name, root, **changes):
  benchmark = {"name": name, "root": str(root), "held_out": 0.34}
  config = tasks_build.read_config(tiny.classification())
  options = {"data": "benchmark", "benchmark": benchmark, "label_smoothing": 0.0} | changes
  return config.replace({"classification": options, "steps": 2, "batch_size": 3, "eval_batch_size": 3})


def test_a_part_is_held_out_where_there_is_no_validation_data(tmp_path):
  published.cars(tmp_path)
  task = tasks_build.build_task(_config("cars", tmp_path))
  assert {name: len(source) for name, source in task.parts.items()} == {"train": 6, "test": 6}
  assert {name: len(source) for name, source in task.sources.items()} == {
    "train": 4,
    "validation": 2,
    "test": 6,
  }
  train, held = task.sources["train"], task.sources["validation"]
  assert sorted(train.names + held.names) == sorted(task.parts["train"].names)
  with pytest.raises(ValueError, match="benchmark.held_out: 0.1 of .* leaves none to validate on"):
    tasks_build.build_task(_config("cars", tmp_path).replace({"classification.benchmark.held_out": 0.1}))


def test_refitting_trains_on_all_but_the_test_data(tmp_path):
  published.flowers(tmp_path)
  task = tasks_build.build_task(_config("flowers", tmp_path, refit=True))
  assert len(task.sources["train"]) == 6 and task.sources["validation"] is task.parts["test"]
  assert task.best_metric == "mean_per_class" and task.evaluator().per_class
  published.cars(tmp_path)
  task = tasks_build.build_task(_config("cars", tmp_path, refit=True, decoded_cache=True))
  assert len(task.sources["train"]) == 6 and task.best_metric == "top1"
  with pytest.raises(ValueError, match="give --config.classification.test=FOLDER"):
    train = tiny.image_folder(tmp_path / "train")
    config = tasks_build.read_config(tiny.classification(train, train))
    tasks_build.build_task(config.replace({"classification.refit": True}))


def test_several_labels_an_image_are_trained_and_scored(tmp_path):
  published.voc2007(tmp_path, classes.VOC)
  config = _config("voc2007", tmp_path)
  task = tasks_build.build_task(config)
  assert task.best_metric == "map11" and len(task.classes) == 20
  batch = next(task.train_batches(0))
  assert not batches.mismatches(batch, batches.MultiLabelBatch)
  assert {name: value.shape for name, value in task.blank_example().items()} == {
    name: value.shape[1:] for name, value in batch.items() if name != "index"
  }
  rng = jax.random.key(0)
  model = types.SimpleNamespace(head=nnx.Linear(5, 20, rngs=nnx.Rngs(0)))
  prepared = task.prepare(batch, rng, None)
  features = (jax.random.normal(rng, (3, 5)),)
  losses = task.loss(model, prepared, features, rng, None)
  outputs = task.predict(model, prepared, features)
  logits, truth = np.asarray(outputs["logits"], np.float64), np.asarray(batch["label"])
  probabilities = 1 / (1 + np.exp(-logits))
  np.testing.assert_allclose(outputs["probabilities"], probabilities, rtol=1e-5)
  expected = -np.mean(truth * np.log(probabilities) + (1 - truth) * np.log(1 - probabilities))
  assert float(losses.terms["cross_entropy"]) == pytest.approx(expected, rel=1e-5) and truth.sum() == 4
  metrics = loop.train(config.replace({"trainable": ("head/.*",)}), tmp_path / "run")
  assert 0 < metrics["map11"] <= 1 and "top1" not in metrics


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"benchmark": {"name": "mnist"}}, "'mnist' is no known set; known: aircraft"),
    ({"benchmark": {"name": "isic"}}, "'isic', which has no split to train on"),
    ({"metric": "map11"}, "metric is 'map11', but images have one label; expected auto"),
    ({"data": "benchmark", "benchmark": {"name": "voc2007"}}, "label_smoothing is 0.1.*expected 0"),
    ({"data": "benchmark", "benchmark": {"name": "voc2007"}, "metric": "top1"}, "images have several labels"),
  ],
)
def test_options_that_contradict_each_other(changes, message):
  config = tasks_build.read_config(tiny.classification())
  with pytest.raises(ValueError, match=message):
    config.replace({"classification": {"label_smoothing": 0.1} | changes})
