"""Preparing data on Apache Beam writes the records that preparing without it does."""

import importlib.util
import pathlib

import pytest

from frozen_vision.data import beam, prepare
from frozen_vision.data.detection import prepared_coco
from frozen_vision.data.video import prepared_videos
from tests import samples

# Beam's direct runner with processes of its own, to which everything is pickled.
_OPTIONS = "--beam_options=runner=DirectRunner,direct_num_workers=2,direct_running_mode=multi_processing"


def test_options_are_read_and_what_is_missing_is_named(monkeypatch, capsys, tmp_path):
  present = importlib.util.find_spec("json")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: present)
  assert beam.parse("", None) is None
  found = beam.parse("runner=DirectRunner, streaming,--job_name=a b", tmp_path)
  assert found == beam.Beam(("--runner=DirectRunner", "--streaming", "--job_name=a b"), str(tmp_path))
  for wrong in ("=3", "runner=A,,b=1", "run ner=A", "-"):
    with pytest.raises(ValueError, match="with commas between them, such as runner=DirectRunner"):
      beam.parse(wrong, None)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert prepare.main(["images", "--images", str(tmp_path), "--beam_options=runner=DirectRunner"]) == 1
  assert "pip install apache-beam" in capsys.readouterr().err


def test_keys_put_each_example_into_the_shard_where_it_is_without_beam():
  pytest.importorskip("tensorflow", reason="writing shards needs TensorFlow")
  from tensorflow_datasets.core import shuffle
  from tensorflow_datasets.core.utils import shard_utils

  from frozen_vision.data import prepared_builder

  for examples, shards in ((1, 1), (7, 1), (7, 7), (10, 3), (1000, 64), (5000, 1024)):
    keys = prepared_builder._keys(examples, shards)
    assert keys == sorted(set(keys))
    found = [shuffle.get_bucket_number(key, shards, max(keys)) for key in keys]
    bounds = [0, *shard_utils.get_shard_boundaries(examples, shards)]
    assert found == [shard for shard in range(shards) for _ in range(bounds[shard + 1] - bounds[shard])]


def _records(folder: pathlib.Path) -> dict[str, list[bytes]]:
  """The records of each shard, as bytes, by the name of its file."""
  from array_record.python import array_record_module

  found = {}
  for path in sorted(folder.glob("*array_record*")):
    reader = array_record_module.ArrayRecordReader(str(path))
    found[path.name] = reader.read_all()
    reader.close()
  return found


def _prepare(monkeypatch, kind, out: pathlib.Path, arguments: list[str], split: str) -> None:
  """Prepares with and without Beam, and compares the records and the other files."""
  if importlib.util.find_spec("apache_beam") is None:
    pytest.skip("needs Apache Beam")
  pytest.importorskip("tensorflow", reason="writing shards needs TensorFlow")
  from tensorflow_datasets.core.utils import shard_utils

  monkeypatch.setattr(shard_utils.ShardConfig, "min_shard_size", 9000)  # so that there are some
  folders = []
  for name, more in (("plain", []), ("beam", [_OPTIONS])):
    assert prepare.main([*arguments, "--split", split, "--out", str(out / name), *more]) == 0
    folders.append(kind.folder(out / name, split))
    assert not list((out / name).glob(".beam_*")) and not list(folders[-1].parent.glob("spool_*"))
  plain, parallel = map(_records, folders)
  assert len(plain) > 1 and parallel == plain
  names = {path.name for path in folders[0].iterdir()}
  assert names == {path.name for path in folders[1].iterdir()}
  for name in names - set(plain) - {"dataset_info.json", "index.npz"}:
    assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


@pytest.mark.slow
def test_photographs(monkeypatch, tmp_path):
  root = samples.coco_root(tmp_path / "coco")
  bad = next(iter(sorted((root / "train2017").iterdir())))
  bad.write_bytes(bad.read_bytes()[:200])
  _prepare(monkeypatch, prepared_coco.KIND, tmp_path, ["coco", "--root", str(root)], "train")
  plain, parallel = (prepared_coco.PreparedCoco(tmp_path / name, "train") for name in ("plain", "beam"))
  assert plain.image_ids.tolist() == parallel.image_ids.tolist() and len(plain) > 5


@pytest.mark.slow
def test_videos(monkeypatch, tmp_path):
  monkeypatch.setattr(prepared_videos, "FRAMES_PER_RECORD", 3)
  root = samples.video_root(tmp_path / "videos")
  arguments = ["videos", "--videos", str(root / "train.csv"), "--root", str(root / "train")]
  _prepare(monkeypatch, prepared_videos.KIND, tmp_path, arguments, "train")
  plain, parallel = (prepared_videos.PreparedVideos(tmp_path / name, "train") for name in ("plain", "beam"))
  assert plain.paths == parallel.paths and len(plain) > 1
