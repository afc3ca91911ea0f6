"""Action recognition as the loops see it: micro-batches, views, unreadable videos, and a whole tiny run."""

import json
import pickle
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen_vision.backbones import families
from frozen_vision.data import prepare
from frozen_vision.data.video import clips, prepared_videos
from frozen_vision.freezing import partition
from frozen_vision.tasks import build as tasks_build
from frozen_vision.tasks import frame_passes
from frozen_vision.training import loop, step
from frozen_vision.visualization import clips as visualize_action
from tests import samples, tiny


def _task(**options):
  config = tiny.action()
  config.action.update(options)
  return tasks_build.build_task(config), config


@pytest.fixture(scope="module")
def batch():
  task, _ = _task()
  with task.eval_batches() as batches:
    return next(batches)


def _split(task):
  """(graphdef, state) of a model whose head does not start near zero."""
  graphdef, state = nnx.split(task.build_model())
  state["head"] = jax.tree.map(
    lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), state["head"]
  )
  return graphdef, state


@pytest.fixture(scope="module")
def built():
  task, _ = _task()
  return task, *_split(task)


def test_micro_batches_change_no_feature(built):
  _, graphdef, state = built
  frames = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), dtype=np.uint8)

  @jax.jit
  def run(state):
    backbone = nnx.merge(graphdef, state).backbone
    return [
      frame_passes.frame_features(backbone, frames, (1, 3), frames_per_pass=size) for size in (100, 1, 5, 8)
    ]

  wanted, *others = run(state)
  assert [x.shape[0] for x in wanted] == [8, 8] and wanted[0].shape[1] == 4
  for other in others:
    for found, level in zip(other, wanted):
      np.testing.assert_allclose(found, level, atol=1e-5 * np.abs(level).max())


def test_memory_is_that_of_one_pass(built):
  """What XLA sets aside for 32 frames in passes of 4 is little more than for 4 frames."""
  _, graphdef, state = built

  def temporary(count):
    frames = jax.ShapeDtypeStruct((count, 64, 64, 3), jnp.uint8)

    def run(state, x):
      return frame_passes.frame_features(nnx.merge(graphdef, state).backbone, x, (3,), frames_per_pass=4)

    return jax.jit(run).lower(state, frames).compile().memory_analysis().temp_size_in_bytes

  assert temporary(32) < 2 * temporary(4) + 32 * 64 * 64 * 3 * 2


def test_a_batchnorm_that_trains_takes_all_frames_in_one_pass():
  backbone = families.build_backbone("resnet18", rngs=nnx.Rngs(0), depths=(1, 1, 1, 1), width=8)
  frames, key = jnp.zeros((4, 8, 8, 3), jnp.uint8), jax.random.key(0)
  with pytest.raises(ValueError, match="frames_per_pass is 3, .*BatchNorm trains.*frames_per_pass=4 or more"):
    frame_passes.frame_features(backbone, frames, (3,), frames_per_pass=3, rng=key)
  partition.inference_mode(backbone, set())  # a frozen one is like any other
  [found] = frame_passes.frame_features(backbone, frames, (3,), frames_per_pass=3, rng=key)
  assert found.shape == (4, 1, 1, 64)


def test_one_view_is_no_averaging_and_more_are_the_mean_of_probabilities(built, batch):
  task, graphdef, state = built

  @jax.jit
  def predict(state, clip):
    model = nnx.merge(graphdef, state)
    return task.predict(model, {"clip": clip}, task.features(model, {"clip": clip}, None))["probabilities"]

  @jax.jit
  def plainly(state, clip):
    model = nnx.merge(graphdef, state)
    return jax.nn.softmax(model.head(task.features(model, {"clip": clip}, None)), axis=-1)

  clip = batch["clip"]
  assert clip.shape[1] == 1
  np.testing.assert_allclose(predict(state, clip), plainly(state, clip[:, 0]), atol=1e-6)
  np.testing.assert_allclose(predict(state, clip).sum(-1), 1, atol=1e-5)
  views = np.concatenate([clip, clip[:, :, ::-1]], axis=1)
  parts = [predict(state, views[:, i : i + 1]) for i in range(2)]
  assert np.abs(parts[0] - parts[1]).max() > 1e-4
  np.testing.assert_allclose(predict(state, views), (parts[0] + parts[1]) / 2, atol=1e-6)


def test_unreadable_videos_have_no_part_in_the_loss(built, batch):
  task, graphdef, state = built

  @jax.jit
  def loss(clip, label, readable):
    model = nnx.merge(graphdef, state)
    data = {"clip": clip, "label": label, "readable": readable}
    losses = task.loss(model, data, task.features(model, data, None), jax.random.key(0), None)
    return losses.total, losses.metrics

  clip, label = batch["clip"][:, 0], batch["label"]
  value, scalars = loss(clip, label, np.array([True, False]))
  other, _ = loss(clip[[0, 0]], label[[0, 0]], np.array([True, False]))
  np.testing.assert_allclose(value, other, rtol=1e-5)
  assert float(scalars["unreadable"]) == 0.5
  assert abs(float(loss(clip, label, np.ones(2, bool))[0]) - float(value)) > 1e-4
  assert float(loss(clip, label, np.zeros(2, bool))[0]) == 0


