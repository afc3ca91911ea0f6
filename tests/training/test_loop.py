"""The training loop: resuming, phases, accumulation, averages, what a run leaves, and what it refuses."""

import json
import os
import shutil
import signal

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frozen_vision.data.detection import photos
from frozen_vision.files import trees
from frozen_vision.runs import checkpoints as checkpoint
from frozen_vision.runs import state_leaves
from frozen_vision.tasks import base, classification
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import loop as train
from frozen_vision.training import optimizer
from frozen_vision.training import step as train_step
from tests import tiny


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  return tiny.image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
  """(config, folder) of a run of four steps whose head alone trains; nobody writes there."""
  config = tiny.classification(images, images)
  config.update(dict(trainable=("head/.*",), steps=4, log_every=1))
  config.optimizer.update(dict(learning_rate=0.01, schedule="linear", warmup_steps=2))
  folder = tmp_path_factory.mktemp("finished")
  train.train(config, folder)
  return config, folder


def _copy(finished, folder):
  config, source = finished
  shutil.copytree(source, folder, dirs_exist_ok=True)
  return config.copy_and_resolve_references()


def _with_everything_random(config):
  """Mixing, augmentation, erasing and stochastic depth, which a resumed run has to repeat."""
  config.backbone.overrides.drop_path_rate = 0.3
  config.ema_decay = 0.9
  config.classification.update(
    dict(rand_augment=dict(num_ops=2), erasing=1.0, mixup=0.8, cutmix=1.0, crop_padding=-1)
  )
  return config


def _final_state(config, workdir):
  """Every leaf of the newest checkpoint as bytes, by path."""
  config = tasks_build.read_config(config)
  task = tasks_build.build_task(config)
  model = train.build_model(task, config)
  tx = optimizer.build(
    config.optimizer, steps=config.steps, trainable=model.trainable, layer_of=model.layer_of
  )
  state = train_step.init_state(model.trainable, tx, seed=config.seed, ema=config.ema_decay > 0)
  with checkpoint.Checkpoints(workdir) as checkpoints:
    state, meta = checkpoints.restore(state)
  state["key"] = jax.random.key_data(state["key"])
  leaves, _ = state_leaves.flatten(state)
  return meta["step"], {path: np.asarray(leaf).tobytes() for path, leaf in leaves.items()}


