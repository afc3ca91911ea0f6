"""Feature distillation: its loss and gradients against PyTorch, and that nothing of the teacher trains."""

import dataclasses
import functools
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
from frozen_vision import config as config_lib
from frozen_vision.backbones import base as backbones
from frozen_vision.backbones import families
from frozen_vision.backbones.vit import model as vit
from frozen_vision.backbones.vit.config import ViTConfig
from frozen_vision.devices import sharding
from frozen_vision.files import trees
from frozen_vision.freezing import prepare
from frozen_vision.planning import flops, plan
from frozen_vision.prediction import files as predict_files
from frozen_vision.runs import checkpoints as checkpoint
from frozen_vision.tasks import build as tasks_build
from frozen_vision.tasks import feature_distillation, feature_maps, initial_weights
from frozen_vision.training import loop, optimizer
from frozen_vision.training import step as step_lib
from tests import comparing, tiny

_GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "feature_distillation.npz"

# Not for what continues the run of `trained`, which is compiled before any fixture of a single test.

# From our path to the reference's name and the transform of its array.
_BLOCK = {
  "norm1/scale": "norm1.weight",
  "norm1/bias": "norm1.bias",
  "norm2/scale": "norm2.weight",
  "norm2/bias": "norm2.bias",
  "attn/qkv/kernel": "qkv.weight",
  "attn/q_bias": "q_bias",
  "attn/v_bias": "v_bias",
  "attn/proj/kernel": "proj.weight",
  "attn/proj/bias": "proj.bias",
  "scale1/scale": "gamma1",
  "scale2/scale": "gamma2",
  "mlp/fc1/kernel": "fc1.weight",
  "mlp/fc1/bias": "fc1.bias",
  "mlp/fc2/kernel": "fc2.weight",
  "mlp/fc2/bias": "fc2.bias",
}
_NAMES = {
  "backbone/patch_embed/proj/kernel": "patch.weight",
  "backbone/patch_embed/proj/bias": "patch.bias",
  "backbone/cls_token": "cls_token",
  "backbone/relative_positions": "bias.table",
  "backbone/norm/scale": "norm.weight",
  "backbone/norm/bias": "norm.bias",
  "projector/kernel": "decoder.weight",
  "projector/bias": "decoder.bias",
} | {
  f"backbone/blocks/{b}/{ours}": f"blocks.{b}.{theirs}" for b in range(2) for ours, theirs in _BLOCK.items()
}


def _ours(name, array):
  """An array of the reference in our layout."""
  if name.endswith("cls_token"):
    return array.reshape(-1)
  if "patch_embed/proj/kernel" in name:
    return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
  if name == "projector/kernel":
    array = array[..., 0]
  return array.T if name.endswith("kernel") else array


class _Teacher:
  """Says given tokens, and remembers the images that it was shown."""

  def __init__(self, map_, class_token=None, preprocessing=None):
    self.final = backbones.FinalFeatures(map_, class_token)
    self.preprocessing = preprocessing or backbones.Preprocessing()
    self.images = []

  def final_features(self, images):
    self.images.append(images)
    return self.final


def _task(**changes):
  config = tasks_build.read_config(tiny.feature_distillation()).replace(changes)
  return feature_distillation.FeatureDistillationTask(config, classes=())