@pytest.mark.parametrize("head", ["video_swin", "attentive", "average"])
def test_features_are_computed_outside_of_the_gradient_or_within_alike(head):
  """With the backbone frozen or not, the loss is the same where nothing is random."""
  task, _ = _task(head={"name": head})
  graphdef, state = _split(task)
  with task.train_batches(0) as batches:
    data = step.device_batch(next(batches))
  rng = jax.random.key(0)

  @jax.jit
  def losses(state):
    model = nnx.merge(graphdef, state)
    frozen = task.loss(model, data, task.features(model, data, None), rng, None).total

    def within(state):
      model = nnx.merge(graphdef, state)
      return task.loss(model, data, task.features(model, data, rng), rng, None).total

    return frozen, *jax.value_and_grad(within)(state)

  frozen, value, gradient = losses(state)
  np.testing.assert_allclose(frozen, value, rtol=1e-5)
  assert np.abs(gradient["backbone"]["stages"][0]["blocks"][0]["mlp"]["fc1"]["kernel"][...]).max() > 0


@pytest.mark.slow
def test_a_run_leaves_everything_that_a_person_reads(tmp_path):
  config = tiny.action()
  config.pictures = 2
  config.action.test.clips = 1
  metrics = loop.train(config, tmp_path)
  assert {"top1", "top5", "mean_class_accuracy", "examples_per_second"} == set(metrics)
  series = tiny.metrics(tmp_path)
  assert series["compilations/after_first_evaluation"] == [(config.steps, 0)]
  assert np.isfinite([value for _, value in series["train/loss"]]).all()
  assert {value for _, value in series["train/unreadable"]} == {0.0}
  rows = (tmp_path / "confusion.csv").read_text().splitlines()
  assert rows[0] == ",left,right,up,down,growing,shrinking"
  assert sum(int(value) for row in rows[1:] for value in row.split(",")[1:]) == 7
  assert (tmp_path / "confusion.png").stat().st_size > 1000
  assert (tmp_path / "predictions.csv").read_text().splitlines()[0] == "index,true,predicted"
  assert len(list((tmp_path / "pictures").glob("*.png"))) == 1
  again = loop.evaluate(config, tmp_path)
  assert {key: value for key, value in again.items() if "per_second" not in key} == {
    key: value for key, value in metrics.items() if "per_second" not in key
  }


def test_a_run_from_before_levels_were_counted_from_the_last_is_the_same_run(tmp_path):
  config = tiny.action()
  config.action.head.update(dict(name="average", average=dict(levels=(-1,))))
  old = config.to_dict() | {"steps": 99}  # another option, so that the runs are compared and none begins
  old["action"] |= {"head": "average", "average": {"levels": [3]}}
  (tmp_path / "config.json").write_text(json.dumps(old))
  with pytest.raises(ValueError, match="belongs to another config") as caught:
    loop.train(config, tmp_path)
  assert "steps: 99 there" in str(caught.value) and ".levels" not in str(caught.value)


def test_videos_and_folds(tmp_path):
  """Lists of videos, and folds by scene, through the whole input pipeline."""
  folder = samples.video_root(tmp_path)
  config = tiny.action()
  config.action.update(
    dict(
      data="folds",
      lists=(str(folder / "train.csv"), str(folder / "val.csv")),
      group_column="scene_group",
      frames=2,
      image_size=32,
      short_side=40,
      fold=1,
    )
  )
  config.action.test.update(dict(clips=2, crops=3))
  task = tasks_build.build_task(config)
  assert task.headline.endswith("validation videos, 2 classes.") and " 20 " not in task.headline
  with task.eval_batches() as batches:
    batch = next(batches)
  assert batch["clip"].shape == (2, 6, 2, 32, 32, 3) and batch["readable"].all()
  assert batch["clip"].std() > 10
  with task.train_batches(0) as batches:
    assert next(batches)["clip"].shape == (2, 2, 32, 32, 3)
  config.action.update(
    dict(data="videos", train=str(folder / "train.csv"), validation=str(folder / "val.csv"), group_column="")
  )
  assert "12 training and 8 validation videos" in tasks_build.build_task(config).headline


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """Four videos for each of two splits, as lists and prepared: (folder of both, folder of the videos)."""
  pytest.importorskip("tensorflow", reason="writing shards needs TensorFlow")
  folder = samples.video_root(tmp_path_factory.mktemp("videos"))
  root = tmp_path_factory.mktemp("prepared")
  for split, name in (("train", "train"), ("validation", "val")):
    header, *rows = (folder / f"{name}.csv").read_text().splitlines()
    (root / f"{split}.csv").write_text("\n".join([header, *rows[:2], *rows[-2:]]))
    assert (
      prepare.main(
        [
          "videos",
          "--videos",
          str(root / f"{split}.csv"),
          "--root",
          str(folder / name),
          "--split",
          split,
          "--out",
          str(root),
          "--short-side",
          "48",
          "--group-column",
          "scene_group",
        ]
      )
      == 0
    )
  return root, folder


