"""Several processes as one run: how each finds the others, and what each says.

`devices.launcher` starts them on one machine. Over several machines, every one runs
`python -m frozen_vision.main ... --distributed`: on TPU pods and under Slurm it finds the others by itself,
elsewhere from the environment variables of `initialize`.
"""

from collections.abc import Iterator, Mapping
import contextlib
import os
import sys
import threading
import time
from typing import NoReturn

import jax
from jax._src import distributed as jax_distributed
import orbax.checkpoint as ocp

from frozen_vision.devices import watch
from frozen_vision.devices.launcher import COORDINATOR, COUNT, INDEX, LAUNCHER

# A process that hears nothing of another's machine for so long ends itself; `watch` notices a kill at once.
HEARTBEAT_SECONDS = 45
_JOINING_SECONDS = 300.0
_SILENT_SECONDS = 10.0
_COMPILING_SECONDS = 3600

_watch: watch.Watch | None = None  # of this process over the others


def initialize() -> None:
  """Joins the run's other processes; before anything touches a device.

  The environment variables FROZEN_VISION_COORDINATOR (HOST:PORT of process 0), FROZEN_VISION_PROCESSES (how
  many) and FROZEN_VISION_PROCESS (which one this is) say how; without them jax asks the cluster, which it
  knows on TPU pods, Slurm and others.

  Raises:
    ValueError: only some of the variables, numbers that do not fit, or no cluster that jax knows.
  """
  global _watch
  _end_with_launcher()
  found = {name: os.environ[name] for name in (COORDINATOR, COUNT, INDEX) if os.environ.get(name)}
  how: dict[str, str | int] = {}
  if found:
    if len(found) < 3:
      raise ValueError(
        f"Several processes: {sorted(found)} are set, but all of {COORDINATOR}, {COUNT}, {INDEX} are needed."
      )
    try:
      how = dict(
        coordinator_address=found[COORDINATOR],
        num_processes=int(found[COUNT]),
        process_id=int(found[INDEX]),
      )
    except ValueError as error:
      raise ValueError(
        f"Several processes: {COUNT}={found[COUNT]}, {INDEX}={found[INDEX]}; expected two numbers."
      ) from error
    if not 0 <= how["process_id"] < how["num_processes"]:
      raise ValueError(
        f"Several processes: {INDEX}={found[INDEX]}; expected 0 to {how['num_processes'] - 1}, since "
        f"{COUNT}={found[COUNT]}."
      )
  try:
    with _joining(how):
      jax.distributed.initialize(
        **how,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        initialization_timeout=int(_JOINING_SECONDS) + 60,  # never reached: it would end without a sentence
      )
  except ValueError as error:
    if how:
      raise
    raise ValueError(
      "--distributed: this is no cluster that jax knows (TPU pod, Slurm, Open MPI, Kubernetes). Set "
      f"{COORDINATOR}=HOST:PORT of process 0, {COUNT} and {INDEX}."
    ) from error
  # jax has no public name for it; orbax reads it the same way.
  state = jax_distributed.global_state
  _watch = watch.start(state.process_id, state.num_processes, state.client, state.coordinator_address)


@contextlib.contextmanager
def _joining(how: Mapping[str, str | int]) -> Iterator[None]:
  """Says for whom this process waits while it joins the others, and ends it where they do not come."""
  started = time.strftime("%H:%M:%S")
  what = "the other processes of this run"
  if how:
    what = f"the other {how['num_processes'] - 1} processes at {how['coordinator_address']}"

  def say() -> None:
    print(f"Waiting for {what} since {started}.", file=sys.stderr, flush=True)

  def give_up() -> None:
    leave(
      f"Error: not all of {what} came within {_JOINING_SECONDS:.0f} s of {started}. Start all of them, with "
      "an address that they can reach."
    )

  timers = [threading.Timer(_SILENT_SECONDS, say), threading.Timer(_JOINING_SECONDS, give_up)]
  for timer in timers:
    timer.daemon = True
    timer.start()
  try:
    yield
  finally:
    for timer in timers:
      timer.cancel()


def _end_with_launcher() -> None:
  """Ends this process when the launcher that started it is gone, however it went."""
  descriptor = os.environ.pop(LAUNCHER, "")
  if not descriptor:
    return

  def wait() -> None:
    os.read(int(descriptor), 1)  # nothing is ever written: it returns when the launcher has ended
    leave(f"The launcher of this process was gone at {time.strftime('%H:%M:%S')}; this process ends, too.")

  threading.Thread(target=wait, daemon=True, name="end-with-launcher").start()


def wait_for_all(what: str) -> None:
  """Returns when all processes have come here, once for each `what`.

  Compiling takes some of them longer than others, and the first exchange between CPUs waits for half a minute
  only.
  """
  if jax.process_count() > 1:
    ocp.multihost.sync_global_processes(
      f"frozen_vision: {what}", timeout=_COMPILING_SECONDS, processes=set(range(jax.process_count()))
    )


def announce(key: str, text: str) -> None:
  """Keeps a text for all processes of the run under a path like `FOLDER/NAME`; it is there on return."""
  jax_distributed.global_state.client.key_value_set(key, text)


def announcements(folder: str) -> list[str]:
  """What has been announced by now under `FOLDER/`, in the order of names."""
  return [text for _, text in sorted(jax_distributed.global_state.client.key_value_dir_get(folder))]


def leave(message: str, *, is_expected: bool = True) -> NoReturn:
  """Ends this process at once; an ordinary exit waits for the others, who wait for this one.

  Args:
    message: the last thing that it says, and what the others say of it.
    is_expected: False for an error that may come from the end of another process, whose name is then said
      instead.
  """
  if _watch is not None:
    if not is_expected:
      _watch.give_way()
    _watch.leave(message.strip().rpartition("\n")[2])
  print(message, file=sys.stderr, flush=True)
  sys.stdout.flush()
  os._exit(1)


def log_prefix() -> str:
  """Which process of how many this is, for the start of a log line."""
  return f" [{jax.process_index()}/{jax.process_count()}]"
