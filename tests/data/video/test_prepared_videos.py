"""Prepared videos: the frames of the files, in the same clips, and every odd file named."""

import contextlib
import io
import json
import pathlib
import pickle

import av
import numpy as np
import pytest

from frozen_vision.data import fingerprint, images, pipeline, prepare, prepared
from frozen_vision.data.detection import prepared_coco
from frozen_vision.data.video import clips, decoding, lists, prepared_videos
from tests import paths

_ABSENT = "absent.mp4"


def _run(*arguments):
  """(exit code, what was printed)."""
  text = io.StringIO()
  with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
    code = prepare.main(["videos", *map(str, arguments)])
  return code, text.getvalue()


@pytest.fixture(scope="module")
def real(tmp_path_factory):
  """All files of the manifest and one that is not there, prepared: (out, files, manifest, output)."""
  pytest.importorskip("tensorflow", reason="writing shards needs TensorFlow")
  folder = paths.data_dir("test_videos")
  manifest = {entry["file"]: entry for entry in json.loads((folder / "manifest.json").read_text())["files"]}
  root = tmp_path_factory.mktemp("real")
  lines = [f"{name},{i % 3},{entry.get('codec', '')}" for i, (name, entry) in enumerate(manifest.items())]
  (root / "list.csv").write_text("\n".join(["path,label,codec", f"{_ABSENT},1,none", *lines]))
  (root / "classes.json").write_text(json.dumps(["zebra", "ape", "bee", "nobody"]))
  code, text = _run(
    "--videos",
    root / "list.csv",
    "--root",
    folder / "files",
    "--group-column",
    "codec",
    "--split",
    "train",
    "--out",
    root / "out",
  )
  assert code == 0, text
  return root / "out", folder / "files", manifest, text


def test_every_odd_file_is_named_and_the_run_goes_on(real):
  out, folder, manifest, text = real
  good = [name for name, entry in manifest.items() if entry["decode"] == "ok"]
  named = {
    pathlib.Path(line.split(": ")[1]).name: line for line in text.splitlines() if line.startswith("bad: ")
  }
  assert set(named) == set(manifest) - set(good) | {_ABSENT} and len(named) == 5
  assert "no such file" in named[_ABSENT] and "the file is empty" in named["derived_empty.mp4"]
  assert "not a readable video" in named["derived_text.mp4"]
  assert f"damaged: {manifest['corrupted.mp4']['decoded_frames']} of 50 frames" in named["corrupted.mp4"]
  assert "videos: 18 checked, 13 usable, 5 bad" in text
  assert "bad: not a video 2, missing 1, damaged 1, empty 1" in text
  assert "h264 yuv420p 10" in text and "mpeg4 yuv420p 1" in text
  assert "usable: 13 videos, 4 classes" in text and "classes without a usable video: nobody" in text
  source = prepared_videos.PreparedVideos(out, "train")
  assert source.classes == ["zebra", "ape", "bee", "nobody"]
  assert source.paths == [str(folder / name) for name in good]
  order = list(manifest)
  assert source.labels.tolist() == [order.index(name) % 3 for name in good]
  assert source.groups == [manifest[name]["codec"] for name in good]
  frames = sum(manifest[name]["decoded_frames"] for name in good)
  assert f": {frames} frames, " in text and len(source._shards._examples) == source._starts[-1] + 3


def test_frames_and_times_are_those_of_the_files(real):
  out, _, manifest, _ = real
  source = prepared_videos.PreparedVideos(out, "train")
  sizes = set()
  for index in range(len(source)):
    kept = source[index]["video"]
    with decoding.Video(kept.name) as opened:
      entry = manifest[pathlib.Path(kept.name).name]
      assert len(kept) == len(opened) == entry["decoded_frames"]
      np.testing.assert_array_equal(kept.times, opened.times)
      assert kept.duration == opened.duration
      np.testing.assert_array_equal(kept.resampled(7), opened.resampled(7))
      numbers = sorted({0, min(70, len(opened) - 1)})
      reduced = min(entry["size"]) > 256
      direct = opened.read(numbers, short_side=256 if reduced else None)
      found = kept.read(numbers)
      assert found.shape == direct.shape and found.dtype == np.uint8
      # The error of a JPEG; colour has half the resolution in both.
      assert np.abs(found.astype(float) - direct).mean() < 4, kept.name
      assert np.abs(found.mean((1, 2)) - direct.mean((1, 2))).max() < 2, kept.name
      assert kept.read([0], short_side=40).shape == opened.read([0], short_side=40).shape
      sizes.add(found.shape[1:3])
  assert {(256, 455), (454, 256), (256, 454), (50, 50), (256, 256), (240, 426)} <= sizes


