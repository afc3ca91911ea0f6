"""The loops on a folded backbone: the same run, less memory, and features that are told apart."""

import jax
import numpy as np
import optax
import pytest

from frozen_vision.files import trees
from frozen_vision.freezing import partition
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import loop
from frozen_vision.training import step as train_step
from tests import tiny


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  return tiny.image_folder(tmp_path_factory.mktemp("images"))


def _config(images):
  """A linear classifier on a frozen backbone with two periods of blocks to scan."""
  config = tiny.classification(images, images)
  config.trainable = ("head/.*",)
  config.backbone.overrides.depths = (1, 1, 4, 1)
  config.update(dict(steps=2, checkpoint_every=2))
  return config


def _steps(config, count):
  """(model, losses, trained leaves) of some steps of plain gradient descent."""
  task = tasks_build.build_task(config)
  model = loop.build_model(task, config)
  tx = optax.sgd(0.1)
  state = train_step.init_state(model.trainable, tx, seed=0, ema=False)
  step = jax.jit(train_step.make_train_step(task, model.graphdef, tx, frozen_pass=model.frozen_pass))
  losses = []
  with task.train_batches(0) as batches:
    for _ in range(count):
      state, scalars = step(state, model.frozen, train_step.device_batch(next(batches)))
      losses.append(float(scalars["loss"]))
  return model, losses, trees.flatten(state["trainable"])


def test_a_folded_run_is_the_unfolded_one(images):
  config = _config(images)
  folded, losses, leaves = _steps(config, 3)
  config.backbone.fold = False
  module, wanted_losses, wanted = _steps(config, 3)
  assert folded.storage == "float32, folded" and module.storage == "float32, as they train"
  assert "backbone/stages/2/repeated/0/table" in trees.flatten(folded.frozen)
  assert folded.feature_key == module.feature_key and folded.frozen_parameters == module.frozen_parameters
  np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5)
  assert losses[-1] < losses[0] - 1e-3
  assert list(leaves) == list(wanted)
  for path, leaf in wanted.items():
    np.testing.assert_allclose(leaves[path], leaf, atol=1e-5, err_msg=path)


def test_weights_held_small_train_and_evaluate_and_their_heads_fit_no_others(tmp_path, images, caplog):
  config = _config(images)
  task = tasks_build.build_task(config)
  held = {"float32": partition.num_bytes(loop.build_model(task, config).frozen)}
  for storage in ("bfloat16", "int8"):
    config.frozen_dtype = storage
    caplog.clear()
    with caplog.at_level("INFO"):
      metrics = loop.train(config, tmp_path / storage)
    [line] = [record.getMessage() for record in caplog.records if "are frozen" in record.getMessage()]
    held[storage] = partition.num_bytes(loop.build_model(task, config).frozen)
    assert f"({held[storage] / 1e6:.1f} MB stored as {storage}, folded)" in line
    assert np.isfinite(tiny.metrics(tmp_path / storage)["train/loss"][-1][1])
  assert loop.evaluate(config, tmp_path / "int8")["top1"] == metrics["top1"]
  assert held["int8"] < held["bfloat16"] < held["float32"]

  with pytest.raises(ValueError) as caught:
    loop.evaluate(config, tmp_path / "bfloat16")
  message = str(caught.value)
  assert 'checkpoint: {"weights": ' in message and 'backbone:   {"weights": ' in message
  assert 'differing:\n    storage: "bfloat16" in the checkpoint, "int8" in the backbone' in message
  # A module's norms and position biases are rounded too: other features than a folded backbone's.
  config.frozen_dtype, config.backbone.fold = "bfloat16", False
  with pytest.raises(ValueError, match='"bfloat16" in the checkpoint, "bfloat16, unfolded" in the backbone'):
    loop.evaluate(config, tmp_path / "bfloat16")


def test_what_is_not_folded(images):
  config = _config(images)
  task = tasks_build.build_task(config)
  config.trainable = ("head/.*", "backbone/stages/3/.*")
  model = loop.build_model(task, config)
  assert model.feature_key is None and model.storage == "float32, as they train"
  assert "backbone/stages/2/blocks/3/mlp/fc1/kernel" in trees.flatten(model.frozen)
  config.frozen_dtype = "int8"
  with pytest.raises(ValueError, match="int8 is for a folded backbone.*Take bfloat16"):
    loop.build_model(task, config)
  config.frozen_dtype = "float16"
  with pytest.raises(ValueError, match="frozen_dtype is 'float16'; expected float32, bfloat16 or int8"):
    loop.build_model(task, config)
