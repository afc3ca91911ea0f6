"""Normals and depth through the one loop: trained, evaluated, predicted, exported, planned, resumed."""

import json
import shutil

import jax
import numpy as np
from PIL import Image
import pytest

from frozen_vision import export
from frozen_vision.data import prepare
from frozen_vision.data.dense import codewords
from frozen_vision.devices import sharding
from frozen_vision.metrics import dense
from frozen_vision.planning import plan
from frozen_vision.prediction import files as predict_files
from frozen_vision.prediction import predictor as predict
from frozen_vision.runs import state_leaves
from frozen_vision.tasks import base, dense_maps
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import loop, step
from tests import tiny
from tests.data.dense import dense_files


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """The workdir of a run of four steps, and its metrics."""
  workdir = tmp_path_factory.mktemp("dense") / "run"
  config = tiny.dense_regression()
  config.pictures = 2
  return workdir, loop.train(config, workdir)


@pytest.fixture(scope="module")
def predictor(trained):
  return predict.Predictor(None, {"measure": str(trained[0])})


def test_a_run_is_judged_and_shown(trained):
  workdir, metrics = trained
  per_image = json.loads((workdir / "per_image.json").read_text())
  assert list(per_image) == [f"room_validation_0_{i:06d}" for i in range(3)]
  for name in ("mean_angle", "abs_rel", "rmse", "log10", "silog", "delta1", "delta2", "delta3"):
    assert metrics[name] == pytest.approx(np.mean([one[name] for one in per_image.values()]), rel=1e-9)
  assert 0 < metrics["median_angle"] < 180 and metrics["within_11.25"] <= metrics["within_30"] <= 1
  series = tiny.metrics(workdir)
  assert {"train/loss/normals", "train/loss/depth", "train/codeword_accuracy", "train/abs_rel"} < set(series)
  assert len(list((workdir / "pictures").glob("*.png"))) == 1


def test_evaluation_reads_the_codewords_that_were_learned(trained):
  workdir, metrics = trained
  found = loop.evaluate(tiny.dense_regression(), workdir)
  assert {name: found[name] for name in ("mean_angle", "rmse")} == {
    name: pytest.approx(metrics[name], rel=1e-6) for name in ("mean_angle", "rmse")
  }
  config = tiny.dense_regression()
  config.dense_regression.rooms.train_images = 10  # of which others would be learned
  assert loop.evaluate(config, workdir)["mean_angle"] == found["mean_angle"]
  config.dense_regression.codewords = 7
  with pytest.raises(ValueError, match="was trained on 8 classes"):
    loop.evaluate(config, workdir)


def test_predictions_on_files_are_those_of_evaluation(trained, predictor, tmp_path):
  workdir, metrics = trained
  source = tasks_build.build_task(tiny.dense_regression())._validation
  for index in range(3):
    Image.fromarray(source.image(index)).save(tmp_path / f"{index}.png")
  Image.fromarray(np.zeros((40, 56, 3), np.uint8)).save(tmp_path / "wide.png")
  summary = predict_files.predict_files(predictor, [str(tmp_path)], tmp_path / "out")
  assert summary["done"] == 4
  assert (tmp_path / "out/measure/pictures/wide.jpg").exists()
  angles, relative = [], []
  for index in range(3):
    with Image.open(tmp_path / f"out/measure/normals/{index}.png") as image:
      normals = np.asarray(image) / 127.5 - 1
    with Image.open(tmp_path / f"out/measure/depth/{index}.png") as image:
      depth = np.asarray(image) / 1000
    truth = source.truth(index)
    angles.append(dense.angle_errors(normals, truth["normals"]).mean())
    relative.append(dense.depth_errors(depth, truth["depth"])["abs_rel"])
  assert np.mean(angles) == pytest.approx(metrics["mean_angle"], abs=0.5)  # 8 bits a coordinate
  assert np.mean(relative) == pytest.approx(metrics["abs_rel"], abs=1e-3)
  with Image.open(tmp_path / "out/measure/depth/wide.png") as image:
    assert image.size == (56, 40)


def test_an_exported_program_gives_the_maps(predictor):
  function, weights, meta = export.program(predictor)
  assert [set(one) for one in meta["heads"]["measure"]["classes"]] == [{"id", "name", "normal"}] * 8
  images = np.random.default_rng(0).integers(0, 255, (1, *meta["image_shape"]), np.uint8)
  found = jax.jit(function)(weights, images, np.array([[32, 32]], np.int32))["measure"]
  np.testing.assert_allclose(np.linalg.norm(found["normals"], axis=-1), 1, atol=1e-5)
  (results,) = predictor([images[0]])["measure"]
  assert isinstance(results, dense_maps.DenseMaps)
  np.testing.assert_allclose(found["depth"][0], results.depth, rtol=1e-4)
  np.testing.assert_allclose(found["normals"][0], results.normals, atol=1e-4)


def test_a_plan_has_the_shapes_of_training_and_reads_no_data():
  config = tasks_build.read_config(tiny.dense_regression())
  with tasks_build.build_task(config).train_batches(0) as batches:
    batch = step.device_batch(next(batches))
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  planned = tasks_build.task_class("dense_regression")(config, base.named_classes(map(str, range(40))))
  assert planned.data == {}
  program = plan.make_program(planned, config, mesh)
  described = (state_leaves.describe(state_leaves.flatten(tree)[0]) for tree in (program.batch, batch))
  assert next(described) == next(described)
  np.testing.assert_array_equal(planned.build_model().head.codewords, codewords.lattice(40))


