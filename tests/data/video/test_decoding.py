"""Decoding against the manifest of unusual files; seeking; files made here."""

import json
import pickle

import av
import numpy as np
import pytest

from frozen_vision.data.video import decoding
from tests import paths

_FILES = (
  "mmaction_demo.mp4",
  "mmaction_test.avi",
  "mmaction_test.mp4",
  "mmaction_part0.mp4",
  "cockatoo.mp4",
  "realshort.mp4",
  "flipping_a_pancake.mkv",
  "unordered.mov",
  "rotated_0.mov",
  "rotated_90.mov",
  "rotated_180.mov",
  "rotated_270.mov",
  "water_bottle_drumming.mp4",
)


def _manifest():
  folder = paths.data_dir("test_videos")
  entries = json.loads((folder / "manifest.json").read_text())["files"]
  return folder / "files", {entry["file"]: entry for entry in entries}


@pytest.mark.parametrize("name", _FILES)
def test_good_files_give_the_frames_of_their_manifest(name):
  folder, manifest = _manifest()
  entry = manifest[name]
  assert entry["decode"] == "ok"
  with decoding.Video(folder / name) as opened:
    assert len(opened) == entry["decoded_frames"]
    # The manifest counts from one: the first frame and the tenth.
    numbers = [0, 9][: len(entry["rgb_mean_frames_1_10"])]
    frames = opened.read(numbers)
    assert (np.diff(opened.times) > 0).all() and opened.times[0] == 0
    np.testing.assert_allclose(frames.mean((1, 2)), entry["rgb_mean_frames_1_10"], atol=0.02)
    width, height = entry["size"]
    turned = entry["rotation"] in (90, -90)
    assert frames.shape[1:3] == ((width, height) if turned else (height, width))
    if entry["declared_frames"] and name != "mmaction_test.avi":
      rate = 1 / np.median(np.diff(opened.times))
      numerator, _, denominator = entry["avg_rate"].partition("/")
      assert rate == pytest.approx(int(numerator) / int(denominator or 1), rel=0.02)


def test_every_file_of_the_manifest_is_covered():
  _, manifest = _manifest()
  assert set(manifest) == set(_FILES) | {
    "corrupted.mp4",
    "derived_truncated.mp4",
    "derived_empty.mp4",
    "derived_text.mp4",
  }


@pytest.mark.parametrize(
  "name, kind",
  [
    ("derived_truncated.mp4", "not a video"),
    ("derived_empty.mp4", "empty"),
    ("derived_text.mp4", "not a video"),
    ("absent.mp4", "missing"),
  ],
)
def test_unusable_files_are_named(name, kind):
  folder, manifest = _manifest()
  assert name == "absent.mp4" or manifest[name]["decode"] != "ok"
  with pytest.raises(decoding.VideoError, match=name) as caught:
    decoding.Video(folder / name)
  assert caught.value.kind == kind and caught.value.name == str(folder / name)
  again = pickle.loads(pickle.dumps(caught.value))
  assert (str(again), again.kind) == (str(caught.value), kind)


def test_frames_before_the_damage_are_read_and_later_ones_are_an_error():
  folder, manifest = _manifest()
  entry = manifest["corrupted.mp4"]
  good = entry["decoded_frames"]
  with decoding.Video(folder / "corrupted.mp4") as opened:
    assert len(opened) == entry["declared_frames"]
    np.testing.assert_allclose(opened.read([0, 9]).mean((1, 2)), entry["rgb_mean_frames_1_10"], atol=0.02)
    opened.read([good - 1])
    message = rf"corrupted.mp4: damaged: {good} of 50 frames.*frame {good} was"
    with pytest.raises(decoding.VideoError, match=message):
      opened.read([3, good])
    opened.read([5])  # the object is not lost