def test_loss_and_gradients_are_those_of_an_independent_implementation():
  golden = np.load(_GOLDEN)
  sizes = dict(embed_dim=12, depth=2, num_heads=2, patch_size=4, position_grid=3)
  config = ViTConfig(**sizes, positions="relative", qkv_bias="qv", layer_scale=True)
  module = feature_distillation.Distilled(vit.ViT(config, rngs=nnx.Rngs(0)), 12, 10, rngs=nnx.Rngs(0))
  graphdef, parameters = nnx.split(module)
  flat = trees.flatten(parameters)
  assert set(flat) == set(_NAMES)
  assert {f"parameter.{name}" for name in _NAMES.values()} == {
    k for k in golden if k.startswith("parameter.")
  }
  filled = nnx.from_flat_state(
    [
      (path, leaf.replace(jnp.asarray(_ours(name, golden[f"parameter.{_NAMES[name]}"]))))
      for path, leaf in nnx.to_flat_state(parameters)
      for name in [trees.path_string(path)]
    ]
  )
  tokens = jnp.asarray(golden["teacher"])
  teacher = _Teacher(tokens[:, 1:].reshape(2, 3, 3, -1), tokens[:, 0])
  task = _task()
  # The reference's images are normalised already.
  mean, std = jnp.asarray(backbones.IMAGENET_MEAN), jnp.asarray(backbones.IMAGENET_STD)
  images = (jnp.asarray(golden["images"].transpose(0, 2, 3, 1)) * std + mean) * 255

  def loss(parameters):
    model = nnx.merge(graphdef, parameters)
    model.teacher = nnx.static(teacher)
    features = task.features(model, {"image": images}, None)
    losses = task.loss(model, {"image": images}, features, jax.random.key(0), None)
    return losses.total

  found, gradients = jax.jit(jax.value_and_grad(loss))(filled)
  np.testing.assert_allclose(found, golden["loss"], rtol=1e-5)
  for name, gradient in trees.flatten(gradients).items():
    wanted = _ours(name, golden[f"grad.{_NAMES[name]}"])
    assert np.abs(wanted).max() > 0, name
    np.testing.assert_allclose(gradient, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=1e-5, err_msg=name)