def test_a_run_that_ended_early_goes_on_as_if_it_had_not(trained, tmp_path, monkeypatch):
  workdir, metrics = trained
  again = tmp_path / "again"
  shutil.copytree(workdir, again)
  shutil.rmtree(again / "checkpoints/4")
  config = tiny.dense_regression()
  config.pictures = 2
  # Where an image is left out, others are learned; those of the checkpoint stay.
  monkeypatch.setattr(codewords, "learn", lambda source, count: codewords.lattice(count))
  assert loop.train(config, again)["rmse"] == pytest.approx(metrics["rmse"], rel=1e-5)


def test_views_of_several_scales_are_averaged_and_larger_ones_are_farther():
  config = tiny.dense_regression()
  config.dense_regression.test.scales = (1.0, 2.0)
  task = tasks_build.build_task(config)
  model = task.build_model()
  with task.eval_batches() as batches:
    batch = step.device_batch(next(batches))

  @jax.jit
  def run(batch):
    features = task.features(model, batch, None)
    views = task.predict(model, batch, features)
    return views, task.to_source(views, batch, (32, 32))

  views, found = run(batch)
  small, large = (np.asarray(view["depth"]) for view in views)
  assert large.shape[1:3] == (64, 64)
  assert large.mean() > 1.5 * small.mean()  # untrained, both guess the middle of their range
  halved = large.reshape(-1, 32, 2, 32, 2).mean((2, 4))  # bilinear to half the size, at the centres
  np.testing.assert_allclose(found["depth"], (small[..., 0] + halved) / 2, rtol=1e-5)
  assert task.extra_views == 1


def test_one_target_alone(tmp_path):
  config = tiny.dense_regression()
  config.dense_regression.targets = ("depth",)
  config.steps = 2
  config.pictures = 1
  metrics = loop.train(config, tmp_path)
  assert "rmse" in metrics and "mean_angle" not in metrics
  assert tasks_build.build_task(config).classes == ()


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(targets=()), "targets is ().*normals, depth or both"),
    (dict(targets=("depth", "depth")), "each once"),
    (dict(depth_range=(5.0, 2.0)), "depth_range is .*nearer depth first"),
    (dict(head=dict(name="upernet", auxiliary_weight=0.4)), "auxiliary_weight is 0.4"),
    (dict(codewords=300), "codewords is 300; expected a whole number from 2 to 255"),
  ],
)
def test_options_that_do_not_fit(changes, message):
  config = tiny.dense_regression()
  config.dense_regression.update(changes)
  with pytest.raises(ValueError, match=message):
    tasks_build.read_config(config)


@pytest.mark.parametrize("data", ["nyuv2", "files", "prepared"])
def test_data_from_files(data, tmp_path, capsys):
  root = tmp_path / "nyu"
  rooms = dense_files.toolkit(root)
  config = tiny.dense_regression()
  section = dict(data=data, root=str(root), targets=("normals", "depth"), normal_signs=(1, -1, 1))
  config.dense_regression.update(section)
  if data == "files":
    paths = {name: dict(images=f"image/{split}", normals=f"normal/{split}", depth=f"depth/{split}")
             for name, split in (("train", "train"), ("validation", "test"))}  # fmt: skip
    config.dense_regression.update(paths)
  if data == "prepared":
    assert prepare.main(["nyuv2", "--root", str(root), "--out", str(tmp_path / "shards")]) == 0
    config.dense_regression.root = str(tmp_path / "shards")
  task = tasks_build.build_task(config)
  assert task.headline == "Normals and depth: 3 training and 3 validation images."
  with task.train_batches(0) as batches:
    batch = next(batches)
  assert batch["normals"].shape == (2, 32, 32, 3) and batch["depth"].max() > 1
  turned = rooms[0]["normals"] * np.array([1, -1, 1])
  np.testing.assert_allclose(task.data["validation"].truth(0)["normals"], turned, atol=1e-6)
  # A perfect prediction has no error but that of millimetres.
  evaluator = task.evaluator()
  with task.eval_batches() as batches:
    for batch in batches:
      truth = [task.data["validation"].truth(int(index)) for index in batch["index"]]
      evaluator.update({name: np.stack([one[name] for one in truth]) for name in truth[0]}, batch)
  assert evaluator.result()["within_11.25"] == evaluator.result()["delta1"] == 1.0


def test_data_that_are_not_there_are_asked_for(tmp_path):
  config = tiny.dense_regression()
  config.dense_regression.update(dict(data="nyuv2", root=str(tmp_path / "absent")))
  with pytest.raises(FileNotFoundError, match="nyuv2_surfacenormal_metadata.zip"):
    tasks_build.build_task(config)
  config.dense_regression.data = "files"
  with pytest.raises(ValueError, match="needs --config.dense_regression.train.images=FOLDER"):
    tasks_build.build_task(config)
  dense_files.toolkit(tmp_path / "nyu")
  for split in ("training", "validation"):
    images, depth = (str(tmp_path / "nyu" / kind / "train") for kind in ("image", "depth"))
    arguments = ["--images", images, "--depth", depth, "--split", split, "--out", str(tmp_path / "shards")]
    assert prepare.main(["dense", *arguments]) == 0
  config.dense_regression.update(dict(data="prepared", root=str(tmp_path / "shards")))
  with pytest.raises(ValueError, match=r"has depth, no normals.*targets=\"\('depth',\)\""):
    tasks_build.build_task(config)
