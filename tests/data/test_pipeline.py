"""Order, restart, workers and clean ends of `data/pipeline.py`."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from frozen_vision.data import pipeline

_ROOT = pathlib.Path(__file__).resolve().parents[2]


class Numbers:
  """The record at i is i."""

  def __init__(self, length=23):
    self._length = length

  def __len__(self):
    return self._length

  def __getitem__(self, index):
    return index


class Unreadable(Numbers):
  def __getitem__(self, index):
    raise OSError("the disk is gone")


def augmented(record, rng):
  return {"record": np.int64(record), "noise": rng.random(3), "large": np.full((64, 64), record)}


def with_process(record, rng):
  import jax  # pylint: disable=g-import-not-at-top

  platforms = os.environ.get("JAX_PLATFORMS") == "cpu" and jax.config.jax_platforms == "cpu"
  return {**augmented(record, rng), "pid": np.int64(os.getpid()), "cpu": np.bool_(platforms)}


def slow_to_register(record, rng):
  """Widens the time between the creation of a segment and the resource tracker's knowing of it."""
  from multiprocessing import resource_tracker, shared_memory  # pylint: disable=g-import-not-at-top

  if shared_memory.resource_tracker is resource_tracker:
    register = resource_tracker.register

    class Slow:
      unregister = resource_tracker.unregister

      @staticmethod
      def register(*arguments):
        time.sleep(0.3)
        register(*arguments)

    shared_memory.resource_tracker = Slow
  return with_process(record, rng)


def plain(record):
  return {"record": np.int64(record)}


def failing(record, rng):
  if record == 7:
    raise ValueError("seven is broken")
  return augmented(record, rng)


def take(count, **options):
  options = {"batch_size": 6, "seed": 5} | options
  source = options.pop("source", Numbers())
  with pipeline.train_batches(source, options.pop("transform", augmented), **options) as batches:
    return [next(batches) for _ in range(count)]


def assert_same(one, other, names=("index", "record", "noise", "large")):
  assert len(one) == len(other)
  for a, b in zip(one, other):
    for name in names:
      np.testing.assert_array_equal(a[name], b[name])


def column(batches, name):
  return np.concatenate([batch[name] for batch in batches])


def running(pid):
  """Whether a process exists and is no zombie."""
  try:
    return "\nState:\tZ" not in pathlib.Path(f"/proc/{pid}/status").read_text()
  except FileNotFoundError:
    return False


def ended(pids, seconds=15.0):
  deadline = time.monotonic() + seconds
  while any(running(pid) for pid in pids) and time.monotonic() < deadline:
    time.sleep(0.1)
  return not any(running(pid) for pid in pids)


def test_each_pass_is_a_new_permutation():
  batches = take(12)
  records = column(batches, "record")
  for start in (0, 23, 46):
    assert sorted(records[start : start + 23]) == list(range(23))
  assert not np.array_equal(records[:23], records[23:46])
  assert batches[0]["index"].dtype == np.int64
  np.testing.assert_array_equal(column(batches, "index"), np.arange(72))
  noise = column(batches, "noise")
  assert len(np.unique(noise[:, 0])) == len(noise), "augmentation repeats between passes"


def test_seed_decides_order_and_augmentation():
  assert_same(take(3), take(3))
  other = take(3, seed=6)
  assert not np.array_equal(column(take(3), "record"), column(other, "record"))
  assert not np.array_equal(column(take(3), "noise"), column(other, "noise"))


