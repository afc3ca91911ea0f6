"""Reads the batches of a run, so that all hosts learn of one that cannot be read before the same step.

A host that cannot read its part of a batch would end alone, and nothing that needs all hosts, such as a save,
could happen any more. So every host reads ahead, by as many batches as there are steps in flight, and
announces a failure before it dispatches another step. A step is done only once all hosts have dispatched it.
So a host that knows the step two before to be done has heard of every failure up to the step that it
dispatches next.
"""

import collections
import itertools
import json

import jax

from frozen_vision.devices import processes
from frozen_vision.tasks import base
from frozen_vision.training import feeds, hosts

IN_FLIGHT = 2  # steps that are dispatched and not known to be done
_runs = itertools.count()  # each has announcements of its own, and every process begins the same runs


class Reader:
  """The batches of a run by step.

  Args:
    feed: at the batch after `first`. One whose processes meet at every batch (`meets`) is not read ahead.
    first: the batch of step `start`.
    end: the step without a batch, which ends the run.
  """

  def __init__(self, feed: feeds.Feed, first: base.Batch, start: int, end: int):
    self._feed, self._end = feed, end
    self._batches = collections.deque([first])
    self._next = start + 1  # the step whose batch is read next
    self._failures: dict[int, Exception] = {}  # of this process, by step
    self._exchanges = jax.process_count() > 1 and not feed.meets
    self._ahead = IN_FLIGHT if self._exchanges else 0
    self._key = f"frozen_vision/unreadable/{next(_runs)}"
    if self._exchanges:
      self.read(start)
      processes.wait_for_all(f"first batches of run {self._key}")

  def read(self, step: int) -> None:
    """Reads the batch of a step, which is dispatched next, and in several processes those of the next two."""
    while self._next <= min(step + self._ahead, self._end - 1) and not self._failures:
      try:
        self._batches.append(next(self._feed))
      except Exception as error:
        self._failures[self._next] = error
        if self._exchanges:
          found = {"step": self._next, "failure": hosts.describe_failure(error)}
          processes.announce(f"{self._key}/{jax.process_index()}", json.dumps(found))
      self._next += 1

  def take(self, step: int) -> base.Batch:
    """The batch of a step, which has been read; the step `IN_FLIGHT` before must be done.

    Raises:
      FileError, or what else reading it has raised: in all processes, if it failed in one of them.
    """
    if self._exchanges:
      for announced in processes.announcements(self._key):
        found = json.loads(announced)
        if found["step"] == step:
          raise hosts.failure_of(found["failure"]) from self._failures.get(step)
    elif step in self._failures:
      raise self._failures[step]
    return self._batches.popleft()
