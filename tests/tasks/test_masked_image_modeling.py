"""Masked image modeling: loss, targets and gradients against timm and PyTorch, and a run to its end."""

import json
import pathlib
import shutil
import types

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

import frozen_vision as fv
from frozen_vision.backbones import base as backbones
from frozen_vision.backbones import families
from frozen_vision.backbones.swinv2 import checkpoints as swinv2_checkpoints
from frozen_vision.backbones.vit import model as vit
from frozen_vision.backbones.vit.config import ViTConfig
from frozen_vision.data import batches
from frozen_vision.files import trees
from frozen_vision.files.tensors import LazyTensor
from frozen_vision.ops import masking
from frozen_vision.prediction import files as predict_files
from frozen_vision.runs import checkpoints as checkpoint
from frozen_vision.tasks import build as tasks_build
from frozen_vision.tasks import masked_image_modeling
from frozen_vision.training import loop, optimizer
from frozen_vision.training import step as step_lib
from tests import comparing, tiny

_GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "masked_image_modeling.npz"

# Not for what continues the run of `trained`, which is compiled before any fixture of a single test.


def _task(**changes):
  config = tasks_build.read_config(tiny.masked_image_modeling()).replace(changes)
  return masked_image_modeling.MaskedImageModelingTask(config, classes=())


def _ours(golden, kind):
  """Parameters or gradients of the reference in our layout, with the sizes of the backbone."""
  arrays = {key.removeprefix(kind): golden[key] for key in golden if key.startswith(kind)}
  encoder = {key.removeprefix("encoder."): x for key, x in arrays.items() if key.startswith("encoder.")}
  tensors = {key: LazyTensor(x.shape, x.dtype, lambda x=x: x) for key, x in encoder.items()}
  checkpoint = swinv2_checkpoints.map_tensors(tensors, _GOLDEN, depths=(2, 1), window_sizes=(4, 4))
  found = {f"backbone/{path}": np.asarray(leaf.read()) for path, leaf in checkpoint.leaves.items()}
  # PixelShuffle's channels are colour, row, column; ours are row, column, colour.
  kernel, bias = arrays["decoder.weight"][..., 0, 0], arrays["decoder.bias"]
  found["decoder/kernel"] = kernel.reshape(3, 64, -1).transpose(2, 1, 0).reshape(kernel.shape[1], -1)
  found["decoder/bias"] = bias.reshape(3, 64).T.reshape(-1)
  found["mask_token"] = arrays["mask_token"]
  return found, checkpoint.config