def test_a_teacher_has_its_own_statistics_and_size_and_its_map_is_resized():
  """The whitened target of a resized map; the class token counts only where both networks have one."""
  images = jnp.asarray(np.random.default_rng(0).uniform(0, 255, (1, 32, 32, 3)), jnp.float32)
  map_ = jax.random.normal(jax.random.key(0), (1, 2, 2, 6))
  own = backbones.Preprocessing(mean=(0.1, 0.2, 0.3), std=(1.0, 0.5, 0.25))
  teacher = _Teacher(map_, jnp.ones((1, 6)), own)
  task = _task(**{"feature_distillation.teacher_size": 64})
  targets = task.targets(teacher, images, (2, 2))
  [seen] = teacher.images
  assert seen.shape == (1, 64, 64, 3)
  np.testing.assert_allclose(
    seen.mean((0, 1, 2)), (images.mean((0, 1, 2)) / 255 - jnp.array(own.mean)) / jnp.array(own.std), atol=0.02
  )
  wanted = (map_ - map_.mean(-1, keepdims=True)) / np.sqrt(map_.var(-1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(targets.map, wanted, atol=1e-5)
  larger = task.targets(teacher, images, (4, 4)).map
  assert larger.shape == (1, 4, 4, 6)
  np.testing.assert_allclose(larger.mean(-1), 0, atol=1e-5)
  np.testing.assert_allclose(larger[0, 0, 0], wanted[0, 0, 0], atol=1e-5)  # corners stay where they are

  model = types.SimpleNamespace(teacher=teacher, projector=lambda x: x)
  predicted, compared = task._compared(model, {"image": images}, (jnp.zeros((1, 2, 2, 6)),))
  assert predicted.shape == compared.shape == (1, 4, 6)
  both = jnp.zeros((1, 2, 2, 6)), jnp.zeros((1, 6))
  predicted, compared = task._compared(model, {"image": images}, both)
  assert predicted.shape == compared.shape == (1, 5, 6)
  np.testing.assert_allclose(compared[0, 0], 0, atol=1e-5)  # a constant token has no variance


def test_students_begin_as_released():
  config = ViTConfig(64, 2, 4, positions="relative", layer_scale=True, layer_scale_init=0.1)
  found = trees.flatten(nnx.state(initial_weights.rescaled(vit.ViT(config, rngs=nnx.Rngs(0)), 0), nnx.Param))
  for block in range(2):
    for name in ("attn/qkv", "mlp/fc1", "attn/proj", "mlp/fc2"):
      kernel = np.asarray(found[f"blocks/{block}/{name}/kernel"])
      most = 0.02 / (np.sqrt(2 * (block + 1)) if name in ("attn/proj", "mlp/fc2") else 1)
      assert 0.97 * most < np.abs(kernel).max() <= most * (1 + 1e-6), (block, name)
      # A normal distribution that is cut off at one standard deviation keeps 0.5396 of it.
      assert np.std(kernel) == pytest.approx(0.5396 * most, rel=0.05)
    np.testing.assert_array_equal(found[f"blocks/{block}/scale1/scale"], np.float32(0.1))
  assert np.abs(found["cls_token"]).max() <= 0.02
  assert not np.any(found["relative_positions"])

  sizes = dict(tiny.SMALL_BACKBONE, depths=(2, 1), residual_norm_init=1e-5)
  sizes |= dict(num_heads=(1, 2), window_sizes=(4, 4), pretrained_window_sizes=(0, 0))
  plain = families.build_backbone("swinv2_nano", rngs=nnx.Rngs(0), **sizes)
  found = trees.flatten(nnx.state(initial_weights.rescaled(plain, 0), nnx.Param))
  before = trees.flatten(nnx.state(plain, nnx.Param))
  for number, block in enumerate(("0/blocks/0", "0/blocks/1", "1/blocks/0"), 1):
    for name in ("attn/proj", "mlp/fc2"):
      path = f"stages/{block}/{name}/kernel"
      np.testing.assert_allclose(found[path] * np.sqrt(2 * number), before[path], rtol=1e-6)
    np.testing.assert_array_equal(found[f"stages/{block}/norm1/scale"], np.float32(1e-5))
  assert set(found) == set(before)


def _step_flops(config):
  task = plan.build_task(config)
  program = plan.make_program(task, config, sharding.make_mesh(devices=jax.devices()[:1]))
  return plan.program_flops(program), task, program


def test_a_step_costs_a_teacher_pass_and_a_student_step(monkeypatch):
  """No gradient of the teacher is computed, and none of it is in what trains or what the optimizer keeps."""
  config = tiny.feature_distillation()
  config.feature_distillation.teacher.overrides.embed_dim = 32
  whole, task, program = _step_flops(config)
  paths = set(trees.flatten(program.state["trainable"]))
  assert {path.partition("/")[0] for path in paths} == {"backbone", "projector"}
  moments = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(program.state["opt_state"])]
  assert moments and not [path for path in moments if "teacher" in path]
  assert any(path.startswith("teacher/") for path in trees.flatten(program.frozen))

  teacher = nnx.eval_shape(task.build_teacher)
  images = jax.ShapeDtypeStruct((config.batch_size, 32, 32, 3), jnp.float32)
  graphdef, state = nnx.split(teacher)
  forward = flops.count_jaxpr(
    jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state).final_features(x).map)(state, images).jaxpr
  )

  def constant(self, teacher, images, size):
    return feature_distillation.Tokens(jnp.zeros((images.shape[0], *size, 256)), None)

  monkeypatch.setattr(feature_distillation.FeatureDistillationTask, "targets", constant)
  alone, _, _ = _step_flops(config)
  assert forward > 0.3 * alone
  assert alone + 0.9 * forward <= whole <= 1.02 * (alone + forward)


def _frozen(**changes):
  """Shapes of the frozen part of a model whose student trains, by path."""
  config = tasks_build.read_config(tiny.feature_distillation()).replace(changes)
  task = plan.build_task(config)
  return trees.flatten(plan.make_program(task, config, sharding.make_mesh(devices=jax.devices()[:1])).frozen)


def test_a_teacher_is_folded_by_its_own_option_and_may_be_stored_as_int8():
  kernel = "teacher/stages/0/blocks/0/mlp/fc1/kernel"
  assert kernel not in _frozen(**{"backbone.fold": False})
  assert kernel in _frozen(**{"feature_distillation.teacher.fold": False})
  assert "int8" in {leaf.dtype.name for leaf in _frozen(frozen_dtype="int8").values()}


