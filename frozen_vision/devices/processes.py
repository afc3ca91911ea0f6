"""Several processes as one run: how each finds the others, what each says, and a launcher for one machine.

  python -m frozen_vision.distributed --processes=2 -- python -m frozen_vision.main --config=... --workdir=...

starts processes on this machine and ends all of them when one ends; they end when it is killed. Over several
machines, every one runs `python -m frozen_vision.main ... --distributed`: on TPU pods and under Slurm it
finds the others by itself, elsewhere from the environment variables of `initialize`.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import NoReturn

import jax
from jax._src import distributed as jax_distributed
import orbax.checkpoint as ocp

from frozen_vision import messages
from frozen_vision.devices import watch

_COORDINATOR, _COUNT, _INDEX, _LAUNCHER = (
  "FROZEN_VISION_COORDINATOR",
  "FROZEN_VISION_PROCESSES",
  "FROZEN_VISION_PROCESS",
  "FROZEN_VISION_LAUNCHER",  # the descriptor of a pipe that ends with the launcher
)
# A process that hears nothing of another's machine for so long ends itself; `watch` notices a kill at once.
HEARTBEAT_SECONDS = 45
_JOINING_SECONDS = 300.0
_SILENT_SECONDS = 10.0
_COMPILING_SECONDS = 3600
_GRACE_SECONDS = 60.0  # between SIGTERM, on which runs save, and SIGKILL

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
  found = {name: os.environ[name] for name in (_COORDINATOR, _COUNT, _INDEX) if os.environ.get(name)}
  how: dict[str, str | int] = {}
  if found:
    if len(found) < 3:
      raise ValueError(
        f"Several processes: {sorted(found)} are set, but all of {_COORDINATOR}, {_COUNT}, {_INDEX} are "
        "needed."
      )
    try:
      how = dict(
        coordinator_address=found[_COORDINATOR],
        num_processes=int(found[_COUNT]),
        process_id=int(found[_INDEX]),
      )
    except ValueError as error:
      raise ValueError(
        f"Several processes: {_COUNT}={found[_COUNT]}, {_INDEX}={found[_INDEX]}; expected two numbers."
      ) from error
    if not 0 <= how["process_id"] < how["num_processes"]:
      raise ValueError(
        f"Several processes: {_INDEX}={found[_INDEX]}; expected 0 to {how['num_processes'] - 1}, since "
        f"{_COUNT}={found[_COUNT]}."
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
      f"{_COORDINATOR}=HOST:PORT of process 0, {_COUNT} and {_INDEX}."
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
  descriptor = os.environ.pop(_LAUNCHER, "")
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


def launch(command: Sequence[str], processes: int) -> int:
  """Runs `processes` copies of a command that calls `initialize`, until all have ended.

  When one fails, the launcher says which, asks the others to save and end (SIGTERM), and ends them by force
  after a minute. Ctrl-C and SIGTERM are passed on.

  Returns:
    0 if all ended well, else the status of the one that failed first.
  """
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  asked: list[int] = []
  handlers = {
    number: signal.signal(number, lambda n, _: asked.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
  }
  reading, writing = os.pipe()  # children read until the launcher, which alone can write, has ended
  environment = os.environ | {_COORDINATOR: address, _COUNT: str(processes), _LAUNCHER: str(reading)}
  children = [
    subprocess.Popen(
      command, start_new_session=True, pass_fds=[reading], env=environment | {_INDEX: str(index)}
    )
    for index in range(processes)
  ]
  os.close(reading)
  failed, deadline = None, None
  try:
    are_running = True
    while are_running:
      statuses = [child.poll() for child in children]
      are_running = None in statuses
      # Where several ended since the last look, the others failed for want of one that a signal ended.
      ended = sorted((status >= 0, index) for index, status in enumerate(statuses) if status)
      if failed is None and ended:
        failed = ended[0][1]
        status = statuses[failed]
        how = f"was ended by {messages.signal_name(-status)}" if status < 0 else f"ended with status {status}"
        print(f"Process {failed} of {processes} {how}; ending the others.", file=sys.stderr, flush=True)
      if deadline is None and (asked or failed is not None):
        deadline = time.monotonic() + _GRACE_SECONDS
        _signal(children, signal.SIGTERM)
      elif deadline is not None and time.monotonic() > deadline:
        _signal(children, signal.SIGKILL)
      time.sleep(0.2)
  finally:
    _signal(children, signal.SIGKILL)
    for number, handler in handlers.items():
      signal.signal(number, handler)
    for child in children:
      child.wait()
    os.close(writing)
  first = children[failed].returncode if failed is not None else 0
  return 128 - first if first < 0 else first


def _signal(children: Sequence[subprocess.Popen], number: signal.Signals) -> None:
  for child in children:
    if child.poll() is None:
      child.send_signal(number)


def main(arguments: Sequence[str]) -> None:
  """The command line of `python -m frozen_vision.distributed`."""
  usage = "Usage: python -m frozen_vision.distributed --processes=N -- COMMAND ..."
  if len(arguments) < 3 or not arguments[0].startswith("--processes=") or arguments[1] != "--":
    sys.exit(usage)
  count = arguments[0].partition("=")[2]
  if not count.isdigit() or not int(count):
    sys.exit(f"--processes={count}: expected a number of processes, 1 or more. {usage}")
  sys.exit(launch(arguments[2:], int(count)))
