"""A small ViT under the tasks: read from its file block by block, frozen, under a pyramid, on 8 devices."""

import json
import os
import pathlib
import subprocess
import sys

from flax import nnx
import jax
import numpy as np
import pytest

from frozen_vision.backbones import families
from frozen_vision.freezing import prepare
from frozen_vision.layers import storage
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import loop
from tests import tiny

_ROOT = pathlib.Path(__file__).resolve().parents[3]
_SMALL = dict(embed_dim=16, depth=4, num_heads=2, mlp_dim=32, registers=2)


@pytest.fixture
def path(tmp_path):
  backbone = families.build_backbone("dinov3_vits16", rngs=nnx.Rngs(0), layer_scale_init=1.0, **_SMALL)
  families.save_backbone(backbone, tmp_path / "vit.safetensors", name="dinov3_vits16")
  return tmp_path / "vit.safetensors"


@pytest.mark.parametrize("kind", storage.KINDS)
def test_read_from_its_file_block_by_block_it_is_the_same_program(path, kind):
  file = families.open_backbone(path)
  found, wanted = prepare.freeze(file, storage=kind), prepare.freeze(file.load(), storage=kind)
  assert found.key == wanted.key and found.key["family"] == "vit"
  for one, other in zip(*map(jax.tree.leaves, (found.program, wanted.program)), strict=True):
    np.testing.assert_array_equal(one, other)


def _config(task, path):
  config = tiny.get_config(task)
  config.backbone.update(dict(name="dinov3_vits16", weights=str(path)))
  config.backbone.overrides = _SMALL
  config.update(dict(steps=2, checkpoint_every=2))
  return config


def test_linear_segmentation(path, tmp_path):
  metrics = loop.train(_config("segmentation", path), str(tmp_path / "run"))
  assert 0 <= metrics["mIoU"] <= 1


def test_images_are_normalised_as_the_weights_want():
  config = tiny.segmentation()
  config.backbone.update(dict(name="augreg_vits16", weights="random"))
  config.backbone.overrides = {key: value for key, value in _SMALL.items() if key != "registers"}
  task = tasks_build.build_task(config)
  model = loop.build_model(task, config)
  module = nnx.merge(model.graphdef, model.trainable, model.mutable, model.frozen)
  images = np.random.default_rng(0).integers(0, 256, (1, 32, 48, 3), np.uint8)
  found = task.features(module, dict(image=images, image_size=np.array([[32, 48]], np.int32)), None)[-1]
  wanted = module.backbone((images.astype(np.float32) / 255 - 0.5) / 0.5)[-1]
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_on_every_mesh_a_step_of_detection_is_that_of_one_device():
  """HTC on the simple pyramid of a ViT.

  On the mesh 2x4 the frozen weights are sharded over the 4 devices of a group, on the others over all 8.
  """
  meshes = ["8x1", "4x2", "2x4", "1x8"]
  command = [sys.executable, "-m", "tests.mesh_run", "detection", "", "dinov3_vits16", *meshes]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  process = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=1200)
  assert process.returncode == 0, process.stdout + process.stderr
  report = json.loads(process.stdout.splitlines()[-1])
  assert list(report) == meshes
  for mesh, row in report.items():
    assert max(row[part] for part in ("scalars", "updated", "gradients", "predictions")) < 1e-4, (mesh, row)
    assert row["rois_equal"] and row["num_rois"] > 8, (mesh, row)
    pieces = 4 if mesh == "2x4" else 8
    assert 1 / pieces <= row["frozen_share"] < 1.1 / pieces, (mesh, row)
