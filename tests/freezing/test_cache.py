"""The feature cache: what it gives back, and what kills, damage, full disks and two writers leave of it."""

import errno
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest

from frozen_vision.files import lock, shards
from frozen_vision.freezing import cache as feature_cache

KEY = feature_cache.make_key(features={"weights": "0"}, data="a", view={"size": 8}, dtype="bfloat16")


def records(indices):
  """Records that follow from their indices: a map, a vector and a label."""
  indices = np.asarray(indices)
  steps = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
  return {
    "features.0": indices[:, None, None, None] + steps,
    "features.1": (indices[:, None] / np.arange(1, 8)).astype(ml_dtypes.bfloat16),
    "batch.valid": indices % 2 == 0,
    "batch.label": indices.astype(np.int32),
  }


def fill(path, *batches, key=KEY, **options):
  cache = feature_cache.FeatureCache(path, key)
  with cache.writing(**options) as writer:
    for indices in batches:
      writer.add(indices, records(indices))
  return cache


def _check(cache, indices):
  """Every record that the cache gives is the one that was put in."""
  found = cache.read(indices)
  for name, wanted in records(indices).items():
    assert found[name].dtype == wanted.dtype
    np.testing.assert_array_equal(found[name], wanted)


def shard_paths(path):
  return sorted(path.rglob(f"*{shards.SUFFIX}"))


def test_records_are_found_by_index_in_any_order_and_by_any_process(tmp_path):
  written = fill(tmp_path, [5, 2, 9], [0, 40], shard_bytes=200)
  assert len(shard_paths(tmp_path)) == 2
  for cache in (written, feature_cache.FeatureCache(tmp_path, KEY)):
    assert len(cache) == 5 and 9 in cache and 3 not in cache and 1000 not in cache
    _check(cache, [9, 40, 9, 5])
    assert cache[40]["batch.label"] == 40 and cache[5]["features.0"].shape == (2, 2, 3)
    assert cache.missing([1, 2, 41, 0]).tolist() == [1, 41]
    with pytest.raises(KeyError, match="no records \\[1\\]"):
      cache.read([2, 1])
    batches = list(cache.iterate(batch_size=2))
    assert [indices.tolist() for indices, _ in batches] == [[0, 2], [5, 9], [40]]
    assert [record["batch.label"].tolist() for _, record in batches] == [[0, 2], [5, 9], [40]]


def test_old_records_do_not_wait_for_a_full_shard(tmp_path):
  fill(tmp_path, [1], [2], [3], shard_seconds=0.0)
  assert len(shard_paths(tmp_path)) == 3
  _check(feature_cache.FeatureCache(tmp_path, KEY), [1, 2, 3])


@pytest.mark.parametrize("field", ["features", "data", "view", "dtype"])
def test_another_key_is_another_cache(tmp_path, field):
  fill(tmp_path, [1])
  assert not len(feature_cache.FeatureCache(tmp_path, {**KEY, field: "another"}))


def test_shards_in_the_folder_of_another_key_are_not_read(tmp_path, caplog):
  other = feature_cache.FeatureCache(tmp_path, {**KEY, "data": "b"})
  fill(tmp_path, [1]).folder.rename(other.folder)
  other.refresh()
  assert not len(other) and "belongs to the features of another key" in caplog.text


def test_what_several_processes_write_is_read_by_each(tmp_path):
  caches = [feature_cache.FeatureCache(tmp_path, KEY) for _ in range(2)]
  for part, cache in enumerate(caches):
    with cache.writing(part=part) as writer:
      writer.add([part, 7], records([part, 7]))
  for cache in caches:
    cache.refresh()
    assert len(cache) == 3
    _check(cache, [0, 1, 7])


def test_a_second_writer_is_refused_and_reads(tmp_path):
  cache = fill(tmp_path, [1])
  with cache.writing():
    other = feature_cache.FeatureCache(tmp_path, KEY)
    with pytest.raises(lock.LockedError, match="is writing the feature cache"), other.writing():
      pass
    _check(other, [1])
  with other.writing() as writer:
    writer.add([2], records([2]))


@pytest.mark.parametrize("at", [0, 3, 20, 300, -1])
def test_a_flipped_byte_is_named_and_its_records_are_written_again(tmp_path, caplog, at):
  fill(tmp_path, [1, 2], [3, 4], shard_bytes=200)
  damaged = shard_paths(tmp_path)[0]
  data = bytearray(damaged.read_bytes())
  data[at] ^= 16
  damaged.write_bytes(data)
  cache = feature_cache.FeatureCache(tmp_path, KEY)
  missing = cache.missing([1, 2, 3, 4]).tolist()
  assert missing in ([1, 2], [3, 4]) and str(damaged) in caplog.text
  _check(cache, [index for index in (1, 2, 3, 4) if index not in missing])
  with cache.writing() as writer:
    writer.add(missing, records(missing))
  _check(feature_cache.FeatureCache(tmp_path, KEY), [1, 2, 3, 4])


