"""Which frames make a clip, augmentation that all frames share, test views, and files that cannot be read."""

import av
import numpy as np
import pytest

from frozen_vision.data import pipeline
from frozen_vision.data.classification import augment
from frozen_vision.data.video import clips, lists


def _numbered(frames=40, height=8, width=12):
  """A record whose frame i holds i everywhere."""
  pixels = np.broadcast_to(np.arange(frames, dtype=np.uint8)[:, None, None, None], (frames, height, width, 3))
  return {"frames": pixels, "label": np.int32(1), "name": "numbers"}


def test_dense_clips_start_anywhere_that_they_fit():
  sampler = clips.Sampler(frames=4, stride=3)
  rng = np.random.default_rng(0)
  starts = set()
  for _ in range(400):
    indices = sampler.train(20, rng)
    np.testing.assert_array_equal(np.diff(indices), 3)
    starts.add(int(indices[0]))
  assert starts == set(range(9))  # 20 - 4 * 3 + 1, as the released code


def test_short_videos_start_again():
  sampler = clips.Sampler(frames=8, stride=2)
  for indices in (sampler.train(5, np.random.default_rng(0)), sampler.test(5, 2)[1]):
    np.testing.assert_array_equal(indices, [0, 2, 4, 1, 3, 0, 2, 4])
  np.testing.assert_array_equal(sampler.train(1, np.random.default_rng(0)), np.zeros(8))


def test_test_clips_are_where_the_released_code_has_them():
  sampler = clips.Sampler(frames=32, stride=2)
  # int(i * avg + avg / 2), avg = (300 - 64 + 1) / 4.
  np.testing.assert_array_equal(sampler.test(300, 4)[:, 0], [29, 88, 148, 207])
  assert sampler.test(300, 4).shape == (4, 32)


def test_uniform_sampling_takes_one_frame_of_every_segment():
  sampler = clips.Sampler(frames=5, kind="uniform")
  rng = np.random.default_rng(0)
  drawn = np.stack([sampler.train(21, rng) for _ in range(400)])
  bounds = np.array([0, 4, 8, 12, 16, 20])
  assert (drawn.min(0) == bounds[:-1]).all() and (drawn.max(0) == bounds[1:]).all()
  np.testing.assert_array_equal(sampler.test(21, 2), [[2, 6, 10, 14, 18]] * 2)
  np.testing.assert_array_equal(sampler.test(1, 1), [[0] * 5])
  np.testing.assert_array_equal(sampler.train(1, rng), [0] * 5)


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(frames=4, kind="sparse"), "'sparse'; known: dense, uniform"),
    (dict(frames=0), "expected at least 1"),
  ],
)
def test_sampling_options(options, message):
  with pytest.raises(ValueError, match=message):
    clips.Sampler(**options)


def test_every_frame_is_augmented_alike():
  still = np.random.default_rng(1).integers(0, 255, (1, 24, 32, 3), dtype=np.uint8)
  record = {"frames": np.repeat(still, 12, axis=0), "label": np.int32(3), "name": "still"}
  transform = clips.TrainTransform(
    clips.Sampler(6, 2), 16, rand_augment=augment.RandAugment(probability=1.0), erasing=1.0
  )
  results = []
  for seed in range(6):
    example = transform(record, np.random.default_rng(seed))
    assert example["clip"].shape == (6, 16, 16, 3) and example["clip"].dtype == np.uint8
    assert example["label"] == 3 and example["readable"]
    for frame in example["clip"][1:]:
      np.testing.assert_array_equal(frame, example["clip"][0])
    np.testing.assert_array_equal(transform(record, np.random.default_rng(seed))["clip"], example["clip"])
    results.append(example["clip"][0].tobytes())
  assert len(set(results)) == 6


def test_flips_mirror_whole_clips():
  ramp = np.broadcast_to(np.arange(16, dtype=np.uint8)[None, None, :, None] * 10, (4, 16, 16, 3))
  record = {"frames": ramp, "label": 0, "name": "ramp"}
  for flip, wanted in ((0.0, ramp), (1.0, ramp[:, :, ::-1])):
    transform = clips.TrainTransform(clips.Sampler(4, 1), 16, crop_scale=(), flip=flip)
    np.testing.assert_array_equal(transform(record, np.random.default_rng(0))["clip"], wanted)