def test_loss_and_gradients_are_those_of_an_independent_implementation():
  golden = np.load(_GOLDEN)
  parameters, config = _ours(golden, "parameter.")
  gradients, _ = _ours(golden, "grad.")
  backbone = families.FAMILIES["swinv2"].module(config, rngs=nnx.Rngs(0))
  model = masked_image_modeling.MaskedModel(backbone, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(model)
  assert set(trees.flatten(state)) == set(parameters)
  filled = [
    (path, leaf.replace(jnp.asarray(parameters[trees.path_string(path)])))
    for path, leaf in nnx.to_flat_state(state)
  ]
  mean, std = jnp.asarray(backbones.IMAGENET_MEAN), jnp.asarray(backbones.IMAGENET_STD)
  images = (jnp.asarray(golden["images"].transpose(0, 2, 3, 1)) * std + mean) * 255  # they are normalised
  batch = {"image": images, "mask": jnp.asarray(golden["mask"])}

  def loss(state, window):
    task = _task(**{"masked_image_modeling.target_window": window})
    model = nnx.merge(graphdef, state)
    return task.loss(model, batch, task.features(model, batch, None), jax.random.key(0), None).total

  state = nnx.from_flat_state(filled)
  found, grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(state, 15)
  np.testing.assert_allclose(found, golden["loss"], rtol=1e-5)
  np.testing.assert_allclose(jax.jit(loss, static_argnums=1)(state, 0), golden["plain_loss"], rtol=1e-5)
  largest = max(np.abs(wanted).max() for wanted in gradients.values())
  for name, gradient in trees.flatten(grads).items():
    wanted = gradients[name]
    # A gradient that nearly vanishes is rounded like those that it comes from.
    np.testing.assert_allclose(
      gradient, wanted, atol=1e-5 * max(np.abs(wanted).max(), 0.1 * largest), err_msg=name
    )
  mean, deviation = masking.local_statistics(jnp.asarray(golden["images"].transpose(0, 2, 3, 1)), 15)
  target = (golden["images"].transpose(0, 2, 3, 1) - mean) / deviation
  np.testing.assert_allclose(target, golden["target"].transpose(0, 2, 3, 1), atol=2e-5)


def test_a_plain_vit_sees_nothing_of_masked_patches():
  config = ViTConfig(16, 2, 2, patch_size=8, position_grid=4, class_token=True)
  model = masked_image_modeling.MaskedModel(vit.ViT(config, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
  mask = masking.random_masks(jax.random.key(0), jnp.arange(1), (2, 2), 0.5)
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.standard_normal((1, 32, 32, 3)), jnp.float32)
  hidden = masking.enlarged(mask, (32, 32))[..., None]
  other = jnp.where(hidden, 9.0, images)
  encode = jax.jit(lambda images, mask: model.encode(images, mask))
  found = encode(images, mask)
  assert found.shape == (1, 4, 4, 16)
  np.testing.assert_array_equal(found, encode(other, mask))
  assert np.abs(found - encode(images, ~mask)).max() > 1e-3
  assert model.decode(found).shape == (1, 32, 32, 3)


def test_pixels_are_where_their_cells_are():
  model = masked_image_modeling.MaskedModel(
    vit.ViT(ViTConfig(8, 1, 2, patch_size=4, position_grid=2), rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1)
  )
  pixels = np.arange(2 * 3 * 48, dtype=np.float32).reshape(1, 2, 3, 48)
  model.decoder = lambda x: x
  image = np.asarray(model.decode(jnp.asarray(pixels)))
  for row in range(8):
    for column in range(12):
      cell = pixels[0, row // 4, column // 4].reshape(4, 4, 3)
      np.testing.assert_array_equal(image[0, row, column], cell[row % 4, column % 4])


def test_what_does_not_fit_is_said():
  config = tiny.masked_image_modeling()
  config.masked_image_modeling.mask_patch = 12
  with pytest.raises(ValueError, match="mask_patch is 12, and images have a side of 32"):
    tasks_build.read_config(config)
  for window in (8, 1):
    config = tiny.masked_image_modeling()
    config.masked_image_modeling.target_window = window
    with pytest.raises(
      ValueError, match=f"target_window is {window}; expected an odd number from 3 on, or 0"
    ):
      tasks_build.read_config(config)
  swin = nnx.eval_shape(lambda: families.build_backbone("swinv2_nano", rngs=nnx.Rngs(0)))
  task = _task(**{"masked_image_modeling.image_size": 48, "masked_image_modeling.mask_patch": 6})
  with pytest.raises(
    ValueError, match="mask_patch is 6, and swinv2_nano embeds patches of 4 pixels; expected a"
  ):
    task.build_model(swin)
  resnet = nnx.eval_shape(lambda: families.build_backbone("resnet50", rngs=nnx.Rngs(0)))
  with pytest.raises(ValueError, match="has no patch embedding .*take a SwinV2 or a plain ViT"):
    masked_image_modeling.MaskedModel(resnet, rngs=nnx.Rngs(0))
  frozen = types.SimpleNamespace(backbone=swin)
  with pytest.raises(ValueError, match="nothing of the backbone would train"):
    _task(trainable=("decoder/.*", "mask_token")).features(frozen, {}, None)
  with pytest.raises(ValueError, match="has no patch embedding"):
    resnet.final_features(jnp.zeros((1, 32, 32, 3)), edit_stem=lambda x: x)


def test_the_mask_of_an_image_does_not_depend_on_its_batch():
  def masks(batch_size):
    config = tiny.masked_image_modeling()
    config.eval_batch_size = batch_size
    task = tasks_build.build_task(config)
    found = []
    with task.eval_batches() as feed:
      for batch in feed:
        assert batches.mismatches(batch, batches.NumberedBatch) == []
        mask = task.prepare(step_lib.device_batch(batch), None, None)["mask"]
        found += list(np.asarray(mask)[batch["example_valid"]])
    return np.stack(found)

  one, two = masks(1), masks(2)
  np.testing.assert_array_equal(one, two)
  assert len({mask.tobytes() for mask in one}) == 3  # images


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """The workdir of four steps, and its metrics."""
  workdir = tmp_path_factory.mktemp("simmim") / "run"
  return workdir, loop.train(tiny.masked_image_modeling(), workdir)


def test_it_trains_with_curves_and_reconstructions(trained):
  workdir, metrics = trained
  # Normalised pixels have a variance of about 1, and four steps predict little of it.
  assert 0.5 < metrics["l1"] < 1.1 and -1 < metrics["r2"] < 0.3
  assert {"train/loss/l1", "eval/l1", "eval/r2"} < set(tiny.metrics(workdir))
  for name in ("curves_eval.png", "curves_train.png"):
    assert (workdir / name).exists(), name
  [picture] = (workdir / "pictures").glob("*reconstructions*.png")
  with Image.open(picture) as image:
    assert image.size == (3 * 224, 224)
  record = json.loads((workdir / "checkpoints/4/meta/metadata").read_text())
  assert "trainable/mask_token" in record["leaves"]


def _state(workdir, step):
  """Everything that a checkpoint holds."""
  config = tasks_build.read_config(tiny.masked_image_modeling())
  model = loop.build_model(tasks_build.build_task(config), config)
  state = step_lib.init_state(
    model.trainable, optimizer.of_run(config, model), seed=0, ema=False, mutable=model.mutable
  )
  with checkpoint.Checkpoints(workdir) as checkpoints:
    return checkpoints.restore(state, step)[0]


def test_it_continues_to_the_bit_and_is_evaluated_alike(trained, tmp_path):
  workdir, metrics = trained
  copy = tmp_path / "run"
  shutil.copytree(workdir, copy)
  shutil.rmtree(copy / "checkpoints" / "4")
  assert loop.train(tiny.masked_image_modeling(), copy)["l1"] == metrics["l1"]
  comparing.assert_equal(_state(copy, 4), _state(workdir, 4))
  assert loop.evaluate(tiny.masked_image_modeling(), copy)["l1"] == pytest.approx(metrics["l1"], rel=1e-5)


def test_it_predicts_reconstructions_and_its_encoder_is_an_ordinary_backbone(trained, tmp_path):
  workdir, _ = trained
  (tmp_path / "photos").mkdir()
  photo = tmp_path / "photos" / "photo.png"
  pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3)).astype(np.uint8)
  Image.fromarray(pixels).save(photo)
  predict_files.predict([str(photo)], workdir=str(workdir), out=str(tmp_path / "out"))
  found = np.asarray(Image.open(tmp_path / "out/reconstruct/reconstructions/photo.png"))
  assert (tmp_path / "out/reconstruct/pictures/photo.jpg").exists()
  task = _task()
  seen = task.read_input(str(photo))[1]["image"]
  prepared = task.prepare({"image": jnp.asarray(seen[None])}, None, None)
  shown = ~np.asarray(masking.enlarged(prepared["mask"], (32, 32)))[0]
  assert found.shape == (32, 32, 3) and (~shown).mean() == 10 / 16  # ceil(0.6 * 16) of 16 patches
  np.testing.assert_array_equal(found[shown], seen[shown])
  assert not np.array_equal(found, seen)

  config = tasks_build.read_config(tiny.masked_image_modeling())
  model = loop.build_model(task, config)
  with checkpoint.Checkpoints(workdir) as checkpoints:
    trainable, mutable, _ = checkpoints.restore_evaluated(model.trainable, model.mutable, averaged=False)
  module = nnx.merge(model.graphdef, trainable, mutable, model.frozen)
  fv.save_backbone(module.backbone, tmp_path / "encoder.safetensors", name="swinv2_nano")
  backbone = fv.load_backbone(tmp_path / "encoder.safetensors")
  wanted = trees.flatten(nnx.state(module.backbone, nnx.Param))
  for path, leaf in trees.flatten(nnx.state(backbone, nnx.Param)).items():
    np.testing.assert_array_equal(leaf, wanted[path])