@pytest.mark.parametrize("size", [0, 7, 40, -1])
def test_a_truncated_shard_is_named(tmp_path, caplog, size):
  fill(tmp_path, [1, 2])
  (path,) = shard_paths(tmp_path)
  path.write_bytes(path.read_bytes()[:size])
  assert feature_cache.FeatureCache(tmp_path, KEY).missing([1, 2]).tolist() == [1, 2]
  assert str(path) in caplog.text


def test_records_of_another_layout_are_left_out(tmp_path, caplog):
  cache = fill(tmp_path, [1])
  with cache.writing() as writer:
    writer.add([2], {"features.0": np.zeros((1, 3), np.float32)})
  assert cache.missing([1, 2]).tolist() in ([1], [2]) and "other shapes" in caplog.text


def test_bytes_are_announced_and_a_disk_that_they_would_fill_is_refused(tmp_path, caplog, monkeypatch):
  cache = fill(tmp_path, [1])
  with caplog.at_level("INFO"):
    assert cache.announce(1000, 2500) == 2_500_000
  assert "1 records are there; 1,000 more of 2.5 kB each will take 2.5 MB" in caplog.text
  monkeypatch.setattr(feature_cache, "free_bytes", lambda folder: 2_600_000)
  with pytest.raises(feature_cache.CacheError, match="would take 2.5 MB more, and its disk has 2.6 MB free"):
    cache.announce(1000, 2500)


def test_a_disk_that_fills_while_writing_leaves_whole_shards_only(tmp_path, monkeypatch):
  cache = feature_cache.FeatureCache(tmp_path, KEY)
  real, calls = os.fsync, []

  def fsync(descriptor):
    calls.append(descriptor)
    if len(calls) == 4:  # those of lock and key come before
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real(descriptor)

  monkeypatch.setattr(os, "fsync", fsync)
  with pytest.raises(OSError, match="No space left"), cache.writing(shard_bytes=1) as writer:
    for index in range(5):
      writer.add([index], records([index]))
  monkeypatch.undo()
  assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("*.lock"))
  found = feature_cache.FeatureCache(tmp_path, KEY)
  assert 1 <= len(found) < 5
  _check(found, found.indices)


def test_a_folder_that_cannot_be_written_is_read_and_named(tmp_path, monkeypatch):
  cache = fill(tmp_path, [1])

  def refuse(path, flags, *arguments):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

  monkeypatch.setattr(os, "open", refuse)
  with pytest.raises(feature_cache.CacheError, match="Read-only file system.*config.cache.path"):
    with cache.writing():
      pass
  monkeypatch.undo()
  _check(feature_cache.FeatureCache(tmp_path, KEY), [1])


_WRITER = """
import sys
sys.path.insert(0, {root!r})
from frozen_vision.freezing import cache
from tests.freezing import test_cache as test
found = cache.FeatureCache(sys.argv[1], test.KEY)
with found.writing(shard_bytes=1 << 12) as writer:
  print("ready", flush=True)
  for index in found.missing(range(4000)).tolist():
    writer.add([index], test.records([index]))
    print(index, flush=True)
"""


def kill_and_continue(folder: pathlib.Path, kills: int, rng: random.Random) -> list[int]:
  """Kills writers at random moments and lets the last one finish; how many records each left."""
  root = pathlib.Path(__file__).resolve().parents[2]
  counts = []
  for number in range(kills + 1):
    command = [sys.executable, "-c", _WRITER.format(root=str(root)), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
      assert process.stdout.readline() == "ready\n"
      if number < kills:
        for _ in range(rng.randrange(2 * 4000 // (kills + 1))):
          process.stdout.readline()
        time.sleep(rng.random() * 0.01)
        process.send_signal(signal.SIGKILL)
      process.communicate()
    cache = feature_cache.FeatureCache(folder, KEY)
    assert not len(cache.missing(cache.indices))
    if len(cache):
      _check(cache, cache.indices)
    counts.append(len(cache))
  assert counts == sorted(counts) and counts[-1] == 4000
  assert not list(folder.rglob("*.partial"))
  return counts


def test_nothing_is_lost_or_wrong_when_writers_are_killed(tmp_path):
  counts = kill_and_continue(tmp_path, kills=3, rng=random.Random(0))
  assert counts[0] < 4000
