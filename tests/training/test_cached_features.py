"""Training and evaluating from cached features: the same numbers, no image read twice, and nothing stale."""

import contextlib
import json
import os
import shutil

import jax
import numpy as np
import pytest

from frozen_vision.data.classification import augment
from frozen_vision.freezing import cache as feature_cache
from frozen_vision.tasks import build as tasks_build
from frozen_vision.training import feeds, loop
from tests import tiny
from tests.freezing import test_cache


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  return tiny.image_folder(tmp_path_factory.mktemp("images"))


def _config(images, path="", **cache):
  """Two views of 12 images, 4 at a time: from step 6 on everything has been seen."""
  config = tiny.classification(images, images)
  config.update(dict(trainable=("head/.*",), steps=8, log_every=1, eval_every=4, checkpoint_every=100))
  config.cache.update(dict(path=str(path), views=2, **cache))
  return config


@pytest.fixture
def reads(monkeypatch):
  """Names of the training images that are augmented."""
  original, found = augment.TrainTransform.__call__, []

  def call(self, record, rng):
    found.extend([record["name"]] if "name" in record else [])  # the blank example has none
    return original(self, record, rng)

  monkeypatch.setattr(augment.TrainTransform, "__call__", call)
  return found


def _numbers(workdir):
  """Everything that a run has logged, without times."""
  series = tiny.metrics(workdir)
  return {name: values for name, values in series.items() if name.startswith(("train/", "eval/t"))}


def _assert_close(found, wanted, rtol):
  assert found.keys() == wanted.keys()
  for name in wanted:
    np.testing.assert_allclose(found[name], wanted[name], rtol=rtol, atol=rtol, err_msg=name)


def test_training_from_the_cache_equals_training_without(tmp_path, images, reads, caplog):
  loop.train(_config(images), tmp_path / "plain")
  assert len(reads) >= 32
  for name in ("first", "again"):
    with caplog.at_level("INFO"):
      caplog.clear()
      reads.clear()
      loop.train(_config(images, tmp_path / "cache"), tmp_path / name)
    _assert_close(_numbers(tmp_path / name), _numbers(tmp_path / "plain"), 1e-6)
    assert tiny.metrics(tmp_path / name)["compilations/after_first_evaluation"] == [(8, 0)]
    if name == "first":
      assert "0 records are there; 24 more of " in caplog.text
      caches = [feature_cache.FeatureCache(tmp_path / "cache", _key(path)) for path in _keys(tmp_path)]
      assert sorted(map(len, caches)) == [12, 24]
  assert "records are there" not in caplog.text and not reads
  # bfloat16 has 8 bits of precision; the loss of a linear layer follows its inputs.
  loop.train(_config(images, tmp_path / "cache", dtype="bfloat16"), tmp_path / "rounded")
  rounded, exact = (_numbers(tmp_path / name)["train/loss"] for name in ("rounded", "plain"))
  np.testing.assert_allclose(rounded, exact, rtol=2**-8)
  assert rounded != exact


def _keys(tmp_path):
  return sorted((tmp_path / "cache").glob("*/key.json"))


def _key(path):
  return json.loads(path.read_text())


@contextlib.contextmanager
def _feed(config, start=0):
  config = tasks_build.read_config(config)
  task, config, _, mesh = loop._open(config, "extract")
  model = loop.build_model(task, config, mesh)
  with jax.set_mesh(mesh), feeds.Cached(task, model, config, mesh, start) as feed:
    yield feed


def test_extraction_fills_the_cache_and_continues(tmp_path, images):
  config = _config(images, tmp_path / "cache")
  loop.extract(config)
  paths = test_cache.shard_paths(tmp_path / "cache")
  with _feed(config, start=5) as feed:
    batches = [next(feed) for _ in range(3)]
    assert all(batch.features is not None for batch in batches)
    assert batches[0].slots.tolist() == feed.order.slots(range(20, 24)).tolist()
    wanted = {int(slot): batch.features[0][row] for batch in batches for row, slot in enumerate(batch.slots)}
  # One damaged shard of the two: its records alone are computed again, to the same numbers.
  damaged = max(paths, key=os.path.getsize)
  data = bytearray(damaged.read_bytes())
  data[-1] ^= 1
  damaged.write_bytes(data)
  loop.extract(config)
  with _feed(config) as feed:
    for slot, features in wanted.items():
      np.testing.assert_allclose(feed.store.cache[slot]["features.0"], features, rtol=1e-6)