def test_prepared_videos_in_place_of_lists_and_folds(prepared):
  root, folder = prepared
  shape = dict(frames=3, stride=5, image_size=32, short_side=48)
  task, config = _task(data="prepared", root=str(root), **shape)
  assert "4 training and 4 validation videos, 2 classes" in task.headline
  assert config.loader.workers == 0
  splits = tuple(str(root / "frozen_vision_videos" / name) for name in ("train", "validation"))
  files = dict(data="videos", train=str(root / "train.csv"), validation=str(root / "train.csv"))
  direct, _ = _task(**files, root=str(folder / "train"), **shape)
  mixed, _ = _task(**files | dict(train=splits[0]), root=str(folder / "train"), **shape)
  found = []
  for each in (direct, task, mixed):
    with each.train_batches(0) as batches:
      found.append(next(batches))
  assert found[0]["readable"].all() and found[0]["clip"].std() > 10
  for other in found[1:]:
    np.testing.assert_array_equal(other["label"], found[0]["label"])
    assert np.abs(other["clip"].astype(float) - found[0]["clip"]).mean() < 6
  np.testing.assert_array_equal(found[1]["clip"], found[2]["clip"])
  with task.eval_batches() as batches:
    assert next(batches)["readable"].all()
  fold, _ = _task(data="folds", lists=splits, num_folds=2, **shape)
  assert "training and " in fold.headline and len(fold._train) + len(fold._validation) == 8
  assert not set(fold._train.groups) & set(fold._validation.groups)
  with fold.train_batches(0) as batches:
    assert next(batches)["readable"].all()


def test_prepared_videos_that_do_not_fit(prepared, tmp_path):
  root, _ = prepared
  for name in ("train", "validation"):
    (tmp_path / "frozen_vision_videos").mkdir(exist_ok=True)
    shutil.copytree(root / "frozen_vision_videos" / name, tmp_path / "frozen_vision_videos" / name)
  options = dict(data="prepared", root=str(tmp_path))
  metadata = prepared_videos.KIND.folder(tmp_path, "validation") / "metadata.json"
  stored = json.loads(metadata.read_text())
  metadata.write_text(json.dumps(stored | {"class_names": stored["class_names"][::-1]}))
  with pytest.raises(
    ValueError, match="split validation does not have the classes of .* another order .*prepare them"
  ):
    _task(**options)
  metadata.write_text(json.dumps(stored | {"rate": 12.0}))
  with pytest.raises(ValueError, match="keeps 12 frames per second; 0 "):
    _task(**options)
  (metadata.parent / "index.npz").unlink()
  with pytest.raises(FileNotFoundError, match="is incomplete; prepare it with.* --split validation"):
    _task(**options)
  with pytest.raises(FileNotFoundError, match="config.action.root: .*does not exist. Make it with"):
    _task(data="prepared", root=str(tmp_path / "absent"))
  with pytest.raises(ValueError, match="holds the prepared splits frozen_vision_videos/train; give"):
    _task(data="videos", train=str(tmp_path), validation=str(tmp_path))


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(head={"name": "linear"}), "'linear'; known: video_swin, attentive, average"),
    (dict(data="ucf"), "'ucf'; expected clips, videos, folds or prepared"),
    (dict(data="folds"), "needs config.action.lists"),
    (dict(sampling="random"), "'random'; expected dense or uniform"),
    (dict(frames_per_pass=0), "expected a whole number of at least 1"),
  ],
)
def test_options_that_do_not_fit(options, message):
  with pytest.raises(ValueError, match=message):
    _task(**options)


def test_missing_data_says_how_to_get_it():
  with pytest.raises(FileNotFoundError, match="config.action.train: .* does not exist. Give a folder of"):
    _task(data="videos", train="absent")


def test_strips_and_confusion_pictures():
  rng = np.random.default_rng(0)
  clip = rng.integers(0, 255, (12, 20, 30, 3), dtype=np.uint8)
  right, wrong = (visualize_action.ClipPrediction(clip, np.array([0.7, 0.2, 0.1]), label) for label in (0, 1))
  one = visualize_action.draw_strips([right], ("a", "b", "c"))
  two = visualize_action.draw_strips([right, wrong], ("a", "b", "c"), num_frames=3)
  assert one.dtype == two.dtype == np.uint8
  assert two.shape[0] > 1.7 * one.shape[0] and one.shape[1] > two.shape[1]
  with pytest.raises(ValueError, match="no clip"):
    visualize_action.draw_strips([], ("a",))
  for count in (3, 60):
    matrix = rng.integers(0, 5, (count, count))
    picture = visualize_action.draw_confusion(matrix, [f"class {i}" for i in range(count)])
    assert picture.ndim == 3 and picture.std() > 5


def test_transforms_pickle():
  """Loader processes need them."""
  for transform in (clips.TrainTransform(clips.Sampler(4), 8), clips.EvalTransform(clips.Sampler(4), 8)):
    assert pickle.loads(pickle.dumps(transform)) == transform
