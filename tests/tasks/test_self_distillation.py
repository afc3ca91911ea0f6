"""Self-distillation: two steps against PyTorch, crops, and a run to its end whose teacher becomes a file."""

import pathlib
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import export_backbone
import frozen_vision
from frozen_vision.backbones import base as backbones
from frozen_vision.config import OptimizerOptions
from frozen_vision.data import batches
from frozen_vision.data.classification import views
from frozen_vision.files import trees
from frozen_vision.freezing import partition
from frozen_vision.runs import checkpoints as checkpoint
from frozen_vision.tasks import build as tasks_build
from frozen_vision.tasks import self_distillation
from frozen_vision.training import loop, optimizer
from frozen_vision.training import step as step_lib
from tests import comparing, tiny

_GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "self_distillation.npz"


class _MeanColour(nnx.Module):
  """A backbone of one linear layer on mean colours, which takes images of any size as they are."""

  embed_dim = 8
  preprocessing = backbones.Preprocessing(mean=(0.0,) * 3, std=(1 / 255,) * 3)

  def __init__(self):
    self.layer = nnx.Linear(3, 8, rngs=nnx.Rngs(0))

  def embed(self, images, *, rng=None):
    return self.layer(images.mean(axis=(1, 2)))


def _theirs(golden, kind, path):
  """The reference's array of our parameter."""
  match path.split("/"):
    case ["backbone", "layer", last]:
      name = f"encoder.{'weight' if last == 'kernel' else 'bias'}"
    case ["head", "layers", number, last]:
      name = f"mlp.{2 * int(number)}.{'weight' if last == 'kernel' else 'bias'}"
    case ["head", "prototypes", last]:
      name = {"kernel": "weight_v", "norm": "weight_g"}[last]
  array = golden[f"{kind}.{name}"]
  return array if path.endswith("bias") else array.T


def _assert_close(found, golden, kind):
  leaves = trees.flatten(found)
  assert len(leaves) == len([name for name in golden if name.startswith(f"{kind}.")])
  for path, value in leaves.items():
    wanted = _theirs(golden, kind, path)
    np.testing.assert_allclose(value, wanted, atol=1e-5 * np.abs(wanted).max(), err_msg=f"{kind} {path}")


def test_two_steps_are_those_of_an_independent_implementation():
  golden = np.load(_GOLDEN)
  changes = {
    "steps": 4,
    "ema_decay": 0.9,
    "self_distillation.image_size": 2,
    "self_distillation.local_crops": 3,
    "self_distillation.hidden": 16,
    "self_distillation.bottleneck": 6,
    "self_distillation.prototypes": 10,
    "self_distillation.fixed_norm": False,
    "self_distillation.teacher_temperature": 0.07,
    "self_distillation.temperature_steps": 2,
  }
  task = self_distillation.SelfDistillationTask(
    tasks_build.read_config(tiny.self_distillation()).replace(changes), classes=()
  )
  graphdef, trainable, mutable, frozen = partition.split(task.build_model(_MeanColour()), (".*",))
  trainable = nnx.from_flat_state(
    [
      (path, leaf.replace(jnp.asarray(_theirs(golden, "before", trees.path_string(path)))))
      for path, leaf in nnx.to_flat_state(trainable)
    ]
  )
  own = task.initial_state(nnx.merge(graphdef, trainable, mutable, frozen))

  def start(tx):
    state = step_lib.init_state(trainable, tx, seed=0, ema=True, mutable=mutable, task_state=own)
    step = step_lib.make_train_step(
      task, graphdef, tx, ema_decay=task.average_decay, averaged_teacher=True, frozen_pass=False
    )
    return state, jax.jit(step)

  def batch(number):
    keys = {"image": "first", "second_image": "second", "local_images": "local"}
    return {ours: golden[f"{theirs}.{number}"] for ours, theirs in keys.items()}

  state, step = start(optax.sgd(0.5, momentum=0.0))  # its state is the gradient
  state, _ = step(state, frozen, batch(0))
  _assert_close(state["opt_state"][0].trace, golden, "grad")

  options = OptimizerOptions(
    name="sgd",
    learning_rate=0.5,
    momentum=0.0,
    weight_decay=0.0,
    schedule="constant",
    delayed=("head/prototypes/.*",),
    delay_steps=1,
  )
  state, step = start(optimizer.build(options, steps=4, trainable=trainable, layer_of=lambda path: 0))
  for number in range(2):
    state, scalars = step(state, frozen, batch(number))
    np.testing.assert_allclose(scalars["loss"], golden[f"loss.{number}"], rtol=1e-5)
    np.testing.assert_allclose(state["task"]["center"], golden[f"center.{number}"], atol=1e-6)
  _assert_close(state["trainable"], golden, "after")
  _assert_close(state["ema"], golden, "teacher")
  assert state["task"]["step"] == 2