def test_a_teacher_is_counted_before_it_is_folded():
  config, task = tasks_build.read_config(tiny.feature_distillation()), _task()
  teacher = nnx.eval_shape(task.build_teacher)
  parts = functools.partial(nnx.eval_shape, task.build_model), prepare.abstract_source(config.backbone)
  model = prepare.prepare(*parts, trainable=(".*",), storage="int8", teacher=teacher)
  assert model.frozen_parameters == sum(leaf.size for leaf in trees.flatten(trees.weights(teacher)).values())
  with pytest.raises(ValueError, match="int8 is for a folded backbone"):
    prepare.prepare(*parts, trainable=("projector/.*", "backbone/norm/.*"), storage="int8", teacher=teacher)


def test_older_checkpoints_remember_only_the_weights_of_their_teacher():
  own = types.SimpleNamespace(teacher={"weights": "ab", "dtype": "float32", "teacher_size": 32})
  loop._check_teacher({"teacher": "ab"}, own, pathlib.Path("run"))
  loop._check_teacher({"teacher": dict(own.teacher)}, own, pathlib.Path("run"))
  for found, differs in (
    ("cd", 'weights was "cd" and is "ab"'),
    (own.teacher | {"dtype": "bfloat16"}, 'dtype was "bfloat16" and is "float32"'),
  ):
    with pytest.raises(ValueError, match=f"The run in run had the teacher .*: {differs}. Give the teacher"):
      loop._check_teacher({"teacher": found}, own, pathlib.Path("run"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """The workdir of four steps, and its metrics."""
  workdir = tmp_path_factory.mktemp("distillation") / "run"
  return workdir, loop.train(tiny.feature_distillation(), workdir)


def _state(workdir, step):
  """Everything that a checkpoint holds."""
  config = tasks_build.read_config(tiny.feature_distillation())
  task = tasks_build.build_task(config)
  model = loop.build_model(task, config)
  state = step_lib.init_state(
    model.trainable, optimizer.of_run(config, model), seed=0, ema=False, mutable=model.mutable
  )
  with checkpoint.Checkpoints(workdir) as checkpoints:
    return checkpoints.restore(state, step)[0]


def test_it_trains_and_the_teacher_is_in_no_checkpoint(trained):
  workdir, metrics = trained
  assert np.isfinite(metrics["smooth_l1"]) and -1 <= metrics["similarity"] <= 1
  series = tiny.metrics(workdir)
  assert {"train/loss/smooth_l1", "train/similarity", "eval/similarity"} < set(series)
  for name in ("curves_eval.png", "curves_train.png"):
    assert (workdir / name).exists(), name
  [picture] = (workdir / "pictures").glob("*features*.png")
  with Image.open(picture) as image:
    assert image.size == (3 * 224, 224)
  record = json.loads((workdir / "checkpoints/4/meta/metadata").read_text())
  assert not [path for path in record["leaves"] if "teacher" in path]
  teacher = record["meta"]["teacher"]
  assert len(teacher["weights"]) == 64 and teacher["teacher_size"] == 32 and teacher["dtype"] == "float32"
  assert record["meta"]["feature_key"] is None


def test_it_continues_to_the_bit_and_refuses_another_teacher(trained, tmp_path):
  workdir, metrics = trained
  copy = tmp_path / "run"
  shutil.copytree(workdir, copy)
  shutil.rmtree(copy / "checkpoints" / "4")
  other = tiny.feature_distillation()
  other.feature_distillation.teacher.weights = "init"
  other.feature_distillation.teacher.overrides.residual_norm_init = 1.0
  with pytest.raises(ValueError, match="teacher"):
    loop.train(other, copy)
  larger = tiny.feature_distillation()
  larger.feature_distillation.teacher_size = 64
  with pytest.raises(ValueError, match="teacher_size was 32 and is 64"):
    loop.evaluate(larger, copy)
  again = loop.train(tiny.feature_distillation(), copy)
  assert again["smooth_l1"] == metrics["smooth_l1"]
  comparing.assert_equal(_state(copy, 4), _state(workdir, 4))
  evaluated = loop.evaluate(tiny.feature_distillation(), copy)
  assert evaluated["smooth_l1"] == pytest.approx(metrics["smooth_l1"], rel=1e-5)


def test_the_student_predicts_and_is_an_ordinary_backbone(trained, tmp_path):
  workdir, _ = trained
  (tmp_path / "photos").mkdir()
  photo = tmp_path / "photos" / "photo.png"
  pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3)).astype(np.uint8)
  Image.fromarray(pixels).save(photo)
  predict_files.predict([str(photo)], workdir=str(workdir), out=str(tmp_path / "out"))
  with np.load(tmp_path / "out/student/features/photo.npz") as file:
    features = file["features"]
  assert (tmp_path / "out/student/pictures/photo.jpg").exists()

  config = tasks_build.read_config(tiny.feature_distillation())
  task = tasks_build.build_task(config, ())
  model = loop.build_model(task, config)
  with checkpoint.Checkpoints(workdir) as checkpoints:
    trainable, mutable, _ = checkpoints.restore_evaluated(model.trainable, model.mutable, averaged=False)
  module = nnx.merge(model.graphdef, trainable, mutable, model.frozen)
  file = tmp_path / "student.safetensors"
  fv.save_backbone(module.backbone, file, name="swinv2_nano")
  backbone = fv.load_backbone(file)
  example = task.read_input(str(photo))[1]
  images = backbone.preprocessing.normalise(jnp.asarray(example["image"][None]))
  np.testing.assert_allclose(backbone.final_features(images).map[0], features, atol=1e-5)