def _stop_at(monkeypatch, step, number=signal.SIGTERM):
  """Sends the process a signal while it works on a step."""
  original = classification.ClassificationTask.phase_at

  def phase_at(self, at):
    if at == step:
      os.kill(os.getpid(), number)
    return original(self, at)

  monkeypatch.setattr(classification.ClassificationTask, "phase_at", phase_at)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
  """(config, folder, metrics) of a run with everything random that nothing interrupts."""
  config = _with_everything_random(tiny.classification(images, images))
  config.checkpoint_every = 100  # so that only a stop saves before the end
  config.log_every = 1
  folder = tmp_path_factory.mktemp("whole")
  return config, folder, train.train(config, folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_and_continued_equals_uninterrupted(tmp_path, whole, monkeypatch, number):
  config, folder, metrics = whole
  with monkeypatch.context() as patch:
    _stop_at(patch, 2, number)
    assert train.train(config, tmp_path) == {}
  assert checkpoint.Checkpoints(tmp_path).latest_step() == 3
  found = train.train(config, tmp_path)
  step, wanted = _final_state(config, folder)
  assert step == config.steps and any(path.startswith("ema/") for path in wanted)
  assert _final_state(config, tmp_path) == (step, wanted)
  assert {**found, "examples_per_second": 0} == {**metrics, "examples_per_second": 0}
  # Each step is logged once, with the same loss.
  logged = [tiny.metrics(run)["train/loss"] for run in (folder, tmp_path)]
  assert logged[0] == logged[1] and [at for at, _ in logged[0]] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_is_left_as_it_is(tmp_path, finished, caplog):
  config = _copy(finished, tmp_path)
  before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
  with caplog.at_level("INFO"):
    assert train.train(config, tmp_path) == {}
  assert "All 4 steps are done" in caplog.text
  assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
  for path in tmp_path.glob("*.*"):  # of a run that was moved, the checkpoints alone are enough
    path.unlink()
  assert train.train(config, tmp_path) == {} and not list(tmp_path.glob("curves*"))


@pytest.mark.slow
def test_phases_switch_the_program_and_nothing_compiles_late(tmp_path, images, monkeypatch):
  config = _with_everything_random(tiny.classification(images, images))
  config.classification.resolutions = ((0, 8), (3, 16))
  config.update(dict(steps=5, log_every=1, eval_every=2, checkpoint_every=3))
  original = classification.ClassificationTask.loss
  sides = []

  def loss(self, model, batch, features, rng, state):
    losses = original(self, model, batch, features, rng, state)
    sides.append(batch["image"].shape[1])
    return losses._replace(metrics=losses.metrics | {"side": jnp.float32(sides[-1])})

  monkeypatch.setattr(classification.ClassificationTask, "loss", loss)
  metrics = train.train(config, tmp_path)
  series = tiny.metrics(tmp_path)
  assert [value for _, value in series["train/side"]] == [8, 8, 8, 16, 16]
  assert sides == [8, 16]  # traced once each, before the first step
  assert np.isfinite([value for _, value in series["train/loss"]]).all()
  assert [step for step, _ in series["eval/top1"]] == [2, 4, 5]
  assert series["eval/top1"][-1] == (5, metrics["top1"])
  assert series["compilations/after_first_evaluation"] == [(5, 0)]
  assert checkpoint.Checkpoints(tmp_path).latest_step() == 5


@pytest.mark.slow
def test_logging_and_saving_for_the_first_time_after_an_evaluation_compiles_nothing(tmp_path, images):
  config = tiny.classification(images, images)
  config.update(dict(steps=5, log_every=4, eval_every=1, checkpoint_every=3, ema_decay=0.5))
  config.optimizer.update(dict(warmup_steps=2, clip_norm=1.0))
  jax.clear_caches()  # nothing is left over from other tests
  train.train(config, tmp_path)
  assert tiny.metrics(tmp_path)["compilations/after_first_evaluation"] == [(5, 0)]


def test_the_learning_rate_that_is_logged(finished):
  rates = [value for _, value in tiny.metrics(finished[1])["train/learning_rate"]]
  np.testing.assert_allclose(rates, [0, 0.005, 0.01, 0.005], rtol=1e-5)


def test_the_average_is_what_is_evaluated(tmp_path, images, monkeypatch):
  config = tiny.classification(images, images)
  config.ema_decay = 0.9
  config.optimizer.learning_rate = 1e-2
  seen = []
  original = classification.ClassificationTask.evaluator

  def evaluator(self):
    result = original(self)
    update = result.update

    def recorded(predictions, batch):
      seen.append(predictions["logits"])
      update(predictions, batch)

    result.update = recorded
    return result

  monkeypatch.setattr(classification.ClassificationTask, "evaluator", evaluator)
  train.train(config, tmp_path)
  task = tasks_build.build_task(config)
  model = train.build_model(task, config)
  parts = {"ema": model.trainable, "trainable": model.trainable}
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    state, _ = checkpoints.restore(parts, partial=True)
  predict = jax.jit(train_step.make_predict_step(task, model.graphdef))
  with task.eval_batches() as batches:
    batch = train_step.device_batch(next(batches))
  logits = {
    name: np.asarray(predict(state[name], model.mutable, model.frozen, batch)["logits"]) for name in parts
  }
  np.testing.assert_allclose(seen[0], logits["ema"], atol=1e-5)
  assert np.abs(seen[0] - logits["trainable"]).max() > 1e-3


class _WithoutBackbone:
  """As much of a task as the train step needs."""

  def prepare(self, batch, rng, phase):
    return batch

  def features(self, model, batch, rng):
    return ()


def test_the_average_follows_its_rule():
  params = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
  graphdef = nnx.graphdef(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))

  class Task(_WithoutBackbone):
    def loss(self, model, batch, features, rng, state):
      return base.Losses({"sum": jnp.sum(model.kernel[...]) + jnp.sum(model.bias[...])}, {})

  tx = optax.sgd(1.0)  # every parameter falls by 1 a step
  step = train_step.make_train_step(Task(), graphdef, tx, ema_decay=0.25, frozen_pass=False)
  state = train_step.init_state(params, tx, seed=0, ema=True)
  start = wanted = np.asarray(state["trainable"]["bias"][...])
  for at in range(4):
    state, scalars = jax.jit(step)(state, nnx.State({}), {"image": jnp.zeros((1, 1))})
    decay = min(0.25, (1 + at) / (10 + at))
    wanted = decay * wanted + (1 - decay) * (start - at - 1)
    np.testing.assert_allclose(state["ema"]["bias"][...], wanted, rtol=1e-5)
  assert int(state["step"]) == 4
  np.testing.assert_allclose(scalars["grad_norm"], np.sqrt(6), rtol=1e-6)