def _write_video(path, times, *, side=(48, 32), codec="mpeg4", rate=100):
  """Frame i is of brightness 5 * i; times in 1 / rate seconds."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=rate)
    stream.width, stream.height, stream.pix_fmt = *side, "yuv420p"
    stream.codec_context.gop_size = 12
    stream.codec_context.max_b_frames = 2
    stream.bit_rate = 2_000_000
    for i, time in enumerate(times):
      frame = av.VideoFrame.from_ndarray(np.full((*side[::-1], 3), 5 * i, np.uint8), format="rgb24")
      frame.pts = int(time)
      container.mux(stream.encode(frame))
    container.mux(stream.encode())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Class folders with a video of uneven times, one of even ones and none: (folder, out)."""
  pytest.importorskip("tensorflow", reason="writing shards needs TensorFlow")
  root = tmp_path_factory.mktemp("made")
  for name in ("uneven", "even"):
    (root / "videos" / name).mkdir(parents=True)
  _write_video(root / "videos/uneven/0.mp4", np.cumsum([0] + [3 if i % 10 else 12 for i in range(1, 48)]))
  _write_video(root / "videos/even/0.mp4", np.arange(20) * 4)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(prepared_videos, "FRAMES_PER_RECORD", 8)
    code, text = _run("--videos", root / "videos", "--out", root / "out", "--split", "validation")
  assert code == 0, text
  return root / "videos", root / "out"


@pytest.mark.parametrize(
  "options",
  [
    dict(stride=3),
    dict(stride=5),
    dict(kind="uniform"),
    dict(stride=2, rate=15.0),
    dict(kind="uniform", rate=40.0),
  ],
)
def test_clips_have_the_frames_that_they_have_from_the_files(made, options):
  folder, out = made
  sampler = clips.Sampler(frames=6, **options)
  direct, kept = lists.open_videos(folder), prepared_videos.PreparedVideos(out, "validation")
  assert kept.classes == direct.classes == ["even", "uneven"]
  assert kept.paths == direct.paths and kept.labels.tolist() == direct.labels.tolist()
  train = clips.TrainTransform(sampler, 16, short_side=20)
  test = clips.EvalTransform(sampler, 16, num_clips=3, num_crops=3)
  drawn = set()
  for index in range(2):
    cases = [(lambda record, seed=seed: train(record, np.random.default_rng(seed))) for seed in range(4)]
    for transform in [*cases, test]:
      wanted, found = transform(direct[index]), transform(kept[index])
      assert wanted["label"] == found["label"] and wanted["readable"] and found["readable"]
      assert wanted["clip"].shape == found["clip"].shape and wanted["clip"].dtype == found["clip"].dtype
      # Frames are plain, and neighbours differ by five levels.
      np.testing.assert_allclose(found["clip"].astype(int), wanted["clip"], atol=2)
      drawn.add(found["clip"].mean((-1, -2, -3)).round().astype(int).tobytes())
  assert len(drawn) > 4


