"""Necks that make a pyramid of a plain ViT, under heads of segmentation and detection."""

from flax import nnx
import jax
import ml_collections
import numpy as np
import optax
import pytest

from frozen_vision import config as config_lib
from frozen_vision.planning import flops
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import loop
from frozen_vision.training import step as step_lib
from tests import tiny

_ADAPTER = dict(name="vit_adapter", prior_channels=4, num_heads=2, num_points=2)
_PLAIN_MASK = dict(num_queries=8, blocks=1, num_heads=2, num_points=32, anneal_starts=(0,), anneal_ends=(2,))


def _on_vit(config):
  config.backbone.update(dict(name="dinov3_vits16", weights="random"))
  config.backbone.overrides = dict(embed_dim=8, depth=4, num_heads=2, mlp_dim=16, registers=1)
  config.trainable = ("neck/.*", "head/.*")
  return config


def _ready(config, tx):
  """(task, model, state, batch of the task's own data, function that makes the train step)."""
  task = tasks_build.build_task(config)
  model = loop.build_model(task, config)
  state = step_lib.init_state(model.trainable, tx, seed=0, ema=False, mutable=model.mutable)
  with task.train_batches(0) as batches:
    batch = step_lib.device_batch(next(batches))

  def train_step(**options):
    return step_lib.make_train_step(task, model.graphdef, tx, frozen_pass=model.frozen_pass, **options)

  return task, model, state, batch, train_step


def _after_a_step(config):
  """(state before, state after a step, the step's scalars)."""
  task = tasks_build.build_task(config)
  model = loop.build_model(task, config)
  tx = optax.sgd(1e-2)
  state = step_lib.init_state(model.trainable, tx, seed=0, ema=False, mutable=model.mutable)
  train_step = step_lib.make_train_step(task, model.graphdef, tx, frozen_pass=model.frozen_pass)
  example = task.blank_example()
  batch = {name: np.stack([value, value]) for name, value in example.items()}
  batch["image"] = np.random.default_rng(0).integers(0, 256, batch["image"].shape, np.uint8)
  return state, *jax.jit(train_step)(state, model.frozen, step_lib.device_batch(batch))


def _changed(before, after):
  return jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after)


@pytest.mark.slow
@pytest.mark.parametrize(
  "task, head, neck",
  [
    ("detection", "htc", "simple_pyramid"),
    ("detection", "retinanet", "simple_pyramid"),
    ("segmentation", "mask2former", "vit_adapter"),
    ("segmentation", "upernet", "simple_pyramid"),
    ("segmentation", "plain_mask", "none"),
    ("segmentation", "linear", "none"),
    ("action", "video_swin", "none"),
    ("action", "attentive", "none"),
  ],
)
def test_every_head_learns_a_batch_of_its_demo(task, head, neck):
  """Cascade and Mask R-CNN are parts of HTC."""
  config = _on_vit(tiny.get_config(task))
  section = config[task]
  section.head.name = head
  if head == "retinanet":
    section.head = ml_collections.ConfigDict(dict(name=head, channels=8, convs=1))
  if neck == "none":
    config.trainable = ("head/.*",)
  else:
    section.neck.update(dict(_ADAPTER if neck == "vit_adapter" else {"name": neck}))
  if head == "plain_mask":
    section.head.update(_PLAIN_MASK)
  if task == "action":
    config_lib.set_for(section.head, "video_swin", levels=(-1,), channels=(8,), depths=(1,))
    config_lib.set_for(section.head, "attentive", levels=(-1,))
  _, model, state, batch, train_step = _ready(config, optax.adam(3e-3))
  step, losses = jax.jit(train_step()), []
  for _ in range(15):
    state, scalars = step(state, model.frozen, batch)
    losses.append(float(scalars["loss"]))
  assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3]), losses


def test_mask2former_on_an_adapter(tmp_path):
  config = _on_vit(tiny.segmentation("mask2former"))
  config.segmentation.neck.update(_ADAPTER)
  config.update(dict(steps=2, checkpoint_every=2))
  metrics = loop.train(config, str(tmp_path / "run"))
  losses = [value for _, value in tiny.metrics(tmp_path / "run")["train/loss"]]
  assert len(losses) == 2 and np.isfinite(losses).all() and 0 <= metrics["mIoU"] <= 1


def test_htc_on_an_adapter():
  config = _on_vit(tiny.detection())
  config.detection.neck.update(dict(_ADAPTER, channels=8, levels=4))
  config.detection.head.name = "htc"
  before, after, scalars = _after_a_step(config)
  assert np.isfinite(scalars["loss"])
  parameters = _changed(before["trainable"], after["trainable"])["neck"]
  assert all(
    jax.tree.leaves([parameters["prior"]["stages"], parameters["extractors"][5]["attention"]["value"]])
  )
  statistics = _changed(before["mutable"], after["mutable"])
  assert list(statistics) == ["neck"] and all(jax.tree.leaves(statistics))


@pytest.mark.parametrize("neck", [dict(name="simple_pyramid"), _ADAPTER], ids=lambda neck: neck["name"])
def test_below_a_pyramid_a_frozen_vit_costs_its_forward_pass(neck):
  config = _on_vit(tiny.detection())
  config.detection.neck.update(dict(neck, channels=8, levels=4))
  task, model, state, batch, train_step = _ready(config, optax.sgd(1e-2))

  def forward(state, frozen, batch):
    module = nnx.merge(model.graphdef, state["trainable"], state["mutable"], frozen)
    return task.features(module, batch, None)

  inputs = state, model.frozen, batch
  once, features = flops.count(forward, *inputs), jax.eval_shape(forward, *inputs)
  on_features = flops.count(train_step(given_features=True), *inputs, features)
  assert once > 0 and 0.99 * once <= flops.count(train_step(), *inputs) - on_features <= 1.02 * once


def test_the_plain_mask_decoder_anneals_its_masks(tmp_path):
  config = _on_vit(tiny.segmentation("plain_mask"))
  config.trainable = ("head/.*",)
  config.segmentation.head.update(_PLAIN_MASK)
  before, after, scalars = _after_a_step(config)
  assert np.isfinite(scalars["loss"])
  assert all(jax.tree.leaves(_changed(before["mutable"], after["mutable"]))), "statistics and the count"
  assert int(after["mutable"]["head"]["batches"][...]) == 1


def test_a_neck_that_would_not_train_is_refused():
  config = _on_vit(tiny.segmentation("linear"))
  config.segmentation.neck.name = "simple_pyramid"
  config.trainable = ("head/.*",)
  task = tasks_build.build_task(config)
  with pytest.raises(ValueError, match="neck is simple_pyramid.*nothing of the neck.*'neck/.*', 'head/.*'"):
    nnx.eval_shape(task.build_model)