@pytest.mark.parametrize("policy", [(".*",), ("head/.*",)])
def test_accumulated_gradients_are_those_of_the_whole_batch(images, policy):
  config = tiny.classification(images, images)
  config.batch_size = 8
  config.trainable = policy
  task = tasks_build.build_task(config)
  model = train.build_model(task, config)
  tx = optax.sgd(1.0)  # an update is the gradient, negated
  with task.train_batches(0) as batches:
    batch = train_step.device_batch(next(batches))
  results = {}
  for accumulate in (1, 4):
    step = train_step.make_train_step(
      task, model.graphdef, tx, accumulate=accumulate, frozen_pass=model.frozen_pass
    )
    state = train_step.init_state(model.trainable, tx, seed=0, ema=False)
    new, scalars = jax.jit(step)(state, model.frozen, batch)
    grads = jax.tree.map(lambda old, leaf: old - leaf, model.trainable, new["trainable"])
    results[accumulate] = trees.flatten(grads), scalars
  (wanted, scalars), (found, more_scalars) = results.values()
  largest = max(float(jnp.abs(leaf).max()) for leaf in wanted.values())
  assert largest > 1e-3
  for path in wanted:
    np.testing.assert_allclose(
      found[path], wanted[path], rtol=1e-4, atol=1e-6 * max(largest, 1), err_msg=path
    )
  for name in scalars:
    np.testing.assert_allclose(more_scalars[name], scalars[name], rtol=1e-4)


def test_micro_batches_have_different_random_numbers(images):
  config = tiny.classification(images, images)

  class Task(_WithoutBackbone):
    def loss(self, model, batch, features, rng, state):
      return base.Losses({"noise": jax.random.uniform(rng) * jnp.sum(model.kernel[...])}, {})

  module = nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0))
  tx = optax.sgd(1.0)
  gradients = set()
  for accumulate in (1, 2, 4):
    step = train_step.make_train_step(
      Task(), nnx.graphdef(module), tx, accumulate=accumulate, frozen_pass=False
    )
    state = train_step.init_state(nnx.state(module), tx, seed=0, ema=False)
    new, _ = step(state, nnx.State({}), {"image": jnp.zeros((4, 1))})
    gradients.add(float((module.kernel[...] - new["trainable"]["kernel"][...])[0, 0]))
  assert len(gradients) == 3
  config.accumulate = 3
  with pytest.raises(ValueError, match="batch_size is 4; expected a multiple of 3"):
    train.train(config, "unused")


@pytest.mark.slow
def test_detection_leaves_everything_that_a_person_reads(tmp_path):
  config = tiny.detection()
  config.update(dict(steps=4, eval_every=2, checkpoint_every=2, pictures=2, log_every=2))
  metrics = train.train(config, tmp_path / "run")
  run = tmp_path / "run"
  series = tiny.metrics(run)
  assert series["compilations/after_first_evaluation"] == [(4, 0)]
  assert [step for step, _ in series["eval/mask_AP"]] == [2, 4]
  for key in (
    "train/loss",
    "train/grad_norm",
    "train/learning_rate",
    "speed/images_per_s",
    "speed/data_wait",
    "eval/box_AP",
    "eval/box_AP50",
    "eval/mask_AP50",
  ):
    assert key in series, key
  assert json.loads((run / "config.json").read_text())["steps"] == 4
  assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "4"]
  assert len(list((run / "pictures").glob("*.png"))) == 2 and list(run.glob("curves*.png"))
  truth = json.loads((run / "ground_truth.json").read_text())
  ids = {image["id"] for image in truth["images"]}
  detections = json.loads((run / "detections.json").read_text())
  assert detections and {entry["image_id"] for entry in detections} <= ids
  assert {"image_id", "category_id", "bbox", "score", "segmentation"} <= set(detections[0])
  per_class = json.loads((run / "per_class.json").read_text())
  assert list(per_class) == [category["name"] for category in truth["categories"]]
  known = [row["mask_AP50"] for row in per_class.values() if row["mask_AP50"] > -1]
  assert np.mean(known) == pytest.approx(metrics["mask_AP50"], abs=1e-9)

  # Evaluation needs what trained and nothing else, in any folder.
  alone = tmp_path / "alone"
  shutil.copytree(run / "checkpoints" / "4", alone / "checkpoints" / "4")
  again = train.evaluate(config, alone)
  for values in (metrics, again):
    values.pop("examples_per_second")
  assert again == metrics
  assert json.loads((alone / "detections.json").read_text()) == detections

  # Other frozen features are refused: both keys and what differs are shown.
  config.seed = 1
  with pytest.raises(ValueError) as caught:
    train.evaluate(config, alone)
  message = str(caught.value)
  assert "trained on other frozen features" in message and "checkpoint:" in message
  assert "backbone:" in message and "differing:\n    weights:" in message
  config.seed = 0
  config.backbone.overrides.window_sizes = (8, 4, 4, 2)
  with pytest.raises(ValueError, match=r"window_sizes: \[4, 4, 4, 2\] in the checkpoint, \[8, 4, 4, 2\]"):
    train.evaluate(config, alone)