def test_overrides_of_a_student_that_are_not_repeated_are_listed(tmp_path):
  sizes = dict(embed_dim=8, depth=1, num_heads=2)
  relative = dict(positions="relative", layer_scale=True)
  student = families.build_backbone("deit_vits16", rngs=nnx.Rngs(0), **sizes, **relative)
  file = tmp_path / "student.safetensors"
  fv.save_backbone(student, file, name="deit_vits16")
  options = config_lib.BackboneOptions(name="deit_vits16", weights=str(file), overrides=sizes)
  with pytest.raises(ValueError) as caught:
    prepare.open_source(options, 0)
  repeated = "".join(f" --config.backbone.overrides.{name}={value}" for name, value in relative.items())
  assert "positions = learned, layer_scale = False" in str(caught.value)
  assert str(caught.value).endswith(f"repeat them:{repeated}")
  found = prepare.open_source(dataclasses.replace(options, overrides=sizes | relative), 0)
  assert found.module.config == student.config


def test_principal_colours_have_one_range_for_all_maps():
  rng = np.random.default_rng(0)
  first = rng.standard_normal((3, 4, 8))
  one, same, far = feature_maps.principal_colours([first, first, first + 100])
  assert one.shape == (3, 4, 3) and one.dtype == np.uint8
  np.testing.assert_array_equal(one, same)
  assert one.min() == 0 and one.max() == 255
  assert set(np.unique(far)) <= {0, 255}
  [few] = feature_maps.principal_colours([rng.standard_normal((1, 2, 8))])
  assert few.shape == (1, 2, 3)


def test_pictures_of_several_images_share_their_colours():
  rng = np.random.default_rng(0)
  maps = rng.standard_normal((2, 1, 2, 8))
  maps[1, 0, 1] = maps[0, 0, 0]
  images = np.zeros((2, 8, 8, 3), np.uint8)
  picture = feature_maps.rows_of_pictures(images, maps, maps)
  assert picture.shape == (2 * 224, 3 * 224, 3)
  np.testing.assert_array_equal(picture[:, 224:448], picture[:, 448:])
  np.testing.assert_array_equal(picture[0, 224], picture[-1, 447])  # equal features of two images


def test_means_leave_out_repeated_examples():
  evaluator = feature_maps.MeanEvaluator(("error",))
  assert evaluator.result() == {}
  evaluator.update({"error": np.array([1.0, 5.0])}, {"example_valid": np.array([True, False])})
  evaluator.update({"error": np.array([2.0, 3.0])}, {"example_valid": np.array([True, True])})
  assert evaluator.result() == {"error": 2.0}
