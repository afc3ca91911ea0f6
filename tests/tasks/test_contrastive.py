"""Contrastive pretraining: two steps against PyTorch, views against Pillow, and a run to its end."""

import json
import pathlib
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image, ImageOps
import pytest

from frozen_vision.backbones import base as backbones
from frozen_vision.data import batches
from frozen_vision.data.classification import views
from frozen_vision.files import trees
from frozen_vision.freezing import partition
from frozen_vision.metrics import neighbours
from frozen_vision.runs import checkpoints as checkpoint
from frozen_vision.tasks import build as tasks_build
from frozen_vision.tasks import contrastive, view_data
from frozen_vision.training import loop, optimizer
from frozen_vision.training import step as step_lib
from tests import comparing, tiny

_GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "contrastive.npz"


class _Linear(nnx.Module):
  """A backbone of one linear layer on images of 2 x 2 pixels, which it takes as they are."""

  embed_dim = 8
  preprocessing = backbones.Preprocessing(mean=(0.0,) * 3, std=(1 / 255,) * 3)

  def __init__(self):
    self.layer = nnx.Linear(12, 8, rngs=nnx.Rngs(0))

  def embed(self, images, *, rng=None):
    return self.layer(images.reshape(images.shape[0], -1))


def _name(path):
  """The reference's name of our parameter."""
  match path.split("/"):
    case ["backbone", "layer", last]:
      return f"encoder.0.{'weight' if last == 'kernel' else 'bias'}"
    case [network, kind, number, last]:
      place = 3 * int(number) + (kind == "norm")
      prefix = {"projector": "encoder.1", "predictor": "predictor"}[network]
      return f"{prefix}.{place}.{'bias' if last == 'bias' else 'weight'}"


def _ours(golden, kind, path, *, prefix=""):
  array = golden[f"{kind}.{_name(path).removeprefix(prefix)}"]
  return array.T if path.endswith("kernel") else array


def test_two_steps_are_those_of_an_independent_implementation():
  golden = np.load(_GOLDEN)
  changes = {"steps": 4, "contrastive.image_size": 2, "contrastive.momentum": 0.9}
  config = tasks_build.read_config(tiny.contrastive()).replace(changes)
  task = contrastive.ContrastiveTask(config, classes=())
  module = contrastive.MoCo(_Linear(), 6, 16, 3, rngs=nnx.Rngs(0))
  graphdef, trainable, mutable, frozen = partition.split(module, (".*",))
  paths = set(trees.flatten(trainable))
  assert {f"before.{_name(path)}" for path in paths} == {key for key in golden if key.startswith("before.")}
  trainable = nnx.from_flat_state(
    [
      (path, leaf.replace(jnp.asarray(_ours(golden, "before", trees.path_string(path)))))
      for path, leaf in nnx.to_flat_state(trainable)
    ]
  )
  tx = optax.sgd(0.5, momentum=0.0)  # its state is the gradient
  own = task.initial_state(nnx.merge(graphdef, trainable, mutable, frozen))
  state = step_lib.init_state(trainable, tx, seed=0, ema=False, mutable=mutable, task_state=own)
  step = jax.jit(step_lib.make_train_step(task, graphdef, tx, frozen_pass=False))
  for number in range(2):
    names = {"image": "first", "second_image": "second"}
    batch = {ours: golden[f"{name}.{number}"].reshape(8, 2, 2, 3) for ours, name in names.items()}
    state, scalars = step(state, frozen, batch)
    np.testing.assert_allclose(scalars["loss"], golden[f"loss.{number}"], rtol=1e-5)
    if number == 0:
      gradients = trees.flatten(state["opt_state"][0].trace)
      largest = max(np.abs(gradient).max() for gradient in gradients.values())
      for path, gradient in gradients.items():
        wanted = _ours(golden, "grad", path)
        # A BatchNorm takes the bias before it away: its gradient is zero but for rounding.
        most = max(np.abs(wanted).max(), 0.1 * largest)
        np.testing.assert_allclose(gradient, wanted, atol=1e-5 * most, err_msg=path)
  for path, value in trees.flatten(state["trainable"]).items():
    wanted = _ours(golden, "after", path)
    np.testing.assert_allclose(value, wanted, atol=1e-5 * np.abs(wanted).max(), err_msg=path)
  assert state["task"]["step"] == 2
  slow = {name: state["task"][name] for name in ("backbone", "projector")}
  for network, leaves in slow.items():
    for path, value in trees.flatten(leaves).items():
      path = f"{network}/{path}"
      wanted = _ours(golden, "momentum", path, prefix="encoder.")
      np.testing.assert_allclose(value, wanted, atol=1e-5 * np.abs(wanted).max(), err_msg=path)
      assert np.abs(value - trees.flatten(state["trainable"])[path]).max() > 0, path


def test_momentum_grows_to_one():
  found = [float(view_data.momentum_at(jnp.float32(step), 10, 0.99)) for step in (0, 5, 10)]
  np.testing.assert_allclose(found, [0.99, 0.995, 1.0], atol=1e-6)


def test_micro_batches_are_refused():
  config = tiny.contrastive()
  config.accumulate = 2
  with pytest.raises(ValueError, match="accumulate is 2; .* takes 1"):
    tasks_build.read_config(config)