def test_only_the_frames_of_a_clip_are_decoded(made, monkeypatch):
  kept = prepared_videos.PreparedVideos(made[1], "validation")[1]["video"]
  decoded, opened = [], []
  decode, get = images.decode_image, prepared.Shards.__getitem__

  def counting(data, name):
    decoded.append(int(name.split()[-1]))
    return decode(data, name=name)

  monkeypatch.setattr(images, "decode_image", counting)
  monkeypatch.setattr(
    prepared.Shards, "__getitem__", lambda self, position: opened.append(position) or get(self, position)
  )
  start = 1 + 3  # the first video has 20 frames, 8 in a record
  frames = kept.read([41, 3, 20, 20])
  assert decoded == [3, 20, 41] and opened == [start + 1, start + 3, start + 6]
  np.testing.assert_allclose(frames.mean((1, 2, 3)), [205, 15, 100, 100], atol=4)
  assert kept.times.shape == (48,) and kept.duration > 1 and opened[3:] == [start]
  for number in (48, -1):
    with pytest.raises(IndexError, match="has 48 frames, asked for"):
      kept.read([number])


def test_training_reads_it(made):
  source = pickle.loads(pickle.dumps(prepared_videos.PreparedVideos(made[1], "validation")))
  again = prepared_videos.PreparedVideos(made[1], "validation")
  assert fingerprint.of_source(source) == fingerprint.of_source(again)
  transform = clips.TrainTransform(clips.Sampler(2, 2), 16, short_side=20)
  with pipeline.train_batches(source, transform, batch_size=4, seed=0) as batches:
    batch = next(batches)
  assert batch["clip"].shape == (4, 2, 16, 16, 3) and batch["readable"].all()
  assert sorted(batch["label"].tolist()) == [0, 0, 1, 1]


def test_keeping_fewer_frames_by_time(made, tmp_path):
  folder, _ = made
  code, text = _run(
    "--videos", folder, "--out", tmp_path, "--split", "train", "--rate", 10, "--short-side", 16
  )
  assert code == 0, text
  source = prepared_videos.PreparedVideos(tmp_path, "train")
  for index, path in enumerate(source.paths):
    kept = source[index]["video"]
    with decoding.Video(path) as opened:
      assert len(kept) < len(opened) / 2 and kept.duration == opened.duration
      for rate in (10, 5):
        wanted = opened.read(opened.resampled(rate), short_side=16)
        np.testing.assert_allclose(kept.read(kept.resampled(rate)).astype(int), wanted, atol=2)
        source.require(rate=rate, short_side=16)
  for rate in (0, 7, 20):
    with pytest.raises(ValueError, match=f"keeps 10 frames per second; {rate} "):
      source.require(rate=rate, short_side=16)


def test_frames_that_would_be_enlarged_are_a_warning(made, caplog):
  source = prepared_videos.PreparedVideos(made[1], "validation")
  source.require(rate=3.5, short_side=256)
  assert not caplog.records
  source.require(rate=0, short_side=292)
  assert "prepare with --short-side 292" in caplog.text


def test_preparing_twice_asks_first_and_interrupted_data_are_refused(made, tmp_path):
  folder, _ = made
  command = ["--videos", folder, "--out", tmp_path, "--split", "train", "--short-side", "16"]
  target = prepared_videos.KIND.folder(tmp_path, "train")
  with pytest.raises(FileNotFoundError, match="is absent; prepare it with.* videos --videos .*--split train"):
    prepared_videos.PreparedVideos(tmp_path, "train")
  assert _run(*command)[0] == 0
  assert sorted(path.name for path in target.parent.iterdir()) == ["1.0.0"]  # no frames are left beside it
  code, text = _run(*command)
  assert code == 1 and "--overwrite" in text
  (target / "index.npz").unlink()
  (target.parent / "spool_of_a_killed_run").mkdir()
  with pytest.raises(FileNotFoundError, match="is incomplete; prepare it with"):
    prepared_videos.open_split(target)
  assert _run(*command)[0] == 0 and len(prepared_videos.open_split(target.parent)) == 2
  assert sorted(path.name for path in target.parent.iterdir()) == ["1.0.0"]
  with pytest.raises(ValueError, match="holds the prepared splits frozen_vision_videos/train; give"):
    prepared_videos.open_split(tmp_path)
  with pytest.raises(FileNotFoundError, match=r"coco --images .*\(prepared in .*_videos/train\)"):
    prepared_coco.PreparedCoco(tmp_path, "train")
  other = prepared_coco.KIND.folder(tmp_path, "train")
  other.mkdir(parents=True)
  with pytest.raises(ValueError, match="is prepared as frozen_vision_coco; expected frozen_vision_videos"):
    prepared_videos.open_split(other)
  plain = tmp_path / "frozen_vision_files" / "all"
  plain.mkdir(parents=True)
  for path in (folder, plain, tmp_path / "list.csv"):
    assert prepared_videos.open_split(path) is None


