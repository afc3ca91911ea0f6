"""Time by kernel from what `jax.profiler` writes, read without TensorFlow."""

import collections
from collections.abc import Iterable
import dataclasses
import pathlib
from typing import Any

from jax.profiler import ProfileData


@dataclasses.dataclass(frozen=True)
class Kernel:
  """Time of all calls of one kernel.

  Attributes:
    operation: of the compiled program, or of the source if the trace says it: the one with most of the time.
  """

  name: str
  calls: int
  seconds: float
  operation: str


def read(folder: pathlib.Path) -> list[Kernel]:
  """Kernels of a trace below `folder`, the costliest first; empty if it has no events of a device.

  On a GPU these are the events of its streams, copies among them. A CPU has no device of its own in a trace:
  there they are the program's operations.

  Raises:
    FileNotFoundError: no trace in the folder.
  """
  files = sorted(folder.rglob("*.xplane.pb"))
  if not files:
    raise FileNotFoundError(f"No *.xplane.pb below {folder}; expected what jax.profiler.trace writes there.")
  calls: collections.Counter[str] = collections.Counter()
  times: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
  for file in files:
    for name, operation, nanoseconds in _events(ProfileData.from_file(str(file))):
      calls[name] += 1
      times[name][operation] += nanoseconds
  kernels = [
    Kernel(name, calls[name], sum(by.values()) / 1e9, by.most_common(1)[0][0]) for name, by in times.items()
  ]
  return sorted(kernels, key=lambda kernel: kernel.seconds, reverse=True)


def _events(data: ProfileData) -> Iterable[tuple[str, str, float]]:
  """(kernel, operation, nanoseconds without those of events inside of it) of every event of a device."""
  planes = list(data.planes)
  devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
  for plane in devices or planes:
    for line in plane.lines:
      # Beside streams a device's plane may have lines that sum them up by module or by step.
      if devices and not line.name.startswith("Stream"):
        continue
      events = []
      for event in line.events:
        stats = {key: value for key, value in event.stats}
        if devices or "hlo_op" in stats:
          operation = stats.get("name") or stats.get("tf_op") or stats.get("hlo_op") or ""
          events.append((event.name, str(operation), event.start_ns, event.duration_ns))
      yield from _own_times(events)


def _own_times(events: list[tuple[str, str, float, float]]) -> Iterable[tuple[str, str, float]]:
  """Durations less those of events that lie inside, as a loop holds its body."""
  open_events: list[list[Any]] = []  # name, operation, end, own time; each inside of the one before

  def close(until: float) -> Iterable[tuple[str, str, float]]:
    while open_events and open_events[-1][2] <= until:
      name, operation, _, own = open_events.pop()
      yield name, operation, max(own, 0.0)

  for name, operation, start, duration in sorted(events, key=lambda event: (event[2], -event[3])):
    yield from close(start)
    if open_events:
      open_events[-1][3] -= duration
    open_events.append([name, operation, start + duration, duration])
  yield from close(float("inf"))
