"""A task and heads from outside of the package: trained, resumed, evaluated, predicted, exported, planned."""

import json
import shutil

import jax
import numpy as np
from PIL import Image
import pytest

from frozen_vision import config as config_lib
from frozen_vision import export
from frozen_vision.devices import sharding
from frozen_vision.planning import plan
from frozen_vision.prediction import files as predict_files
from frozen_vision.prediction import predictor as predict
from frozen_vision.runs import checkpoints as checkpoint
from frozen_vision.tasks import (
  base,
  detection,
  detection_options,
  results,
  segmentation,
  segmentation_options,
)
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import loop, optimizer
from frozen_vision.training import step as step_lib
from tests import tiny, tiny_task

# Not for what continues the run of `trained`, which is compiled before any fixture of a single test.


@pytest.fixture(autouse=True)
def _tables(monkeypatch):
  """All that the package is told: names in its tables."""
  monkeypatch.setitem(tasks_build.TASKS, "colour", (tiny_task.ColourTask, tiny_task.ColourConfig))
  monkeypatch.setitem(detection_options.HEADS, "centre", tiny_task.CentreConfig)
  monkeypatch.setitem(detection.HEADS, "centre", tiny_task.CentreHead)
  monkeypatch.setitem(segmentation_options.HEADS, "two_layer", tiny_task.TwoLayerConfig)
  monkeypatch.setitem(segmentation.HEADS, "two_layer", tiny_task.TwoLayerHead)


def _colour():
  config = config_lib.config_dict(tiny_task.ColourConfig())
  tiny.backbone(config)
  config.update(
    dict(
      trainable=("head/.*",),
      steps=4,
      batch_size=4,
      eval_batch_size=4,
      log_every=2,
      eval_every=2,
      checkpoint_every=2,
      ema_decay=0.5,
      pictures=2,
      tensorboard=False,
    )
  )
  return config


def _arrays(workdir, step):
  """Every leaf of a checkpoint by its path."""
  config = tasks_build.read_config(_colour())
  task = tasks_build.build_task(config)
  model = loop.build_model(task, config)
  tx = optimizer.build(
    config.optimizer, steps=config.steps, trainable=model.trainable, layer_of=model.layer_of
  )
  own = task.initial_state(None)
  state = step_lib.init_state(model.trainable, tx, seed=0, ema=True, mutable=model.mutable, task_state=own)
  with checkpoint.Checkpoints(workdir) as checkpoints:
    state, _ = checkpoints.restore(state, step)
  state["key"] = jax.random.key_data(state["key"])
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(state)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """The workdir of a run of four steps, and its metrics."""
  workdir = tmp_path_factory.mktemp("colour") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(tasks_build.TASKS, "colour", (tiny_task.ColourTask, tiny_task.ColourConfig))
    return workdir, loop.train(_colour(), workdir)


def test_a_fifth_task_trains_and_is_judged_on_its_evaluations(trained):
  workdir, metrics = trained
  assert {"closeness", "images", "test/closeness", "test/images"} < set(metrics)
  assert metrics["images"] == metrics["test/images"] == 5
  series = tiny.metrics(workdir)
  assert [step for step, _ in series["eval/closeness"]] == [2, 4]
  assert [step for step, _ in series["eval/test/closeness"]] == [4]  # at the end only
  assert {"train/loss", "train/loss/colour", "train/loss/copy", "train/brightness"} < set(series)
  total = series["train/loss/colour"][0][1] + series["train/loss/copy"][0][1]
  assert series["train/loss"][0][1] == pytest.approx(total, rel=1e-5)
  for name in ("errors.json", "test/errors.json", "curves_train.png"):
    assert (workdir / name).exists(), name
  assert len(list((workdir / "pictures").glob("*.png"))) == 2


def test_what_changes_is_in_the_checkpoint_and_the_teacher_is_not(trained):
  workdir, _ = trained
  record = json.loads((workdir / "checkpoints/4/meta/metadata").read_text())
  leaves = set(record["leaves"])
  assert {"mutable/head/norm/mean", "mutable/head/norm/var", "task/mean", "task/images"} < leaves
  assert not [path for path in leaves if "teacher" in path or "backbone" in path]
  assert list(record["meta"]["teacher"]) == ["weights"]
  arrays = _arrays(workdir, 4)
  [images] = [value for path, value in arrays.items() if path == "['task']['images']"]
  assert images == 16
  means = [value for path, value in arrays.items() if path.startswith("['mutable']") and "mean" in path]
  assert len(means) == 1 and np.abs(means[0]).max() > 0