def test_options_that_do_not_go_together_are_refused():
  config = tiny.self_distillation()
  config.accumulate, config.ema_decay = 2, 0.9
  with pytest.raises(ValueError, match="accumulate is 2; the center .* takes 1"):
    tasks_build.read_config(config)
  config.accumulate, config.ema_decay = 1, 0.0
  with pytest.raises(ValueError, match="ema_decay is 0; .* expected its momentum"):
    tasks_build.read_config(config)


def test_local_crops_are_smaller_and_each_is_drawn_anew():
  image = np.random.default_rng(0).integers(0, 255, (40, 30, 3)).astype(np.uint8)
  record = {"image": image, "label": 3, "name": "x"}
  two = views.TwoViews(views.View(16), views.View(16))
  example = views.MultiCrop(two, views.View(8), 3)(record, np.random.default_rng(0))
  assert batches.mismatches(example, batches.MultiCropBatch) == []
  local = example["local_images"]
  assert local.shape == (3, 8, 8, 3) and len(np.unique(local.reshape(3, -1), axis=0)) == 3
  without = views.MultiCrop(two, views.View(8), 0)(record, np.random.default_rng(0))
  assert "local_images" not in without
  np.testing.assert_array_equal(without["image"], example["image"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """The workdir of four steps, and its metrics."""
  workdir = tmp_path_factory.mktemp("dino") / "run"
  return workdir, loop.train(tiny.self_distillation(), workdir)


def _state(workdir, step):
  """Arrays of a checkpoint that change while training, apart from the optimizer's."""
  config = tasks_build.read_config(tiny.self_distillation())
  task = tasks_build.build_task(config, ())
  model = loop.build_model(task, config)
  own = task.initial_state(nnx.merge(model.graphdef, model.trainable, model.mutable, model.frozen))
  state = step_lib.init_state(
    model.trainable, optimizer.of_run(config, model), seed=0, ema=True, mutable=model.mutable, task_state=own
  )
  with checkpoint.Checkpoints(workdir) as checkpoints:
    return checkpoints.restore(state, step)[0]


def test_it_trains_and_continues_to_the_bit(trained, tmp_path):
  workdir, metrics = trained
  logged = tiny.metrics(workdir)
  assert {"train/loss/cross_entropy", "train/momentum", "train/teacher_entropy", "eval/knn"} < set(logged)
  np.testing.assert_allclose([value for _, value in logged["train/momentum"]][0], 0.9, atol=1e-6)
  before, after = _state(workdir, 2), _state(workdir, 4)
  assert np.abs(after["task"]["center"]).max() > 0 and after["task"]["step"] == 4
  first = trees.flatten(before["trainable"])["head/prototypes/kernel"]
  initial = tasks_build.build_task(tiny.self_distillation(), ()).build_model().head.prototypes.kernel[...]
  np.testing.assert_array_equal(first, initial)  # delayed by two steps
  assert np.abs(trees.flatten(after["trainable"])["head/prototypes/kernel"] - initial).max() > 0
  copy = tmp_path / "run"
  shutil.copytree(workdir, copy)
  shutil.rmtree(copy / "checkpoints" / "4")
  assert loop.train(tiny.self_distillation(), copy)["knn"] == metrics["knn"]
  comparing.assert_equal(_state(copy, 4), after)


def test_the_teacher_becomes_a_file(trained, tmp_path):
  workdir, metrics = trained
  path = tmp_path / "teacher.safetensors"
  config = tasks_build.read_config(tiny.self_distillation())
  found = export_backbone.export(config, str(workdir), str(path), "float32")
  assert found["step"] == 4 and found["knn"] == metrics["knn"]
  written = trees.flatten(trees.weights(frozen_vision.load_backbone(path)))
  averages = trees.flatten(_state(workdir, 4)["ema"])
  for name, value in written.items():
    np.testing.assert_array_equal(value, averages[f"backbone/{name}"], err_msg=name)