@pytest.mark.slow
def test_unlabelled_validation_images_get_detections_and_no_score(tmp_path, caplog):
  sample = photos.sample_photos()
  content = json.loads(sample.annotations.read_text())
  del content["annotations"]
  unlabelled = tmp_path / "test-dev.json"
  unlabelled.write_text(json.dumps(content))
  config = tiny.detection()
  config.update(dict(steps=2, batch_size=4, accumulate=2, pictures=2, log_every=1))
  config.detection.update(
    dict(
      data="files",
      train=dict(annotations=str(sample.annotations), images=str(sample.images)),
      validation=dict(annotations=str(unlabelled), images=str(sample.images)),
    )
  )
  config.detection.head.score_threshold = 0.001  # above what an untrained head gives 80 classes
  config.data.allow_drops = True  # at 64 px a quarter of the objects is too small to train on
  metrics = train.train(config, tmp_path / "run")
  run = tmp_path / "run"
  assert set(metrics) == {"examples_per_second"}
  assert "no annotations" in caplog.text and not (run / "per_class.json").exists()
  detections = json.loads((run / "detections.json").read_text())
  assert {entry["image_id"] for entry in detections} <= {image["id"] for image in content["images"]}
  assert detections and list((run / "pictures").glob("*.png"))
  series = tiny.metrics(run)
  assert [step for step, _ in series["train/loss"]] == [1, 2]
  assert np.isfinite([value for _, value in series["train/loss"]]).all()


def test_evaluation_without_a_checkpoint(tmp_path, images):
  config = tiny.classification(images, images)
  with pytest.raises(FileNotFoundError, match=f"No checkpoint in {tmp_path}/empty/checkpoints"):
    train.evaluate(config, tmp_path / "empty")
  assert not (tmp_path / "empty").exists()


def test_a_workdir_belongs_to_one_config(tmp_path, finished):
  config = _copy(finished, tmp_path)
  config.optimizer.learning_rate = 0.5
  config.steps = 6
  with pytest.raises(ValueError) as caught:
    train.train(config, tmp_path)
  message = str(caught.value)
  assert "belongs to another config" in message and "steps: 4 there, 6 now" in message
  assert "optimizer.learning_rate: 0.01 there, 0.5 now" in message


@pytest.mark.slow
def test_options_that_change_no_number_may_change(tmp_path, images, monkeypatch):
  config = tiny.classification(images, images)
  config.trainable = ("head/.*",)
  with monkeypatch.context() as patch:
    _stop_at(patch, 2)
    train.train(config, tmp_path)
  config.update(
    dict(log_every=3, eval_every=4, checkpoint_every=5, keep_checkpoints=3, pictures=1, eval_batch_size=2)
  )
  config.loader.threads = 2
  config.headline = "The same run in other words."
  assert train.train(config, tmp_path)["top1"] >= 0
  assert json.loads((tmp_path / "config.json").read_text())["log_every"] == 3


def test_a_config_that_cannot_run_does_not_claim_the_workdir(tmp_path, images):
  config = tiny.classification(images, images)
  config.update(dict(trainable=("head/.*",), steps=2))
  config.backbone.weights = str(tmp_path / "weights.safetensors")
  with pytest.raises(FileNotFoundError, match="config.backbone.weights: .*weights.safetensors"):
    train.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()
  config.backbone.weights = "random"
  train.train(config, tmp_path / "run")


def test_a_failed_run_says_so_and_is_not_saved(tmp_path, images):
  config = tiny.classification(images, images)
  config.update(dict(steps=8, log_every=100, checkpoint_every=1))
  config.optimizer.update(dict(name="sgd", learning_rate=1e30, weight_decay=0.0, schedule="constant"))
  with pytest.raises(FloatingPointError, match=r"Not finite before step \d: \[.*'grad_norm'.*learning_rate"):
    train.train(config, tmp_path)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    step = checkpoints.latest_step()
    task = tasks_build.build_task(config)
    model = train.build_model(task, config)
    assert step is not None and step < 8
    state, _ = checkpoints.restore({"trainable": model.trainable}, partial=True)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_classes_must_agree(tmp_path, images):
  other = tiny.image_folder(tmp_path / "other", classes=2)
  message = r"other does not have the classes of .*images\S*, but 2 classes in place of 3: it lacks 'class2'"
  with pytest.raises(ValueError, match=message):
    tasks_build.build_task(tiny.classification(images, other))
  config = tiny.classification(images, images)
  config.classification.resolutions = ((1, 16), (3, 24))
  with pytest.raises(ValueError, match="expected growing first steps from 0"):
    tasks_build.build_task(config)