def test_a_run_continues_bit_for_bit_and_refuses_another_teacher(trained, tmp_path, monkeypatch):
  workdir, metrics = trained
  copy = tmp_path / "run"
  shutil.copytree(workdir, copy)
  shutil.rmtree(copy / "checkpoints" / "4")
  with monkeypatch.context() as patch:
    patch.setattr(tiny_task.ColourTask, "teacher_seed", 8)
    with pytest.raises(ValueError, match="had the teacher"):
      loop.train(_colour(), copy)
  again = loop.train(_colour(), copy)
  assert again["closeness"] == metrics["closeness"]
  found, wanted = _arrays(copy, 4), _arrays(workdir, 4)
  assert found.keys() == wanted.keys()
  for path, value in wanted.items():
    np.testing.assert_array_equal(found[path], value, err_msg=path)
  evaluated = loop.evaluate(_colour(), copy)
  assert evaluated["closeness"] == pytest.approx(metrics["closeness"], abs=1e-6)


def _photo(folder, side=80):
  folder.mkdir(exist_ok=True)
  path = folder / "photo.png"
  Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3)).astype(np.uint8)).save(path)
  return path


def test_it_predicts_with_pictures_and_is_exported(trained, tmp_path):
  workdir, _ = trained
  photo = _photo(tmp_path / "photos")
  summary = predict_files.predict([str(photo)], workdir=str(workdir), out=str(tmp_path / "out"))
  assert summary["done"] == 1 and summary["heads"]["colour"]["task"] == "colour"
  rows = json.loads((tmp_path / "out/colour/colours.json").read_text())
  assert set(rows) == {"photo.png"} and set(rows["photo.png"]) == set(tiny_task.CHANNELS)
  with Image.open(tmp_path / "out/colour/pictures/photo.jpg") as picture:
    assert picture.size == (160, 80)
  predictor = predict.Predictor(None, {"colour": workdir})
  [result] = predictor([photo])["colour"]
  np.testing.assert_allclose(result.values, list(rows["photo.png"].values()), atol=1e-6)

  meta = export.export(predictor, tmp_path / "colour.jaxexport", platforms=("cpu",))
  assert meta["images"] == [1, tiny_task.SIDE, tiny_task.SIDE, 3]
  program = jax.export.deserialize((tmp_path / "colour.jaxexport").read_bytes())
  _, weights, _ = export.program(predictor)
  image = predictor.heads["colour"].task.read_input(photo)[1]["image"][None]
  outputs = program.call(weights, image, np.full((1, 2), tiny_task.SIDE, np.int32))
  np.testing.assert_allclose(outputs["colour"]["colour"][0], result.values, atol=1e-5)


@pytest.mark.slow
def test_it_is_planned_with_its_teacher(tmp_path):
  report = plan.plan(_colour(), str(tmp_path), "cpu:1")
  assert report["fits"] and report["bytes_per_device"]["frozen_weights"] > 0


@pytest.mark.parametrize("kind", [pytest.param("detection", marks=pytest.mark.slow), "segmentation"])
def test_a_second_head_goes_through_everything(tmp_path, kind):
  config = {"detection": tiny.detection, "segmentation": tiny.segmentation}[kind]()
  head = {"detection": "centre", "segmentation": "two_layer"}[kind]
  config[kind].head = config_lib.config_dict(
    {"centre": tiny_task.CentreConfig, "two_layer": tiny_task.TwoLayerConfig}[head]()
  )
  config.update(dict(steps=2, checkpoint_every=1, pictures=1, log_every=1))
  metrics = loop.train(config, tmp_path / "run")
  assert np.isfinite(metrics[{"detection": "box_AP", "segmentation": "mIoU"}[kind]])
  series = tiny.metrics(tmp_path / "run")
  assert ("train/loss/box" if kind == "detection" else "train/loss/pixels") in series
  evaluated = loop.evaluate(config, tmp_path / "run")
  drop = {"examples_per_second"}
  assert {k: v for k, v in evaluated.items() if k not in drop} == {
    k: v for k, v in metrics.items() if k not in drop
  }
  photo = _photo(tmp_path / "photos")
  predict_files.predict([str(photo)], workdir=str(tmp_path / "run"), out=str(tmp_path / "out"))
  [folder] = [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
  assert (folder / "pictures/photo.jpg").exists()
  assert (folder / ("detections.json" if kind == "detection" else "classes.json")).exists()
  predictor = predict.Predictor(None, {"head": tmp_path / "run"})
  _, _, meta = export.program(predictor)
  assert meta["heads"]["head"]["task"] == kind
  config = plan.without_files(config)
  program = plan.make_program(plan.build_task(config), config, sharding.make_mesh(devices=jax.devices()[:1]))
  assert plan.program_flops(program) > 0


def test_what_a_task_or_a_head_forgets_is_an_error_when_it_is_made():
  with pytest.raises(TypeError, match="The task Half lacks .*blank_example, build_model.*view"):

    class Half(base.Task):
      nominal_classes = 2

      def __init__(self, config, classes=None):
        pass

  class Silent(results.Result):
    pass

  with pytest.raises(TypeError, match="abstract"):
    Silent()

  class Boxes(tiny_task.heads.DetectionHead):
    def losses(self, features, batch, rng):
      return {}, {}

  with pytest.raises(TypeError, match="abstract.*score_boxes"):
    Boxes()
