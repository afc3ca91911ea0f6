"""All hosts of a run learn of a batch that one of them cannot read before the same step."""

import json
import types

import jax
import pytest

from frozen_vision.data import images
from frozen_vision.devices import processes
from frozen_vision.metrics import gather
from frozen_vision.training import feeds, hosts, reading

_DAMAGED = images.ImageError("a/7.png", "cannot be decoded (broken data stream)", "damaged")


class _Feed(feeds.Feed):
  """Numbers from 1 on, in the place of batches; one of them cannot be read."""

  meets = False

  def __init__(self, damaged=None, error=_DAMAGED):
    self._damaged, self._error, self.position = damaged, error, 0

  def __next__(self):
    self.position += 1
    if self.position == self._damaged:
      raise self._error
    return self.position


@pytest.fixture
def two_hosts(monkeypatch):
  """Announcements of two processes in one; `become` says which of them it is from now on."""
  told = {}
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(processes, "announce", told.__setitem__)
  monkeypatch.setattr(
    processes,
    "announcements",
    lambda folder: [text for key, text in sorted(told.items()) if key.startswith(f"{folder}/")],
  )
  monkeypatch.setattr(processes, "wait_for_all", lambda what: None)
  monkeypatch.setattr(reading, "_runs", iter([0, 0, 1, 1]))

  def become(index):
    monkeypatch.setattr(jax, "process_index", lambda: index)

  return types.SimpleNamespace(become=become)


def _advance(reader, step):
  """What a run does of a step: takes its batch, dispatches it and reads on."""
  batch = reader.take(step)
  reader.read(step + 1)
  return batch


@pytest.mark.parametrize("lead", [0, 1, 2])
@pytest.mark.parametrize("damaged", [1, 2, 3, 6])
def test_both_hosts_stop_before_the_same_step(two_hosts, damaged, lead):
  """However far the host whose files are whole is ahead: by at most the steps in flight."""
  readers = []
  for index, at in enumerate((None, damaged)):
    two_hosts.become(index)
    readers.append(reading.Reader(_Feed(at), 0, start=0, end=10))
  taken, messages = ([], []), {}
  for step in range(10 + lead):
    for index, own in ((0, step), (1, step - lead)):
      if index not in messages and 0 <= own < 10:
        two_hosts.become(index)
        try:
          taken[index].append(_advance(readers[index], own))
        except images.FileError as error:
          messages[index] = str(error)
  assert taken == (list(range(damaged)),) * 2
  assert messages[0] == messages[1] and messages[0].startswith("host 1 (")
  assert "a/7.png: cannot be decoded (broken data stream)" in messages[0]


def test_nothing_is_read_that_no_step_takes(two_hosts):
  two_hosts.become(0)
  feed = _Feed()
  reader = reading.Reader(feed, 0, start=0, end=4)
  assert [_advance(reader, step) for step in range(4)] == [0, 1, 2, 3] and feed.position == 3


def test_one_process_reads_one_batch_ahead_and_raises_the_error_itself():
  feed = _Feed(damaged=2)
  reader = reading.Reader(feed, 0, start=0, end=10)
  assert feed.position == 0 and _advance(reader, 0) == 0 and feed.position == 1
  assert _advance(reader, 1) == 1
  with pytest.raises(images.ImageError) as error:
    reader.take(2)
  assert error.value is _DAMAGED


@pytest.mark.parametrize("error", [_DAMAGED, RuntimeError("a worker died")])
def test_processes_that_meet_at_every_batch_fail_together(monkeypatch, error):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  sent = []

  def exchange(value):
    sent.append(value)
    return [json.loads(json.dumps(one)) for one in (None, *sent)]

  monkeypatch.setattr(gather, "gather_objects", exchange)

  def fails():
    raise error

  said = []
  for read in (fails, lambda: "a batch"):  # this process, and then one that has read its part
    with pytest.raises(ValueError, match=r"host 1 \(") as raised:
      hosts.read_together(read)
    said.append(str(raised.value))
  assert said[0] == said[1] and str(error) in said[0]