def test_checking_strictness_and_nothing_usable(made, tmp_path):
  folder, _ = made
  (tmp_path / "bad").mkdir()
  (tmp_path / "bad" / "0.mp4").write_bytes(b"no video")
  out = tmp_path / "out"
  code, text = _run("--videos", folder, "--split", "train", "--check")
  assert code == 0 and "2 checked, 2 usable, 0 bad" in text and "written" not in text
  (tmp_path / "list.txt").write_text(f"{folder}/even/0.mp4 0\n{tmp_path}/bad/0.mp4 1\n")
  listed = ("--videos", tmp_path / "list.txt", "--allow-outside")
  code, text = _run(*listed, "--split", "train", "--out", out, "--strict")
  assert code == 1 and "1 defects, and --strict allows none" in text and "bad/0.mp4: not a" in text
  assert not out.exists()
  (tmp_path / "list.txt").write_text(f"{tmp_path}/bad/0.mp4 1\n")
  code, text = _run(*listed, "--split", "train", "--out", out)
  assert code == 1 and "error: nothing usable is left" in text and "1 checked, 0 usable, 1 bad" in text
  assert not list(out.rglob("*.*record*")) and not list(out.rglob("spool*"))
  for options, message in (
    (["--quality", 101], "quality=101"),
    (["--videos", tmp_path / "none"], "does not exist"),
    (["--group-column", "scene"], "no column 'scene'"),
  ):
    code, text = _run(*listed, "--split", "train", "--check", *options)
    assert code == 1 and message in text


def test_a_file_that_ends_early_is_noted(made, monkeypatch):
  listing = decoding.Video._list

  def promise_more(self):
    listing(self)
    self.times = np.append(self.times, self.times[-1] + [1, 2, 3])

  monkeypatch.setattr(decoding.Video, "_list", promise_more)
  code, text = _run("--videos", made[0], "--split", "train", "--check")
  assert code == 0 and "even/0.mp4: ends early: its last frame stands for 3 more of 23" in text


def test_data_larger_than_memory_are_written_part_by_part_in_order(made, tmp_path, monkeypatch):
  """TFDS sorts what is larger than its buffer in parts, each of them in memory."""
  from tensorflow_datasets.core import shuffle  # after the skip of a machine without TensorFlow

  monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1000)
  monkeypatch.setattr(prepared_videos, "FRAMES_PER_RECORD", 8)
  sizes, read = [], shuffle._Bucket.read_values

  def counting(bucket):
    values = list(read(bucket))
    sizes.append(len(values))
    return values

  monkeypatch.setattr(shuffle._Bucket, "read_values", counting)
  code, text = _run("--videos", made[0], "--out", tmp_path, "--split", "validation")
  assert code == 0, text
  assert max(sizes) == 1 and sum(sizes) == (1 + 3) + (1 + 6)
  stored, wanted = (prepared_videos.PreparedVideos(out, "validation")._shards for out in (tmp_path, made[1]))
  for position in range(sum(sizes)):
    assert stored[position]["first_frame"] == wanted[position]["first_frame"]
    assert list(stored[position]["frames"]) == list(wanted[position]["frames"])


@pytest.mark.slow
def test_workers_write_the_same(made, tmp_path):
  folder, _ = made
  stored = []
  for workers in (1, 2):
    out = tmp_path / str(workers)
    code, text = _run(
      "--videos", folder, "--out", out, "--split", "train", "--workers", workers, "--short-side", 16
    )
    assert code == 0, text
    source = prepared_videos.PreparedVideos(out, "train")
    stored.append([source[i]["video"].read(range(20)) for i in range(len(source))])
  np.testing.assert_array_equal(*stored)