def _folder(config):
  with _feed(config) as feed:
    return feed.store.cache.folder


def test_whatever_features_depend_on_is_another_cache_and_heads_share_one(tmp_path, images):
  moved = shutil.copytree(images, tmp_path / "images")
  config = _config(moved, tmp_path / "cache")
  first = _folder(config)
  folders_found = {first}

  def is_new(changed):
    before = len(folders_found)
    folders_found.add(_folder(changed))
    return len(folders_found) > before

  for change in (
    {"seed": 1},
    {"backbone.overrides.window_sizes": (2, 2, 2, 2)},
    {"classification.image_size": 24},
    {"classification.crop_padding": 1},
    {"cache.dtype": "bfloat16"},
  ):
    changed = _config(moved, tmp_path / "cache")
    changed.update_from_flattened_dict(change)
    assert is_new(changed), change
  for change in ({"cache.views": 5}, {"optimizer.learning_rate": 1.0}, {"batch_size": 2}):
    changed = _config(moved, tmp_path / "cache")
    changed.update_from_flattened_dict(change)
    assert not is_new(changed), change
  path = moved / "class0" / "0.png"
  path.write_bytes((moved / "class1" / "0.png").read_bytes())
  assert is_new(config)
  segmentation = [tiny.segmentation(head) for head in ("linear", "mask2former")]
  for other in segmentation:
    other.cache.update(dict(path=str(tmp_path / "cache"), views=1))
  assert is_new(segmentation[0]) and not is_new(segmentation[1])


def test_features_that_cannot_be_cached_are_refused(tmp_path, images):
  config = _config(images, tmp_path / "cache")
  config.classification.mixup = 0.5
  with pytest.raises(feature_cache.CacheError, match="numbers that every step draws anew"), _feed(config):
    pass
  config = _config(images, tmp_path / "cache")
  config.classification.resolutions = ((0, 8), (3, 16))
  with pytest.raises(feature_cache.CacheError, match="several sizes"), _feed(config):
    pass
  config = _config(images, tmp_path / "cache")
  config.trainable = (".*",)
  with pytest.raises(feature_cache.CacheError, match="needs a frozen backbone"), _feed(config):
    pass
  with pytest.raises(ValueError, match="--mode=extract needs --config.cache.path"):
    loop.extract(_config(images))
  assert not list((tmp_path / "cache").glob("*"))


def test_a_run_beside_another_writer_computes_and_a_disk_that_fails_ends_no_run(
  tmp_path, images, caplog, monkeypatch
):
  config = _config(images, tmp_path / "cache")
  with _feed(config) as writing, _feed(config) as other:
    assert "is writing the feature cache" in caplog.text
    for feed in (writing, other):
      batch = next(feed)
      assert batch.features is None and feed.place(batch)
    with pytest.raises(feature_cache.lock.LockedError):
      _open_strictly(config)
  assert len(feature_cache.FeatureCache(tmp_path / "cache", writing.store.cache.key)) == 4
  with _feed(config) as feed:
    monkeypatch.setattr(feature_cache.shards, "write", _no_space)
    for _ in range(4):
      feed.place(next(feed))
    feed.store.sync()
    assert "No space left on device" in caplog.text and "not stored" in caplog.text
    feed.place(next(feed))


def _open_strictly(config):
  config = tasks_build.read_config(config)
  task, config, _, mesh = loop._open(config, "extract")
  with jax.set_mesh(mesh):
    feeds.Cached(task, loop.build_model(task, config, mesh), config, mesh, strict=True)


def _no_space(folder, arrays, metadata):
  raise OSError(28, os.strerror(28), str(folder))
