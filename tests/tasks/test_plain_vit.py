"""Necks that make a pyramid of a plain ViT, under heads of segmentation and detection."""

from flax import nnx
import jax
import numpy as np
import optax
import pytest

from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import loop
from frozen_vision.training import step as step_lib
from tests import tiny

_ADAPTER = dict(name="vit_adapter", prior_channels=4, num_heads=2, num_points=2)


def _on_vit(config):
  config.backbone.update(dict(name="dinov3_vits16", weights="random"))
  config.backbone.overrides = dict(embed_dim=8, depth=4, num_heads=2, mlp_dim=16, registers=1)
  config.trainable = ("neck/.*", "head/.*")
  return config


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


def test_the_plain_mask_decoder_anneals_its_masks(tmp_path):
  config = _on_vit(tiny.segmentation("plain_mask"))
  config.trainable = ("head/.*",)
  options = dict(num_queries=8, blocks=1, num_heads=2, num_points=32, anneal_starts=(0,), anneal_ends=(2,))
  config.segmentation.head.update(options)
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
