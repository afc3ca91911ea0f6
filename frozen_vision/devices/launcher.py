"""Starts several processes of one run on this machine.

  python -m frozen_vision.distributed --processes=2 -- python -m frozen_vision.main --config=... --workdir=...

ends all of them when one ends; they end when it is killed. It imports no JAX, so that it starts at once.
"""

from collections.abc import Sequence
import os
import signal
import socket
import subprocess
import sys
import time

from frozen_vision import messages

# Variables that tell a process of the others; see `devices.processes.initialize`.
COORDINATOR, COUNT, INDEX, LAUNCHER = (
  "FROZEN_VISION_COORDINATOR",
  "FROZEN_VISION_PROCESSES",
  "FROZEN_VISION_PROCESS",
  "FROZEN_VISION_LAUNCHER",  # the descriptor of a pipe that ends with the launcher
)
_GRACE_SECONDS = 60.0  # between SIGTERM, on which runs save, and SIGKILL


def launch(command: Sequence[str], processes: int) -> int:
  """Runs `processes` copies of a command that calls `processes.initialize`, until all have ended.

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
  environment = os.environ | {COORDINATOR: address, COUNT: str(processes), LAUNCHER: str(reading)}
  children = [
    subprocess.Popen(
      command, start_new_session=True, pass_fds=[reading], env=environment | {INDEX: str(index)}
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