def test_views_are_as_described():
  rng = np.random.default_rng(0)
  image = Image.fromarray(rng.integers(0, 255, (40, 30, 3)).astype(np.uint8))
  plain = dict(crop_scale=(1.0, 1.0), jitter_probability=0.0, gray=0.0, blur=0.0)
  gray = views.View(16, **plain | dict(gray=1.0))(image, rng)
  np.testing.assert_array_equal(gray[..., 0], gray[..., 1])
  square = Image.fromarray(rng.integers(0, 255, (16, 16, 3)).astype(np.uint8))
  found = views.View(16, **plain | dict(solarise=1.0))(square, rng)
  wanted = np.asarray(ImageOps.solarize(square))
  assert np.array_equal(found, wanted) or np.array_equal(found, wanted[:, ::-1])
  blurred = views.View(16, **plain | dict(blur=1.0, blur_sigma=(2.0, 2.0)))(square, rng)
  assert blurred.std() < 0.5 * np.asarray(square).std()
  bright = views.View(16, **plain | dict(jitter_probability=1.0, jitter=(0.9, 0.0, 0.0, 0.0)))
  means = [bright(square, rng).mean() for _ in range(8)]
  assert np.ptp(means) > 20
  # Red turned by a third of the circle is green; by nothing it stays.
  red = Image.new("RGB", (2, 2), (255, 0, 0))
  assert np.asarray(views.adjust_hue(red, 1 / 3))[0, 0].argmax() == 1
  np.testing.assert_array_equal(np.asarray(views.adjust_hue(red, 0.0)), np.asarray(red))
  np.testing.assert_array_equal(np.asarray(views.adjust_hue(red, -1 / 3))[0, 0].argmax(), 2)

  example = views.TwoViews(views.View(16), views.View(16))(
    {"image": np.asarray(image), "label": 3, "name": "x"}, np.random.default_rng(0)
  )
  assert batches.mismatches(example, batches.TwoViewBatch) == []
  assert not np.array_equal(example["image"], example["second_image"])


def test_neighbours_against_a_plain_loop():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 40)
  points = rng.standard_normal((40, 5)) + 1.2 * np.eye(5)[labels]
  unit = points / np.linalg.norm(points, axis=1, keepdims=True)
  correct = 0
  for i in range(40):
    similar = sorted(((unit[i] @ unit[j], labels[j]) for j in range(40) if j != i), reverse=True)[:7]
    votes = np.zeros(3)
    for similarity, label in similar:
      votes[label] += np.exp(similarity / 0.07)
    correct += votes.argmax() == labels[i]
  assert neighbours.leave_one_out(points, labels, k=7) == correct / 40
  evaluator = neighbours.NeighbourEvaluator()
  assert evaluator.result() == {}
  for start in (0, 20):
    part = slice(start, start + 20)
    evaluator.update({"embedding": points[part]}, {"label": labels[part], "example_valid": np.ones(20, bool)})
  wanted = neighbours.leave_one_out(points.astype(np.float32), labels)
  assert evaluator.result() == {"knn": pytest.approx(wanted)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """The workdir of four steps, and its metrics."""
  workdir = tmp_path_factory.mktemp("moco") / "run"
  return workdir, loop.train(tiny.contrastive(), workdir)


def _state(workdir, step):
  """Everything that a checkpoint holds."""
  config = tasks_build.read_config(tiny.contrastive())
  task = tasks_build.build_task(config, ())
  model = loop.build_model(task, config)
  own = task.initial_state(nnx.merge(model.graphdef, model.trainable, model.mutable, model.frozen))
  tx = optimizer.of_run(config, model)
  state = step_lib.init_state(model.trainable, tx, seed=0, ema=False, mutable=model.mutable, task_state=own)
  with checkpoint.Checkpoints(workdir) as checkpoints:
    return checkpoints.restore(state, step)[0]


def test_it_trains_and_keeps_its_momentum_encoder(trained):
  workdir, metrics = trained
  assert metrics["knn"] == 0  # three images of three classes: only an image itself could vote for its own
  assert {"train/loss/info_nce", "train/top1", "train/momentum", "eval/knn"} < set(tiny.metrics(workdir))
  assert (workdir / "curves_eval.png").exists() and list((workdir / "pictures").glob("*features*.png"))
  leaves = json.loads((workdir / "checkpoints/4/meta/metadata").read_text())["leaves"]
  assert "task/step" in leaves and "task/projector/linear/0/kernel" in leaves
  assert "mutable/projector/norm/0/mean" in leaves and "mutable/predictor/norm/1/var" in leaves
  slow = [path for path in leaves if path.startswith("task/backbone/")]
  assert len(slow) == len([path for path in leaves if path.startswith("trainable/backbone/")])


def test_it_continues_to_the_bit(trained, tmp_path):
  workdir, metrics = trained
  copy = tmp_path / "run"
  shutil.copytree(workdir, copy)
  shutil.rmtree(copy / "checkpoints" / "4")
  assert loop.train(tiny.contrastive(), copy)["knn"] == metrics["knn"]
  comparing.assert_equal(_state(copy, 4), _state(workdir, 4))