def test_rotation_turns_the_picture_upright():
  """The rotated files show what an unrotated decoder shows, turned as their metadata says."""
  folder, _ = _manifest()
  for degrees, quarters in ((0, 0), (90, 3), (180, 2), (270, 1)):
    name = f"rotated_{degrees}.mov"
    with av.open(str(folder / name)) as container:
      plain = next(container.decode(video=0)).to_ndarray(format="rgb24")
    with decoding.Video(folder / name) as opened:
      np.testing.assert_array_equal(opened.read([0])[0], np.rot90(plain, quarters))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A file with B-frames, several key frames and uneven times: frame i is of brightness 5 * i."""
  path = tmp_path_factory.mktemp("video") / "uneven.mp4"
  times = np.cumsum([0] + [3 if i % 10 else 12 for i in range(1, 48)])  # in 1/100 s
  with av.open(str(path), "w") as container:
    stream = container.add_stream("mpeg4", rate=100)
    stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
    stream.codec_context.gop_size = 12
    stream.codec_context.max_b_frames = 2
    stream.bit_rate = 2_000_000
    for i, time in enumerate(times):
      frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 5 * i, np.uint8), format="rgb24")
      frame.pts = int(time)
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path, times / 100


def test_uneven_times_and_exact_frames(made):
  path, times = made
  with decoding.Video(path) as opened:
    assert len(opened) == 48
    np.testing.assert_allclose(opened.times, times, atol=2e-3)
    whole = opened.read(range(48))
    brightness = whole.mean((1, 2, 3))
    np.testing.assert_allclose(brightness, 5.0 * np.arange(48), atol=4)
    # The frame that is shown at a time is the last one that began by then.
    for time in (0.0, 0.01, 0.5, 1.0, 1.7, 100.0, -1.0):
      wanted = max([i for i, start in enumerate(opened.times) if start <= time + 1e-9], default=0)
      assert opened.frames_at([time])[0] == wanted
    np.testing.assert_array_equal(opened.frames_at(opened.times), np.arange(48))


def test_any_order_repeated_and_by_seeking_is_what_reading_in_order_gives(made, monkeypatch):
  path, _ = made
  with decoding.Video(path) as opened:
    whole = opened.read(range(48))
    assert sum(packet.is_keyframe for packet in opened._packets) >= 3
    np.testing.assert_array_equal(opened.read([20, 3, 20, 41]), whole[[20, 3, 20, 41]])

    def refuse(*_):
      raise AssertionError("read in order")

    with monkeypatch.context() as patch:
      patch.setattr(decoding.Video, "_read_in_order", refuse)
      for number in (30, 37, 47):
        np.testing.assert_array_equal(opened.read([number, 47]), whole[[number, 47]])
    with pytest.raises(IndexError, match="has 48 frames, asked for .48."):
      opened.read([48])
    with pytest.raises(IndexError):
      opened.read([-1])


def test_a_seek_that_lands_elsewhere_is_undone(made, monkeypatch):
  path, _ = made
  with decoding.Video(path) as opened:
    whole = opened.read(range(48))
    opened._packets = [
      decoding._Packet(packet.pts + (1 if i > 30 else 0), packet.is_keyframe)
      for i, packet in enumerate(opened._packets)
    ]
    np.testing.assert_array_equal(opened.read([40, 45]), whole[[40, 45]])


@pytest.mark.parametrize("name", ["mmaction_demo.mp4", "flipping_a_pancake.mkv", "cockatoo.mp4"])
def test_seeking_in_real_files(name):
  folder, _ = _manifest()
  with decoding.Video(folder / name) as opened:
    number = max(i for i, packet in enumerate(opened._packets) if packet.is_keyframe) + 2
    assert opened._key_frame(number) == number - 2 > 12
    wanted = opened._read_in_order([number], 64)[number]
    np.testing.assert_array_equal(opened.read([number], short_side=64)[0], wanted)
    found = opened._read_by_stamp([number], number - 2, 64)
    # Its key frames after the first need frames from before them.
    assert (found is None) == (name == "cockatoo.mp4")


@pytest.mark.parametrize("short_side", [16, 40])
def test_resizing(made, short_side):
  with decoding.Video(made[0]) as opened:
    assert opened.read([4], short_side=short_side).shape == (1, short_side, round(48 * short_side / 32), 3)
    assert abs(opened.read([4], short_side=short_side).mean() - 20) < 4


def test_frames_one_after_the_other(made):
  with decoding.Video(made[0]) as opened:
    whole = opened.read(range(48), short_side=16)
    numbers = [0, 3, 4, 40, 47]
    for frame, number in zip(opened.stream(numbers, short_side=16), numbers, strict=True):
      np.testing.assert_array_equal(frame, whole[number])
    assert next(opened.stream([5], short_side=64)).shape == (32, 48, 3)  # never enlarged
    with pytest.raises(IndexError):
      opened.stream([48], short_side=16)


def test_frames_that_change_their_size_are_an_error(tmp_path):
  path = tmp_path / "two.ts"
  with open(path, "wb") as joined:
    for width, height in ((48, 32), (64, 48)):
      part = tmp_path / "part.ts"
      with av.open(str(part), "w") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for _ in range(5):
          pixels = np.full((height, width, 3), 90, np.uint8)
          container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
      joined.write(part.read_bytes())
  with decoding.Video(path) as opened:
    assert opened.read([0, 1]).shape == (2, 32, 48, 3)
    with pytest.raises(
      decoding.VideoError, match="two.ts: its frames change from 48 x 32 to 64 x 48"
    ) as caught:
      opened.read([0, len(opened) - 1])
  assert caught.value.kind == "changing size"


def test_resampling_by_time_takes_the_frame_that_is_shown(made):
  with decoding.Video(made[0]) as opened:
    numbers = opened.resampled(10)
    assert len(numbers) == int(opened.duration * 10 + 1e-6)
    np.testing.assert_array_equal(numbers, opened.frames_at(np.arange(len(numbers)) / 10))
    assert len(opened.resampled(0.01)) == 1