def test_views_are_fixed_and_passes_take_them_in_turn():
  batches = take(20, views=2)  # five passes of 23 and a bit
  records, noise, indices = (column(batches, name) for name in ("record", "noise", "index"))
  order = pipeline.Order(23, 5, 2)
  slots = order.slots(indices)
  np.testing.assert_array_equal(slots % 23, records)
  np.testing.assert_array_equal(slots // 23, indices // 23 % 2)
  seen = {}
  for slot, values in zip(slots.tolist(), noise):
    np.testing.assert_array_equal(seen.setdefault(slot, values), values)
  assert len(seen) == len({values.tobytes() for values in seen.values()}) == 46
  # More views begin with the same ones, the order is that of a run without, and restarts change nothing.
  np.testing.assert_array_equal(column(take(7, views=3), "noise"), noise[:42])
  np.testing.assert_array_equal(records, column(take(20), "record"))
  assert_same(take(3, views=2, start_example=18), batches[3:6])


@pytest.mark.parametrize("consumed", [1, 3, 4, 9])
def test_restart_at_any_batch(consumed):
  with pipeline.train_batches(Numbers(), augmented, batch_size=6, seed=5) as batches:
    for _ in range(consumed):
      next(batches)
    position = batches.position
  assert position == 6 * consumed
  assert_same(take(3, start_example=position), take(consumed + 3)[consumed:])


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_each_batch(count):
  whole = take(5)
  shares = [take(5, process_index=i, process_count=count) for i in range(count)]
  for step, batch in enumerate(whole):
    for name in batch:
      joined = np.concatenate([share[step][name] for share in shares])
      np.testing.assert_array_equal(joined, batch[name])
  # A restart on another number of processes sees the same examples.
  assert_same(take(2, start_example=18), whole[3:])


def test_workers_change_nothing_and_end():
  batches = take(5, transform=with_process, num_workers=2, start_example=12)
  assert_same(batches, take(7)[2:])
  pids = set(column(batches, "pid").tolist())
  assert len(pids) == 2 and os.getpid() not in pids
  assert column(batches, "cpu").all(), "a worker could touch an accelerator"
  for value in batches[0].values():
    assert type(value) is np.ndarray and value.flags.owndata
  assert ended(pids)


class Lists:
  """Lists of 0 to 4 numbers that are not zero, in 5 rows; a row between valid ones may be invalid."""

  def __call__(self, record, rng):
    valid = np.arange(5) < record % 5
    valid[1:2] &= record % 3 > 0
    rows = np.where(valid[:, None], rng.random((5, 3)), 0.0)
    return augmented(record, rng) | {"valid": valid, "rows": rows}


def test_batches_without_copies_of_padding_are_the_same():
  lists = Lists()
  lists.padded_keys = ("rows", "not there")
  names = ("index", "record", "noise", "large", "valid", "rows")
  assert_same(take(5, transform=lists), take(5, transform=Lists()), names)
  assert_same(take(2, transform=lists, num_threads=2), take(2, transform=Lists()), names)


def test_error_of_a_worker_reaches_the_caller():
  reference = take(6)
  first_bad = next(i for i, batch in enumerate(reference) if 7 in batch["record"])
  seen = []
  with pytest.raises(ValueError, match="seven is broken") as caught:
    with pipeline.train_batches(Numbers(), failing, batch_size=6, seed=5, num_workers=1) as batches:
      while True:
        seen.append(next(batches))
  assert any("global index" in note for note in caught.value.__notes__)
  assert_same(seen, reference[:first_bad])


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("transform", ["with_process", "slow_to_register"])
def test_workers_end_when_the_parent_is_killed(transform):
  program = f"""
import time
from frozen_vision.data import pipeline
from tests.data import test_pipeline as t
if __name__ == "__main__":
  batches = pipeline.train_batches(
      t.Numbers(), t.{transform}, batch_size=6, seed=5, num_workers=1, prefetch_batches=50)
  print(next(batches)["pid"][0], flush=True)
  time.sleep(60)
"""
  before = set(os.listdir("/dev/shm"))
  # `-c` has no file that a spawned worker would import again.
  with subprocess.Popen(
    [sys.executable, "-c", program],
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
    cwd=_ROOT,
  ) as parent:
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 1 and all(running(pid) for pid in pids)
    assert set(os.listdir("/dev/shm")) - before
    parent.send_signal(signal.SIGKILL)
  assert ended(pids)
  # The file that says who owns it, which has no bytes, is removed with the next start.
  left = {name for name in set(os.listdir("/dev/shm")) - before if not name.endswith(".owner")}
  deadline = time.monotonic() + 10
  while left & set(os.listdir("/dev/shm")) and time.monotonic() < deadline:
    time.sleep(0.1)
  assert not left & set(os.listdir("/dev/shm")), "shared memory is left behind"


def test_prefetching_hides_the_loading_time():
  with pipeline.train_batches(Numbers(), augmented, batch_size=6, seed=5) as batches:
    next(batches)
    time.sleep(0.2)
    before = batches.wait_seconds
    next(batches)
    assert before > 0
    assert batches.wait_seconds - before < 0.1


def test_closed_iterator_says_so():
  batches = pipeline.train_batches(Numbers(), augmented, batch_size=6, seed=5)
  next(batches)
  batches.close()
  batches.close()
  with pytest.raises(ValueError, match="closed"):
    next(batches)


@pytest.mark.parametrize("length, batch_size", [(23, 6), (24, 6), (2, 6)])
def test_evaluation_sees_each_record_once(length, batch_size):
  with pipeline.eval_batches(Numbers(length), plain, batch_size=batch_size) as iterator:
    batches = list(iterator)
  assert len(batches) == -(-length // batch_size)
  valid = column(batches, "example_valid")
  assert valid.dtype == bool
  np.testing.assert_array_equal(valid, np.arange(len(valid)) < length)
  np.testing.assert_array_equal(column(batches, "record")[valid], np.arange(length))
  np.testing.assert_array_equal(column(batches, "index")[valid], np.arange(length))
  assert (column(batches, "record")[~valid] == length - 1).all()


def test_evaluation_is_shared_evenly():
  shares = []
  for i in range(2):
    with pipeline.eval_batches(
      Numbers(13), plain, batch_size=4, process_index=i, process_count=2
    ) as iterator:
      shares.append(list(iterator))
  assert [len(share) for share in shares] == [4, 4]
  seen = [column(share, "record")[column(share, "example_valid")] for share in shares]
  assert sorted(np.concatenate(seen)) == list(range(13))


@pytest.mark.parametrize(
  "options, message",
  [
    ({"start_example": 7}, "start_example is 7.*batch_size"),
    ({"start_example": -6}, "start_example is -6"),
    ({"source": Numbers(0)}, "empty"),
    ({"process_count": 4}, "batch_size is 6.*4"),
    ({"process_index": 2, "process_count": 2}, "process_index is 2"),
    ({"num_workers": -1}, "num_workers is -1"),
    ({"transform": failing}, "seven is broken"),
  ],
)
def test_errors(options, message):
  with pytest.raises(ValueError, match=message):
    take(6, **options)


def test_reading_error_names_the_record():
  with pytest.raises(OSError, match="disk is gone") as caught:
    take(1, source=Unreadable())
  assert any("While reading record" in note for note in caught.value.__notes__)