def test_views_are_clips_times_crops():
  transform = clips.EvalTransform(clips.Sampler(4, 2), 8, num_clips=3, num_crops=1)
  clip = transform(_numbered())["clip"]
  assert clip.shape == (3, 4, 8, 8, 3)
  np.testing.assert_array_equal(clip[..., 0, 0, 0], clips.Sampler(4, 2).test(40, 3))
  columns = np.broadcast_to(np.arange(12, dtype=np.uint8)[None, None, :, None], (4, 8, 12, 3))
  transform = clips.EvalTransform(clips.Sampler(2, 1), 8, num_clips=2, num_crops=3)
  clip = transform({"frames": columns, "label": 0, "name": ""})["clip"]
  assert clip.shape == (6, 2, 8, 8, 3)
  assert clip[:, 0, 0, 0, 0].tolist() == [0, 4, 2] * 2  # left, right, centre of each clip
  rows = columns.swapaxes(1, 2)
  assert clips.crops(rows, 8, 3)[:, 0, 0, 0, 0].tolist() == [0, 4, 2]
  assert clips.crops(rows, 4, 1).shape == (1, 4, 4, 4, 3)
  with pytest.raises(ValueError, match="2 crops"):
    clips.EvalTransform(clips.Sampler(2), 8, num_crops=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Two videos of 30 and 15 frames a second that show the same second, and one that is none."""
  root = tmp_path_factory.mktemp("videos")
  for name, rate in (("slow", 15), ("fast", 30)):
    (root / name).mkdir()
    with av.open(str(root / name / "0.mp4"), "w") as container:
      stream = container.add_stream("mpeg4", rate=rate)
      stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
      stream.bit_rate = 2_000_000
      for i in range(2 * rate):
        value = 100 * i // rate
        container.mux(
          stream.encode(av.VideoFrame.from_ndarray(np.full((32, 48, 3), value, np.uint8), format="rgb24"))
        )
      container.mux(stream.encode())
  (root / "slow" / "broken.mp4").write_bytes(b"not a video")
  return root


def test_resampling_by_time_makes_strides_equal(folder):
  source = lists.open_videos(folder)
  transform = clips.EvalTransform(clips.Sampler(4, stride=2, rate=10), 32)
  brightness = {
    record["path"].split("/")[-2]: transform(record)["clip"].mean((0, 2, 3, 4))
    for record in (source[i] for i in range(len(source)))
    if "broken" not in record["path"]
  }
  # 0.2 s apart, in both.
  for values in brightness.values():
    np.testing.assert_allclose(np.diff(values), 20, atol=5)
  plain = clips.EvalTransform(clips.Sampler(4, stride=2), 32)
  steps = {
    name: np.diff(plain(source[index])["clip"].mean((0, 2, 3, 4))).mean()
    for index, name in ((0, "fast"), (1, "slow"))
  }
  assert steps["slow"] == pytest.approx(2 * steps["fast"], rel=0.2)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_broken_file_is_named_and_the_run_goes_on(folder, caplog, workers):
  source = lists.open_videos(folder)
  clips._warn.cache_clear()
  transform = clips.TrainTransform(clips.Sampler(2, 2), 16, short_side=20)
  with pipeline.train_batches(source, transform, batch_size=3, seed=0, num_workers=workers) as batches:
    batch = next(batches)
  assert batch["clip"].shape == (3, 2, 16, 16, 3) and int(batch["readable"].sum()) == 2
  assert (batch["clip"][~batch["readable"]] == 0).all() and batch["clip"].max() > 0
  if not workers:
    assert "slow/broken.mp4: not a readable video" in caplog.text and "left out" in caplog.text
  example = clips.EvalTransform(clips.Sampler(2), 16, 2, 3)(source[2])
  assert example["clip"].shape == (6, 2, 16, 16, 3) and not example["readable"]
